"""Weight gradient of a linear layer, 384 to 1536 features for 8 x 256 tokens, with parts of the weight frozen."""

import torch.nn.functional as F
from frozen_gradient import suite
from harness import benchmark

import tersor

SHAPES = (8, 256, 384), (1536, 384)
SMALL = (2, 9, 70), (130, 70)

bench_frozen_linear = benchmark(suite("frozen_linear", F.linear, tersor.frozen_linear, SHAPES, SMALL))
