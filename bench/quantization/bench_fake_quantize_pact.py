"""PACT on EDSR's activations, 4 bits, against the chain of torch operations with PACT's own gradient."""

import torch
from harness import benchmark
from step_quantizer import Round, suite

import tersor

BITS, ALPHA = 4, 1.5
LEVELS = 2**BITS - 1


def ours(x, alpha):
    return tersor.fake_quantize_pact(x, alpha, BITS)


def chain(x, alpha):
    clipped, fixed = torch.where(x >= alpha, alpha, x.clamp(min=0)), alpha.detach()
    return Round.apply(clipped * LEVELS / fixed) * fixed / LEVELS


bench_fake_quantize_pact = benchmark(suite("fake_quantize_pact", ours, chain, [ALPHA], ALPHA / LEVELS, (0, LEVELS)))
