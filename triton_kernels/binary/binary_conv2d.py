"""The training convolution of signs on GPUs: two launches that pack, one that convolves, and torch's way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor._window import is_channels_last, output_sizes
from tersor.binary.binary_conv2d import convolution_gradients
from tersor.binary.binary_packed_conv2d import _blocks
from tersor.triton_kernels.binary.binary_packed_conv2d import convolve
from tersor.triton_kernels.binary.pack_signs import pack_signs
from tersor.triton_kernels.binary.unpack_signs import unpack_signs


def binary_conv2d_forward(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
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
    rows = None
    if scale is not None:
        rows = torch.zeros(7, weight.shape[0], device=input.device)
        rows[0], rows[2] = scale, 1
    end = (rows, False, "none", None, input.dtype, is_channels_last(input))
    return convolve(input_signs, blocks, kernel, shape, window, *end), input_signs, weight_signs


def binary_conv2d_backward(
    grad_output: Tensor,
    input_signs: Tensor,
    weight_signs: Tensor,
    scale: Tensor | None,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::binary_conv2d_backward``: torch's convolution, of the unpacked signs."""
    dtype = grad_output.dtype
    input = unpack_signs(input_signs, channels, dtype, channels_last)
    weight = unpack_signs(weight_signs, channels // groups, dtype, channels_last)
    window, needs = (stride, padding, dilation), (need_input, need_weight, need_scale)
    return convolution_gradients(grad_output, input, weight, scale, window, groups, channels_last, needs)
