"""Signs to bits, and back, against a copy of the map: both are bound by memory."""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite

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
    x = torch.randn(shape, generator=generator).to(device, dtype)
    return (x.contiguous(memory_format=torch.channels_last) if layout == "nhwc" else x,)


def traffic(size, element_bytes, direction):
    """A map read, two bits an element written and read, a map written."""
    elements = math.prod(size[1])
    return 2 * elements * element_bytes + elements // 2, elements


def ours(size):
    return lambda x: unpack_signs(pack_signs(x), x.dtype, size[0] == "nhwc")


def eager(size):
    return torch.sign


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="packed and unpacked again"),
    Implementation("sign", eager, note="torch.sign, one pass without bits: what both passes are measured by"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="pack_signs",
    sizes=SIZES,
    small=("nhwc", (2, 66, 5, 3)),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=eager,
    implementations=IMPLEMENTATIONS,
    operators=["pack_signs", "unpack_signs"],
)

bench_pack_signs = benchmark(SUITE)
