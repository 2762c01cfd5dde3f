"""Products of packed signs, of convolutions and of linear layers, against torch's float32 ones with the same signs.

`tersor` takes floats and packs their signs first, which is one operator in a linear layer; `tersor_bits` takes bits,
`tersor_signs` takes and gives bits. Weights are packed before anything is timed, the dense one too where the peer can
(`compiled_packed`). FLOPs are those of the dense product.
"""

import settings
import torch
import torch._inductor.config
import torch.nn.functional as F
from suite import Implementation, Prepared, Suite, Target
from torch import nn

from tersor.binary import (
    binary_packed_conv2d,
    binary_packed_conv2d_signs,
    binary_packed_linear,
    pack_binary_weight,
    pack_signs,
    unpack_signs,
)

CUDA = settings.device() == "cuda"


def make_inputs(size, dtype, device, generator):
    batch, channels, outputs, side, kernel = size
    if side == 1:  # a linear layer
        shapes = (batch, channels), (outputs, channels)
        return tuple(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    input = torch.randn(batch, channels, side, side, generator=generator)
    weight = torch.randn(outputs, channels, kernel, kernel, generator=generator)
    return tuple(t.to(device, dtype).contiguous(memory_format=torch.channels_last) for t in (input, weight))


def traffic(size, element_bytes, direction):
    """The map read and written, a bit per weight read; a multiply-add per weight and output pixel."""
    batch, channels, outputs, side, kernel = size
    pixels, weights = batch * side**2, channels * outputs * kernel**2
    return pixels * (channels + outputs) * element_bytes + weights // 8, 2 * pixels * weights


def as_map(tensor):
    return tensor if tensor.dim() == 4 else tensor[:, :, None, None]


def packed(size):
    def build(input, weight):
        blocks = pack_binary_weight(as_map(weight))
        if size[3] == 1:
            return lambda: binary_packed_linear(input, blocks)
        return lambda: binary_packed_conv2d(pack_signs(input), blocks, padding=size[4] // 2)

    return build


def from_bits(size):
    def build(input, weight):
        signs, blocks = pack_signs(as_map(input)), pack_binary_weight(as_map(weight))
        return lambda: binary_packed_conv2d(signs, blocks, padding=size[4] // 2)

    return build


def to_bits(size):
    def build(input, weight):
        signs, blocks = pack_signs(as_map(input)), pack_binary_weight(as_map(weight))
        thresholds = torch.zeros(3, size[2], dtype=torch.int32, device=input.device)
        thresholds[0] = 1
        return lambda: binary_packed_conv2d_signs(signs, blocks, thresholds, padding=size[4] // 2)

    return build


def product(size):
    if size[3] == 1:
        return F.linear
    return lambda x, w: F.conv2d(x, w, padding=size[4] // 2)


def dense(size):
    def build(input, weight):
        multiply, input, weight = product(size), torch.sign(input), torch.sign(weight)
        return lambda: multiply(input, weight)

    return build


def compiled_packed(size):
    _, channels, outputs, side, kernel = size

    def build(input, weight):
        options = {"device": input.device, "dtype": input.dtype, "bias": False}
        if side == 1:
            layer = nn.Linear(channels, outputs, **options)
        else:
            layer = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, **options)
            layer = layer.to(memory_format=torch.channels_last)
        layer = layer.requires_grad_(False).eval()
        layer.weight.copy_(torch.sign(weight))
        input = torch.sign(input)
        call = torch.compile(layer, dynamic=False, fullgraph=True)
        with torch._inductor.config.patch(freezing=True):  # as an option of torch.compile it would do nothing
            call(input)
        return lambda: call(input)

    return build


def prepare(build, inputs, dtype, direction):
    """What ``build`` does with input and weight is not timed; what it returns computes the product. Nothing requires a
    gradient, so that there is none to turn off."""
    inputs = [t.detach() for t in inputs]
    with torch.no_grad():
        call = build(*(t.float() if t.dtype == torch.float64 else t for t in inputs))  # whole numbers, exact

    def results():
        output = call()
        output = output if isinstance(output, torch.Tensor) else unpack_signs(output)
        return {"output": output.flatten(1) if inputs[0].dim() == 2 else output}

    return Prepared(call, results)


IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True, note="from a float map, whose signs are packed first"),
    Implementation("tersor_bits", from_bits, ours=True, note="from bits"),
    Implementation("tersor_signs", to_bits, ours=True, compared=False, note="from bits to bits"),
    Implementation("dense", dense, note="torch's float32 layer of the signs"),
]
if CUDA:
    IMPLEMENTATIONS.append(
        Implementation("triton", packed, ours=True, backend="triton", note="Triton, from a float map")
    )
else:
    note = "torch.compile of the dense layer with its freezing, which packs the weight beforehand"
    IMPLEMENTATIONS.append(Implementation("compiled_packed", compiled_packed, note=note))


def suite(operator, sizes, small, names, bar, first):
    return Suite(
        operator=operator,
        sizes=sizes,
        small=small,
        dtypes=[torch.float16, torch.float32] if CUDA else [torch.float32],
        directions=["forward"],
        make_inputs=make_inputs,
        traffic=traffic,
        reference=dense,
        prepare=prepare,
        implementations=IMPLEMENTATIONS,
        operators=[*first, "pack_signs", "binary_packed_conv2d", "binary_packed_conv2d_signs"],
        targets=[] if CUDA else [Target(f"{operator}/{name}/float32/forward", "dense", bar) for name in names],
    )
