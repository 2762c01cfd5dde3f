"""Affine quantisation with trainable scale and zero point against torch's own operator, at 64K and 16M elements."""

import math

import settings
import torch
from harness import benchmark
from quantizer_inputs import between_ties, in_float32, tolerance
from suite import Implementation, Suite, Target

import tersor

SCALE, ZERO_POINT = 0.1, 5.3
CUDA = settings.device() == "cuda"


def make_inputs(size, dtype, device, generator):
    x = between_ties(size, SCALE, -9, 14, generator).to(device, dtype)
    return x, torch.tensor([SCALE], device=device), torch.tensor([ZERO_POINT], device=device)


def traffic(size, element_bytes, direction):
    """Forward: the input read, the output written. Backward: input and incoming gradient read, gradient written."""
    elements = math.prod(size)
    return (2 if direction == "forward" else 5) * elements * element_bytes, elements * 8


def ours(size):
    return lambda x, scale, zero_point: tersor.fake_quantize_affine(x, scale, zero_point, 0, 15)


def torch_learnable(size):
    return lambda *tensors: torch._fake_quantize_learnable_per_tensor_affine(*tensors, 0, 15, 1.0)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("torch_learnable", torch_learnable, note="torch._fake_quantize_learnable_per_tensor_affine"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="fake_quantize_affine",
    sizes={"64K": (65536,)} if settings.QUICK else {"64K": (65536,), "16M": (1 << 24,)},
    small=(2, 3, 17, 19),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=lambda size: in_float32(ours(size)),
    implementations=IMPLEMENTATIONS,
    operators=["fake_quantize_affine_forward", "fake_quantize_affine_backward"],
    tolerance=tolerance,
    targets=[Target("fake_quantize_affine/*/float32/*", "torch_learnable", 2 if CUDA else 30)],
)

bench_fake_quantize_affine = benchmark(SUITE)
