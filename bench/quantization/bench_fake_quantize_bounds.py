"""Quantisation of an activation between trainable bounds (rule "ddtb", 4 bits): EDSR's activations, and 64 MB.

Gradients are those of the input and of both bounds. The second suite has a ReLU in the same pass.
"""

import math

import settings
import torch
from harness import benchmark
from quantizer_inputs import between_ties, in_float32, tolerance
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager_quantization import fake_quantize_bounds_chain

BITS = 4
LOWER, UPPER = -0.81, 1.37
CUDA = settings.device() == "cuda"
SIZES = {"edsr_b16": (16, 64, 48, 48), "64MB": (16, 1024, 1024)}
QUICK = {"edsr_b2": (2, 64, 48, 48)}


def make_inputs(size, dtype, device, generator):
    step = (UPPER - LOWER) / (2**BITS - 1)
    low, high = math.floor(1.3 * LOWER / step), math.ceil(1.3 * UPPER / step)  # about a quarter is clipped
    x = between_ties(size, step, low, high, generator).to(device, dtype)
    return x, torch.tensor([LOWER], device=device), torch.tensor([UPPER], device=device)


def traffic(size, element_bytes, direction):
    """Forward: the input read, the output written. Backward: input and incoming gradient read, gradient written."""
    elements = math.prod(size)
    tensors = 2 if direction == "forward" else 5
    return tensors * elements * element_bytes, 10 * elements * (1 if direction == "forward" else 3)


def ours(relu):
    return lambda size: lambda x, lower, upper: tersor.fake_quantize_bounds(x, lower, upper, BITS, relu=relu)


def unfused(size):
    return lambda x, lower, upper: tersor.fake_quantize_bounds(torch.relu(x), lower, upper, BITS)


def eager(relu):
    return lambda size: lambda x, lower, upper: fake_quantize_bounds_chain(x, lower, upper, BITS, relu)


def compiled(relu):
    def chain(x, lower, upper):
        return fake_quantize_bounds_chain(x, lower, upper, BITS, relu, check=False)

    return lambda size: torch.compile(chain, dynamic=False, fullgraph=True)


def clone(size):
    return lambda x, lower, upper: x.clone()


def suite(operator, relu, more, targets):
    implementations = [
        Implementation("tersor", ours(relu), ours=True, note="the default backend"),
        Implementation("eager", eager(relu), note="the published chain, with its test for NaN"),
        Implementation("compiled", compiled(relu), note="torch.compile of the chain without the test"),
        Implementation(
            "clone", clone, compared=False, directions=["forward"], note="a copy into a fresh output: the floor"
        ),
        *more,
    ]
    if CUDA:
        implementations += [
            Implementation(name, ours(relu), ours=True, backend=name, note=name) for name in ("native", "triton")
        ]
    return Suite(
        operator=operator,
        sizes=QUICK if settings.QUICK else SIZES,
        small=(2, 3, 17, 19),
        dtypes=[torch.float32, torch.bfloat16][: 1 if settings.QUICK else 2],
        make_inputs=make_inputs,
        traffic=traffic,
        reference=lambda size: in_float32(ours(relu)(size)),
        implementations=implementations,
        operators=["fake_quantize_bounds_forward", "fake_quantize_bounds_backward"],
        targets=targets,
        tolerance=tolerance,
    )


REFERENCE = Implementation("reference", ours(False), ours=True, backend="reference", note="plain torch")
UNFUSED = Implementation("unfused", unfused, ours=True, note="torch.relu, then tersor's quantiser")
GROUP = "fake_quantize_bounds/*/float32/"
if CUDA:
    TARGETS = [Target(GROUP + "*", "copy", 0.85)]
else:
    TARGETS = [
        Target(GROUP + "forward", "eager", 20),
        Target(GROUP + "forward", "compiled", 1.5),
        Target(GROUP + "forward", "clone", 0.8),
        Target(GROUP + "forward_backward", "eager", 15),
        Target(GROUP + "forward_backward", "compiled", 2),
    ]
RELU_TARGETS = [Target("fake_quantize_bounds_relu/*/float32/*", "unfused", 1.0)]

bench_fake_quantize_bounds = benchmark(suite("fake_quantize_bounds", False, [REFERENCE], TARGETS))
bench_fake_quantize_bounds_relu = benchmark(suite("fake_quantize_bounds_relu", True, [UNFUSED], RELU_TARGETS))
