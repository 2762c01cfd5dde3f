"""Quantisation of a convolution's weight between its own percentiles, as in every forward pass of DDTB's EDSR."""

import math

import torch
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager_quantization import weight_fake_quantize_chain

BITS = 4


def make_inputs(size, dtype, device, generator):
    return (torch.randn(size, generator=generator).to(device, dtype),)


def ours(size):
    return lambda weight: tersor.weight_fake_quantize(weight, BITS, "percentile")


def reference(size):
    return lambda weight: ours(size)(weight.float()).to(weight.dtype)


def eager(size):
    return lambda weight: weight_fake_quantize_chain(weight, BITS)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: sorted twice on the host"),
]

SUITE = Suite(
    operator="weight_fake_quantize",
    sizes={"conv64": (64, 64, 3, 3)},
    small=(8, 4, 3, 3),
    make_inputs=make_inputs,
    traffic=lambda size, element, direction: (
        (2 if direction == "forward" else 5) * math.prod(size) * element,
        10 * math.prod(size),
    ),
    reference=reference,
    implementations=IMPLEMENTATIONS,
    operators=["weight_fake_quantize_forward", "weight_fake_quantize_backward"],
    targets=[Target("weight_fake_quantize/*", "eager", 1.0)],
)

bench_weight_fake_quantize = benchmark(SUITE)
