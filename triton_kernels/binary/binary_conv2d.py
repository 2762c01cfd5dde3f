"""The training convolution of signs on GPUs: two launches that pack, one that convolves, and torch's way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor._window import is_channels_last, output_sizes
from tersor.binary.binary_packed_conv2d import _blocks
from tersor.triton_kernels.binary.binary_packed_conv2d import convolve
from tersor.triton_kernels.binary.pack_signs import pack_signs
from tersor.triton_kernels.binary.unpack_signs import unpack_signs


def binary_conv2d_forward(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::binary_conv2d_forward`` for float16, bfloat16 and float32.

    Whether a weight is zero is not known without waiting, hence both of its planes are read.
    """
    fits = input.dim() == 4 and weight.dim() == 4 and groups > 0 and weight.shape[0] % groups == 0
    if not fits or weight.shape[1] * groups != input.shape[1]:
        raise ValueError(
            f"binary_conv2d: input and weight must be (N, C, H, W) and (O, C / {groups}, KH, KW), "
            f"got shapes {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    window = (stride, padding, dilation)
    sizes = output_sizes(input.shape, weight.shape[2:], *window)
    if min(sizes) < 1:
        raise ValueError(f"binary_conv2d: input must be as large as the window, got shape {tuple(input.shape)}")
    shape = (input.shape[0], weight.shape[0], *sizes)
    input_signs, weight_signs = pack_signs(input, None, groups), pack_signs(weight, None, 1)
    blocks = _blocks(weight_signs.squeeze(4), groups)
    kernel = (weight.shape[0], *weight.shape[2:])
    end = (None, False, "none", None, input.dtype, is_channels_last(input))
    return convolve(input_signs, blocks, kernel, shape, window, *end), input_signs, weight_signs


def binary_conv2d_backward(
    grad_output: Tensor,
    input_signs: Tensor,
    weight_signs: Tensor,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::binary_conv2d_backward``: torch's convolution, of the unpacked signs."""
    dtype = grad_output.dtype
    input = unpack_signs(input_signs, channels, dtype, channels_last)
    weight = unpack_signs(weight_signs, channels // groups, dtype, channels_last)
    format = torch.channels_last if channels_last else torch.contiguous_format
    options = (None, stride, padding, dilation, False, [0, 0], groups, [need_input, need_weight, False])
    grads = torch.ops.aten.convolution_backward(grad_output.contiguous(memory_format=format), input, weight, *options)
    empty = grad_output.new_empty(0)
    grad_input = grads[0].contiguous(memory_format=format) if need_input else empty
    return grad_input, grads[1].contiguous() if need_weight else empty
