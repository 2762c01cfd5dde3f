"""LSQ on EDSR's activations, 4 bits, signed, against the published chain."""

from harness import benchmark
from step_quantizer import Round, suite

import tersor

BITS, SCALE = 4, 0.11
LOW, HIGH = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1


def ours(x, scale):
    return tersor.fake_quantize_lsq(x, scale, BITS, signed=True, grad_factor=1.0)


def chain(x, scale):
    return Round.apply((x / scale).clamp(LOW, HIGH)) * scale


bench_fake_quantize_lsq = benchmark(suite("fake_quantize_lsq", ours, chain, [SCALE], SCALE, (LOW, HIGH)))
