"""A linear layer with a packed N:M weight, against torch's dense one with the same weight and its zeros; inference.

Weights are packed before anything is timed, the dense one too where the peer can (`compiled_packed`). A size is
rows of the input, input features x output features, pattern; 384 and its multiples are DeiT-small's. The dense peers
pay no heed to zeros, so those that take long to compile run at 2:4 only. FLOPs are those of the kept weights.
"""

import dataclasses

import settings
import torch
import torch._inductor.config
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target
from torch import nn

from tersor.sparsity import nm_matmul, nm_pack, srste_sparsify
from tersor.sparsity.nm_pack import index_size

CUDA = settings.device() == "cuda"
PATTERNS = {"2of4": (2, 4), "1of4": (1, 4), "1of16": (1, 16), "4of8": (4, 8), "2of8": (2, 8)}
WITH_TARGET = ("2of4", "1of4", "1of16")
ONE_ROW, SQUARE = (1, 4096, 4096), (256, 1024, 1024)
DEIT = [(256, 384, 1152), (256, 384, 384), (256, 384, 1536), (256, 1536, 384)]  # qkv, proj, fc1, fc2
TARGETS = {"b1_*": (1.8, 3.4, 10), "b256_*": (2.5, 4, 12)}  # of WITH_TARGET, on the CPU in float32


def sizes(shapes, patterns):
    return {f"b{b}_{i}x{o}_{p}": (b, i, o, *PATTERNS[p]) for b, i, o in shapes for p in patterns}


SIZES = sizes([ONE_ROW, SQUARE], PATTERNS) | sizes(DEIT, WITH_TARGET) | sizes([(16, 1024, 1024)], ["2of4", "1of4"])
SIZES_BFLOAT16 = sizes([SQUARE], WITH_TARGET)
if settings.QUICK:
    SIZES, SIZES_BFLOAT16 = sizes([(1, 128, 64)], ["2of4"]), sizes([(16, 128, 64)], ["1of4"])


def make_inputs(size, dtype, device, generator):
    rows, inputs, outputs, n, m = size
    input = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    return tuple(t.to(device, dtype) for t in (input, srste_sparsify(weight, n, m), bias))


def traffic(size, element_bytes, direction):
    """Values, index, bias and input read, the output written; a multiply-add per kept weight and row."""
    rows, inputs, outputs, n, m = size
    kept = outputs * inputs * n // m
    numbers = kept + rows * (inputs + outputs) + outputs
    return numbers * element_bytes + outputs * index_size(inputs // m, n, m), 2 * rows * kept


def packed(size):
    n, m = size[3:]

    def build(input, weight, bias):
        values, index = nm_pack(weight, None, n, m)
        return lambda: nm_matmul(input, values, index, n, m, bias)

    return build


def dense(size):
    return lambda input, weight, bias: lambda: F.linear(input, weight, bias)


def compiled(size):
    def build(input, weight, bias):
        product = torch.compile(lambda x, w, b: F.linear(x, w, b), dynamic=False, fullgraph=True)
        return lambda: product(input, weight, bias)

    return build


def compiled_packed(size):
    def build(input, weight, bias):
        layer = nn.Linear(size[1], size[2], device=input.device, dtype=input.dtype).requires_grad_(False).eval()
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        product = torch.compile(layer, dynamic=False, fullgraph=True)
        with torch._inductor.config.patch(freezing=True):  # as an option of torch.compile it would do nothing
            product(input)
        return lambda: product(input)

    return build


def semi_structured(size):
    def build(input, weight, bias):
        if weight.dtype == torch.float32:
            raise TypeError("takes 2:4 in half precision only")
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        return lambda: F.linear(input, sparse, bias)

    return build


def prepare(build, inputs, dtype, direction):
    """What ``build`` does with input, weight and bias is not timed; what it returns computes the product."""
    with torch.no_grad():
        product = build(*inputs)

    def call():
        with torch.no_grad():
            return product()

    return Prepared(call, lambda: {"output": call()})


AT_2OF4 = [name for name in SIZES | SIZES_BFLOAT16 if settings.QUICK or name.endswith("_2of4")]
IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True, note="the default backend"),
    Implementation("dense", dense, note="torch's dense product"),
    Implementation("compiled", compiled, sizes=AT_2OF4, note="torch.compile of the dense product"),
]
if CUDA:
    note = "torch.sparse.to_sparse_semi_structured"
    IMPLEMENTATIONS += [
        Implementation("triton", packed, ours=True, backend="triton", note="Triton"),
        Implementation("semi_structured", semi_structured, sizes=AT_2OF4, note=note),
    ]
else:
    note = "torch.compile of the dense layer with its freezing, which packs the weight beforehand"
    IMPLEMENTATIONS.append(Implementation("compiled_packed", compiled_packed, sizes=AT_2OF4, note=note))


def targets():
    if CUDA:
        return []
    found = [
        Target(f"nm_matmul/{shape}_{pattern}/float32/forward", "dense", bar)
        for shape, bars in TARGETS.items()
        for pattern, bar in zip(WITH_TARGET, bars, strict=True)
    ]
    half = {"1of4": 1.3, "1of16": 4}
    return found + [Target(f"nm_matmul/b256_*_{p}/bfloat16/forward", "dense", bar) for p, bar in half.items()]


SUITE = Suite(
    operator="nm_matmul",
    sizes=SIZES,
    small=(5, 64, 32, 2, 4),
    dtypes=[torch.float16, torch.float32] if CUDA else [torch.float32],
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=dense,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["nm_matmul"],
    targets=targets(),
)

bench_nm_matmul = benchmark(SUITE)
bench_nm_matmul_bfloat16 = benchmark(
    dataclasses.replace(SUITE, sizes=SIZES_BFLOAT16, dtypes=[torch.bfloat16], targets=[])
)
