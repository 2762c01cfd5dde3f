"""Two opposite percentiles of a convolution's weight and of an EDSR activation, against sorting."""

import math

import numpy as np
import settings
import torch
from harness import benchmark
from suite import Implementation, Suite

import tersor


def make_inputs(size, dtype, device, generator):
    return (torch.randn(size, generator=generator).to(device, dtype),)


def ours(size):
    return lambda x: torch.cat(tersor.percentile_bounds(x))


def reference(size):
    return lambda x: torch.cat(tersor.percentile_bounds(x.float())).to(x.dtype)


def numpy_percentile(size):
    return lambda x: torch.from_numpy(np.percentile(x.cpu().numpy(), [1, 99])).to(x.device, x.dtype)


SUITE = Suite(
    operator="percentile_bounds",
    sizes={"conv64": (64, 64, 3, 3)} | ({} if settings.QUICK else {"edsr_b16": (16, 64, 48, 48)}),
    small=(8, 4, 3, 3),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=lambda size, element, direction: (math.prod(size) * element, math.prod(size)),
    reference=reference,
    implementations=[
        Implementation("tersor", ours, ours=True, note="the default backend"),
        Implementation("numpy", numpy_percentile, note="numpy.percentile, as published"),
    ],
    operators=["percentile_bounds"],
)

bench_percentile_bounds = benchmark(SUITE)
