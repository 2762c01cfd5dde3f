"""Convolution with a packed N:M weight on GPUs: the matrix product where it is one, else torch's with a dense weight.

Of a window of one position at stride 1 the pixels of a channels-last input are the rows of a matrix, and nothing is
copied or expanded in memory. For any other the weight is expanded by one launch, and the library of convolutions runs:
a product with a packed weight would save bytes and no multiplications. It rounds before the activation, and once more.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tersor._window import empty_output, is_channels_last
from tersor.sparsity.nm_matmul import ACTIVATIONS, DTYPES, check_activation
from tersor.sparsity.nm_pack import check_packed
from tersor.sparsity.nm_pattern import from_groups
from tersor.triton_kernels.quantization._fake_quantize import Case
from tersor.triton_kernels.sparsity.nm_matmul import OPTIONS, _columns, _expand, _few_tile, _load_packed, nm_matmul


@triton.jit(do_not_specialize=["outputs", "groups", "index_row"])
def _unpack_kernel(
    values, index, weight, outputs, groups, index_row, VECTOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    begin = tl.program_id(1) * GROUPS
    groups = groups // VECTOR[0] * VECTOR[0]  # which tells the compiler what divides it
    index_row = index_row // VECTOR[1] * VECTOR[1]
    kept, bytes = _load_packed(values, index, output, begin, outputs, groups, index_row, N, BITS, GROUPS)
    column, present = _columns(begin, groups, M, WIDTH, GROUPS)
    place = weight + (output * groups * M)[:, None] + column[None, :]
    elements = _expand(kept, bytes, N, M, WIDTH, BITS, GROUPS)
    tl.store(place, elements, mask=(output < outputs)[:, None] & present[None, :])


def nm_packed_conv2d(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    channels_last: bool,
) -> Tensor:
    """The operator ``tersor::nm_packed_conv2d`` for float16, bfloat16 and float32."""
    name = "nm_packed_conv2d"
    n, m = check_packed(name, values, index, n, m)
    if input.dim() != 4 or input.dtype not in DTYPES or values.dtype != input.dtype:
        given = f"{input.dtype} {tuple(input.shape)} and {values.dtype}"
        raise TypeError(f"{name}: input (N, C, H, W) and values must both be float16, bfloat16 or float32, got {given}")
    shape = values.shape[0], input.shape[1] // groups, *kernel_size
    if math.prod(shape[1:]) != values.shape[1] * m:
        raise ValueError(f"{name}: values must be those of a weight {shape}, got shape {tuple(values.shape)}")
    check_activation(name, activation)
    one = (*kernel_size, *stride, groups) == (1, 1, 1, 1, 1) and not any(padding)
    if one and (channels_last or is_channels_last(input)):
        rows = nm_matmul(input.permute(0, 2, 3, 1), values, index, bias, n, m, activation)
        output = rows.permute(0, 3, 1, 2)
    else:
        weight = _unpacked(values, index, shape, n, m)
        output = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    # Torch's convolution chooses a format of its own.
    return _in_format(input, output, channels_last)


def _in_format(input: Tensor, output: Tensor, channels_last: bool) -> Tensor:
    """The output with the strides that the operator promises; itself if it has them."""
    promised = empty_output(input, output.shape, channels_last)
    return output if output.stride() == promised.stride() else promised.copy_(output)


def _unpacked(values: Tensor, index: Tensor, shape: Sequence[int], n: int, m: int) -> Tensor:
    """The dense weight, in channels-last memory format."""
    outputs, groups = values.shape[:2]
    weight = values.new_empty(outputs, groups * m)
    if weight.numel():
        tile = _tile(n, m, values.element_size())
        vector = math.gcd(16, groups), math.gcd(16, index.shape[1])
        grid = triton.cdiv(outputs, tile["OUTPUTS"]), triton.cdiv(groups, tile["GROUPS"])
        tensors = values.contiguous(), index.contiguous(), weight
        with torch.cuda.device_of(values):
            _unpack_kernel[grid](*tensors, outputs, groups, index.shape[1], vector, **tile, **OPTIONS)
    return from_groups(weight, shape)


def _tile(n: int, m: int, itemsize: int) -> dict[str, int]:
    tile = _few_tile(1, n, m, itemsize)
    return {name: size for name, size in tile.items() if name != "ROWS"}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        types = {"values": f"*{name}:16", "weight": f"*{name}:16", "index": "*u8:16"}
        for n, m in ((2, 4), (1, 4), (4, 8), (1, 16)):
            constants = {"VECTOR": (16, 16)} | _tile(n, m, itemsize)
            signature = {a: types.get(a, "i32") for a in _unpack_kernel.arg_names if a not in constants}
            yield _unpack_kernel, f"{n}:{m} {name}", signature, constants, OPTIONS
