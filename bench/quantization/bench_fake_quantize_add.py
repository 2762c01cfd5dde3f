"""The sum of two quantised tensors at the end of EDSR's residual block: one pass against three."""

import math

import settings
import torch
from harness import benchmark
from quantizer_inputs import between_ties, in_float32, tolerance
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager_quantization import fake_quantize_bounds_chain

BITS = 4
BOUNDS = (-0.81, 1.37, -1.23, 0.94)
CUDA = settings.device() == "cuda"


def make_inputs(size, dtype, device, generator):
    tensors = []
    for lower, upper in (BOUNDS[:2], BOUNDS[2:]):
        step = (upper - lower) / (2**BITS - 1)
        low, high = math.floor(1.3 * lower / step), math.ceil(1.3 * upper / step)
        tensors.append(between_ties(size, step, low, high, generator).to(device, dtype))
    return *tensors, *[torch.tensor([b], device=device) for b in BOUNDS]


def traffic(size, element_bytes, direction):
    """Forward: two inputs read, the output written. Backward: those and the gradient read, two gradients written."""
    elements = math.prod(size)
    tensors = 3 if direction == "forward" else 8
    return tensors * elements * element_bytes, 20 * elements * (1 if direction == "forward" else 3)


def fused(size):
    return lambda *tensors: tersor.fake_quantize_add(*tensors, BITS)


def parts(quantize, **options):
    def total(x, other, lower, upper, other_lower, other_upper):
        return quantize(x, lower, upper, BITS, **options) + quantize(other, other_lower, other_upper, BITS, **options)

    return total


IMPLEMENTATIONS = [
    Implementation("tersor", fused, ours=True, note="the default backend"),
    Implementation("unfused", lambda size: parts(tersor.fake_quantize_bounds), ours=True, note="two quantisers and +"),
    Implementation("eager", lambda size: parts(fake_quantize_bounds_chain), note="two published chains and +"),
    Implementation(
        "compiled",
        lambda size: torch.compile(parts(fake_quantize_bounds_chain, check=False), dynamic=False, fullgraph=True),
        note="torch.compile of the chains without their tests for NaN",
    ),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", fused, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="fake_quantize_add",
    sizes={"edsr_b2": (2, 64, 48, 48)} if settings.QUICK else {"edsr_b16": (16, 64, 48, 48)},
    small=(2, 3, 17, 19),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=lambda size: in_float32(fused(size)),
    implementations=IMPLEMENTATIONS,
    operators=["fake_quantize_add_forward", "fake_quantize_add_backward"],
    # Gradient 1 is the other input's.
    tolerance=lambda dtype, name: tolerance(dtype, "gradient 0" if name == "gradient 1" else name),
    targets=[Target("fake_quantize_add/*/float32/*", "unfused", 1.0)],
)

bench_fake_quantize_add = benchmark(SUITE)
