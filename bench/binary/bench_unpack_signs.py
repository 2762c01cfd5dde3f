"""Bits to a map of -1, 0 and 1, against a copy of such a map."""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite

from tersor.binary import pack_signs, unpack_signs

CUDA = settings.device() == "cuda"
SIZES = {
    f"{layout}_{name}": (layout, shape)
    for layout in ("nchw", "nhwc")
    for name, shape in {"b1_14x14": (1, 256, 14, 14), "b16_56x56": (16, 64, 56, 56)}.items()
}
if settings.QUICK:
    SIZES = {"nchw_b2_6x6": ("nchw", (2, 70, 6, 6))}


def make_inputs(size, dtype, device, generator):
    layout, shape = size
    x = torch.randn(shape, generator=generator).sign().to(device, dtype)
    return (x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x,)


def traffic(size, element_bytes, direction):
    """Two bits an element read, a map written."""
    elements = math.prod(size[1])
    return elements * element_bytes + elements // 4, elements


def ours(size):
    def build(x):
        signs = pack_signs(x)
        return lambda: unpack_signs(signs, x.dtype, size[0] == "nhwc")

    return build


def clone(size):
    return lambda x: x.clone


def prepare(build, inputs, dtype, direction):
    """The packing is not timed."""
    call = build(*inputs)
    return Prepared(call, lambda: {"output": call()})


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("clone", clone, note="a copy of the map, which reads 16 times as much"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="unpack_signs",
    sizes=SIZES,
    small=("nhwc", (2, 66, 5, 3)),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=clone,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["unpack_signs"],
)

bench_unpack_signs = benchmark(SUITE)
