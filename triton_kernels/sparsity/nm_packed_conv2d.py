"""Convolution with a packed N:M weight on GPUs: the matrix product where it is one, else torch's with a dense weight.

Of a window of one position at stride 1 the pixels of a channels-last input are the rows of a matrix, and nothing is
copied or expanded in memory. For any other the weight is expanded by one launch, and the library of convolutions runs:
a product with a packed weight would save bytes and no multiplications. It rounds before the activation, and once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tersor._window import empty_output, is_channels_last
from tersor.sparsity.nm_matmul import ACTIVATIONS, DTYPES, check_activation
from tersor.sparsity.nm_pack import check_packed
from tersor.sparsity.nm_pattern import from_groups
from tersor.triton_kernels.sparsity.nm_matmul import nm_matmul
from tersor.triton_kernels.sparsity.nm_unpack import nm_unpack


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
        weight = from_groups(nm_unpack(values, index, n, m), shape)
        output = ACTIVATIONS[activation](F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    # Torch's convolution chooses a format of its own.
    return _in_format(input, output, channels_last)


def _in_format(input: Tensor, output: Tensor, channels_last: bool) -> Tensor:
    """The output with the strides that the operator promises; itself if it has them."""
    promised = empty_output(input, output.shape, channels_last)
    return output if output.stride() == promised.stride() else promised.copy_(output)
