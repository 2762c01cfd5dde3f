"""LSQ+ on EDSR's activations, 4 bits, against the published chain."""

from harness import benchmark
from step_quantizer import Round, suite

import tersor

BITS, SCALE, OFFSET = 4, 0.11, 0.0
LEVELS = 2**BITS - 1


def ours(x, scale, offset):
    return tersor.fake_quantize_lsq_plus(x, scale, offset, BITS, grad_factor=1.0)


def chain(x, scale, offset):
    return Round.apply(((x - offset) / scale).clamp(0, LEVELS)) * scale + offset


bench_fake_quantize_lsq_plus = benchmark(
    suite("fake_quantize_lsq_plus", ours, chain, [SCALE, OFFSET], SCALE, (0, LEVELS))
)
