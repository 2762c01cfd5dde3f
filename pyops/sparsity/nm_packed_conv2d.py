"""Convolution with a packed N:M weight, for inference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._checks import as_int, check_floating, check_pair, check_window
from tersor._operator import operator
from tersor._window import check_fits, empty_output, is_channels_last, output_sizes
from tersor.sparsity.nm_crossover import dense_is_faster, notes
from tersor.sparsity.nm_matmul import ACTIVATIONS, check_operands
from tersor.sparsity.nm_pack import check_packed
from tersor.sparsity.nm_pattern import from_groups
from tersor.sparsity.nm_unpack import nm_unpack, unpack_rows


def nm_packed_conv2d(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    n: int,
    m: int,
    kernel_size: int | Sequence[int],
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """``conv2d`` with a packed N:M weight, and an activation in the same pass; rounding as for :func:`nm_matmul`.

    Args:
        input: ``(N, C, H, W)``; float16, bfloat16 or float32; any strides.
        values, index, n, m: from :func:`nm_pack`, for a weight ``(O, C / groups, KH, KW)`` of the input's dtype.
        kernel_size: ``(KH, KW)``, or one int for both.
        bias: ``(O,)``, of the input's dtype.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (the exact one).

    Returns:
        ``(N, O, H', W')`` in the input's dtype, in channels-last memory format if the input is in it, else
        contiguous. Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "nm_packed_conv2d"
    n, m = check_packed(name, values, index, n, m)
    kernel = check_pair(name, "kernel_size", kernel_size, 1)
    stride, padding, dilation = check_window(name, stride, padding, dilation)
    groups, taps = as_int(name, groups=groups), kernel[0] * kernel[1]
    outputs, row = values.shape[0], values.shape[1] * m
    if groups < 1 or outputs % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({outputs}), got {groups}")
    if row % (taps * m):
        raise ValueError(f"{name}: kernel_size must fit a row of {row} elements in groups of {m}, got {tuple(kernel)}")
    check_floating(name, input=input)
    channels = row // taps * groups
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"{name}: input must be (N, {channels}, H, W) for this weight, got shape {tuple(input.shape)}")
    check_operands(name, input, values, bias, activation)
    check_fits(name, input.shape, kernel, stride, padding, dilation)
    channels_last = is_channels_last(input)
    pixels = input.shape[0] * math.prod(output_sizes(input.shape, kernel, stride, padding, dilation))
    if dense_is_faster("convolution", input, n, m, pixels):
        format = torch.channels_last if channels_last else torch.contiguous_format
        weight = nm_unpack(values, index, n, m, kernel).contiguous(memory_format=format)
        output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return ACTIVATIONS[activation](output).contiguous(memory_format=format)
    window = (kernel, stride, padding, dilation)
    return _nm_packed_conv2d.overload(input, values, index, bias, n, m, *window, groups, activation, channels_last)


def _reference(
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
    height, width = kernel_size
    channels = input.shape[1] // groups
    weight = from_groups(unpack_rows(values, index, n, m).float(), (values.shape[0], channels, height, width))
    bias = None if bias is None else bias.float()
    output = ACTIVATIONS[activation](F.conv2d(input.float(), weight, bias, stride, padding, dilation, groups))
    return empty_output(input, output.shape, channels_last).copy_(output)


def _fake(input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, n: int, m: int, *args: Any) -> Tensor:
    *window, _, _, channels_last = args
    return empty_output(input, (input.shape[0], values.shape[0], *output_sizes(input.shape, *window)), channels_last)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [a.unbind(d) if isinstance(d, int) else [a] * info.batch_size for a, d in zip(args, in_dims, strict=True)]
    return torch.stack([_nm_packed_conv2d.overload(*each) for each in zip(*mapped, strict=True)]), 0


_nm_packed_conv2d = operator(
    "nm_packed_conv2d(Tensor input, Tensor values, Tensor index, Tensor? bias, int n, int m, int[] kernel_size,"
    " int[] stride, int[] padding, int[] dilation, int groups, str activation, bool channels_last) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    autocast=True,
    notes=notes("convolution"),
)
