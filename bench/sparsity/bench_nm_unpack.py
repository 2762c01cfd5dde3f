"""A packed N:M weight with its zeros again, against the same in plain torch: what a dense product costs besides.

The weights are a 3x3 convolution of ResNet-50 and fc1 of DeiT-small.
"""

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite

from tersor.sparsity import nm_pack, nm_unpack, srste_sparsify
from tersor.sparsity.nm_pack import index_size
from tersor.sparsity.nm_unpack import unpack_rows

CUDA = settings.device() == "cuda"
WEIGHTS = {"conv256": (256, 2304), "fc1": (1536, 384)}
PATTERNS = {"2of4": (2, 4), "4of8": (4, 8), "1of16": (1, 16)}
SIZES = {f"{w}_{p}": (*shape, *pattern) for w, shape in WEIGHTS.items() for p, pattern in PATTERNS.items()}
if settings.QUICK:
    SIZES = {"tiny_2of4": (32, 64, 2, 4)}


def make_inputs(size, dtype, device, generator):
    outputs, inputs, n, m = size
    return (srste_sparsify(torch.randn(outputs, inputs, generator=generator), n, m).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Values and index read, the weight written; nothing is computed."""
    outputs, inputs, n, m = size
    elements = outputs * inputs
    return (elements + elements * n // m) * element_bytes + outputs * index_size(inputs // m, n, m), 0


def unpacked_by(unpack):
    """What ``prepare`` is given: the weight is packed beforehand, and the returned call unpacks it."""

    def make(size):
        n, m = size[2:]

        def build(weight):
            values, index = nm_pack(weight, None, n, m)
            return lambda: unpack(values, index, n, m)

        return build

    return make


def prepare(build, inputs, dtype, direction):
    call = build(inputs[0])
    return Prepared(call, lambda: {"output": call()})


IMPLEMENTATIONS = [
    Implementation("tersor", unpacked_by(nm_unpack), ours=True, note="the default backend"),
    Implementation("eager", unpacked_by(unpack_rows), note="plain torch: a scatter"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", unpacked_by(nm_unpack), ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="nm_unpack",
    sizes=SIZES,
    small=(16, 32, 2, 4),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=unpacked_by(unpack_rows),
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["nm_unpack"],
)

bench_nm_unpack = benchmark(SUITE)
