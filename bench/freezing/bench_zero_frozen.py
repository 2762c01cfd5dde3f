"""Zeros in a gradient where its parameter is frozen: a mask of one bit an element against one of a byte or a float."""

import math

import torch
from frozen_masks import frozen_mask, touched
from frozen_step import SMALL, sizes
from harness import benchmark
from suite import Implementation, Suite

from tersor.freezing import pack_mask, zero_frozen


def make_inputs(size, dtype, device, generator):
    granularity, share, shape = size
    gradient = torch.randn(*shape, generator=generator)
    mask = frozen_mask(shape, granularity, share, generator)
    masks = pack_mask(mask), mask, (~mask).to(dtype)
    return gradient.to(device, dtype), *(each.to(device) for each in masks)


def traffic(size, element_bytes, direction):
    """What is free is read, everything written, a bit per element read."""
    granularity, share, shape = size
    elements = math.prod(shape)
    read = round(elements * touched(granularity, share))
    return (read + elements) * element_bytes + elements // 8, elements


def ours(size):
    return lambda gradient, packed, mask, free: zero_frozen(gradient, packed)


def where(size):
    return lambda gradient, packed, mask, free: torch.where(mask, 0, gradient)


def eager(size):
    return lambda gradient, packed, mask, free: gradient * free


def clone(size):
    return lambda gradient, packed, mask, free: gradient.clone()


SUITE = Suite(
    operator="zero_frozen",
    sizes=sizes(),
    small=SMALL,
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=where,
    implementations=[
        Implementation("tersor", ours, ours=True, note="the default backend"),
        Implementation("where", where, note="torch.where with a bool mask"),
        Implementation("eager", eager, note="the published way: times a float mask"),
        Implementation("clone", clone, compared=False, note="a copy into a fresh output: the floor"),
    ],
    operators=["zero_frozen"],
)

bench_zero_frozen = benchmark(SUITE)
