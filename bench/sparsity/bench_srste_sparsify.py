"""A weight with the smallest elements of every group set to zero (SR-STE), against the published chain.

The weights are a 3x3 convolution of ResNet-50 and fc1 of DeiT-small.
"""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite

from tersor.sparsity import srste_sparsify

CUDA = settings.device() == "cuda"
DECAY = 2e-4
WEIGHTS = {"conv512": (512, 512, 3, 3), "fc1": (1536, 384)}
PATTERNS = {"2of4": (2, 4), "4of8": (4, 8), "1of16": (1, 16)}
SIZES = {f"{w}_{p}": (shape, *pattern) for w, shape in WEIGHTS.items() for p, pattern in PATTERNS.items()}
if settings.QUICK:
    SIZES = {"conv_2of4": ((16, 8, 3, 3), 2, 4)}


def make_inputs(size, dtype, device, generator):
    """Which of two equal elements goes is open in the published chain, so a group's are all of different magnitude."""
    shape, _, m = size
    between = torch.rand(math.prod(shape) // m, m, generator=generator)
    magnitude = (between.argsort(1) + 0.1 + 0.8 * between) / m
    weight = magnitude * torch.randn(magnitude.shape, generator=generator).sign()
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        weight = weight.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)
    return (weight.reshape(shape).contiguous().to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Forward: the weight read, output and one bit per element written. Backward: incoming gradient, weight and bits
    read, the gradient written. The FLOPs are one comparison per element forward, a product and a sum backward."""
    elements = math.prod(size[0])
    passes, bits, flops = (2, 1, 1) if direction == "forward" else (5, 2, 3)
    return passes * elements * element_bytes + bits * elements // 8, flops * elements


def ours(size):
    return lambda weight: srste_sparsify(weight, *size[1:], DECAY)


class StraightThrough(torch.autograd.Function):
    """The smallest elements by sorting; the mask is kept in the weight's dtype."""

    @staticmethod
    def forward(ctx, weight, n, m, decay):
        channels_last = weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight
        groups = channels_last.abs().reshape(-1, m)
        smallest = torch.argsort(groups, dim=1)[:, : m - n]
        mask = torch.ones_like(groups).scatter_(1, smallest, 0.0).reshape(channels_last.shape)
        mask = mask.permute(0, 3, 1, 2) if weight.dim() == 4 else mask
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, grad_output):
        weight, mask = ctx.saved_tensors
        return grad_output + ctx.decay * (1 - mask) * weight, None, None, None


def eager(size):
    return lambda weight: StraightThrough.apply(weight, *size[1:], DECAY)


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: argsort, scatter, a float mask"),
    Implementation("compiled", compiled, note="torch.compile of eager"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="srste_sparsify",
    sizes=SIZES,
    small=((6, 8, 3, 3), 2, 4),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    implementations=IMPLEMENTATIONS,
    operators=["srste_sparsify_forward", "srste_sparsify_backward"],
)

bench_srste_sparsify = benchmark(SUITE)
