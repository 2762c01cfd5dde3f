"""Weight gradient of a 3x3 convolution with 256 channels on 8 images of 14x14, with parts of the weight frozen."""

import torch.nn.functional as F
from frozen_gradient import suite
from harness import benchmark

import tersor

SHAPES = (8, 256, 14, 14), (256, 256, 3, 3)
SMALL = (2, 70, 5, 6), (130, 70, 3, 3)


def layer(input, weight):
    return F.conv2d(input, weight, padding=1)


def frozen_layer(input, weight, frozen, plan):
    return tersor.frozen_conv2d(input, weight, padding=1, frozen=frozen, plan=plan)


bench_frozen_conv2d = benchmark(suite("frozen_conv2d", layer, frozen_layer, SHAPES, SMALL))
