"""A convolution with a packed N:M weight, against torch's dense one with the same weight and its zeros; inference.

The layers are ResNet-50's at 14 x 14, channels-last. Weights are packed before anything is timed, the dense one too
where the peer can (`compiled_packed`). The dense peers pay no heed to zeros, so those that take long to compile run at
2:4 only. FLOPs are those of the kept weights.
"""

import settings
import torch
import torch._inductor.config
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target
from torch import nn

from tersor.sparsity import nm_pack, nm_packed_conv2d, srste_sparsify
from tersor.sparsity.nm_pack import index_size

CUDA = settings.device() == "cuda"
PATTERNS = {"2of4": (2, 4), "1of4": (1, 4), "1of16": (1, 16)}
LAYERS = {f"3x3_b{batch}": (batch, 256, 256, 14, 3) for batch in (1, 8, 32)} | {"1x1_b8": (8, 1024, 256, 14, 1)}
SIZES = {f"{layer}_{p}": (*shape, *pattern) for layer, shape in LAYERS.items() for p, pattern in PATTERNS.items()}
if settings.QUICK:
    SIZES = {"3x3_b2_2of4": (2, 32, 32, 6, 3, 2, 4)}


def make_inputs(size, dtype, device, generator):
    batch, channels, outputs, side, kernel, n, m = size
    input = torch.randn(batch, channels, side, side, generator=generator)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator) / (channels * kernel**2) ** 0.5
    tensors = (input, srste_sparsify(weight, n, m))
    return tuple(t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in tensors)


def traffic(size, element_bytes, direction):
    """Values, index and input read, the output written; a multiply-add per kept weight and output pixel."""
    batch, channels, outputs, side, kernel, n, m = size
    row, pixels = channels * kernel**2, batch * side**2
    kept = outputs * row * n // m
    numbers = kept + pixels * (channels + outputs)
    return numbers * element_bytes + outputs * index_size(row // m, n, m), 2 * pixels * kept


def packed(size):
    *_, kernel, n, m = size

    def build(input, weight):
        values, index = nm_pack(weight, None, n, m)
        return lambda: nm_packed_conv2d(input, values, index, n, m, kernel, padding=kernel // 2)

    return build


def dense(size):
    return lambda input, weight: lambda: F.conv2d(input, weight, padding=size[4] // 2)


def compiled(size):
    def build(input, weight):
        product = torch.compile(lambda x, w: F.conv2d(x, w, padding=size[4] // 2), dynamic=False, fullgraph=True)
        return lambda: product(input, weight)

    return build


def compiled_packed(size):
    _, channels, outputs, _, kernel, _, _ = size

    def build(input, weight):
        options = {"device": input.device, "dtype": input.dtype}
        layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, bias=False, **options)
        layer = layer.requires_grad_(False).eval().to(memory_format=torch.channels_last)
        layer.weight.copy_(weight)
        product = torch.compile(layer, dynamic=False, fullgraph=True)
        with torch._inductor.config.patch(freezing=True):  # as an option of torch.compile it would do nothing
            product(input)
        return lambda: product(input)

    return build


def prepare(build, inputs, dtype, direction):
    """What ``build`` does with input and weight is not timed; what it returns computes the convolution."""
    with torch.no_grad():
        product = build(*inputs)

    def call():
        with torch.no_grad():
            return product()

    return Prepared(call, lambda: {"output": call()})


AT_2OF4 = [name for name in SIZES if name.endswith("_2of4")]
IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True, note="the default backend"),
    Implementation("dense", dense, note="torch's dense convolution"),
    Implementation("compiled", compiled, sizes=AT_2OF4, note="torch.compile of the dense convolution"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", packed, ours=True, backend="triton", note="Triton"))
else:
    note = "torch.compile of the dense layer with its freezing, which packs the weight beforehand"
    IMPLEMENTATIONS.append(Implementation("compiled_packed", compiled_packed, sizes=AT_2OF4, note=note))

BARS = {} if CUDA else {"2of4": 1.5, "1of4": 2.5}

SUITE = Suite(
    operator="nm_packed_conv2d",
    sizes=SIZES,
    small=(2, 16, 12, 5, 3, 2, 4),
    dtypes=[torch.float16, torch.float32] if CUDA else [torch.float32],
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=dense,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["nm_packed_conv2d"],
    targets=[Target(f"nm_packed_conv2d/3x3_*_{p}/float32/forward", "dense", bar) for p, bar in BARS.items()],
)

bench_nm_packed_conv2d = benchmark(SUITE)
