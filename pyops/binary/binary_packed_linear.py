"""A linear layer of signs, with the packing of its input and what follows in one call, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import check_floating
from tersor._operator import operator
from tersor.binary.binary_packed_conv2d import DTYPES, PackedBinaryWeight, _binary_packed_conv2d
from tersor.binary.pack_signs import _pack_signs


def binary_packed_linear(input: Tensor, weight: PackedBinaryWeight, affine: Tensor | None = None) -> Tensor:
    r"""The product of the signs of the input and of a weight, in whole numbers, times a factor and plus an addend.

    .. math:: output_{n o} = scale_o \sum_c \mathrm{sign}(input_{n c})\, \mathrm{sign}(weight_{o c}) + shift_o

    The sums are exact, the product and the addition are float32's, and the result is rounded to the input's dtype. It
    is :func:`binary_packed_conv2d` of :func:`pack_signs` for rows in place of maps, in one operator. NaN counts as 0.

    Args:
        input: ``(..., C)``; float16, bfloat16 or float32; any strides.
        weight: from :func:`pack_binary_weight` of a weight ``(O, C, 1, 1)``.
        affine: scale and shift, float32 ``(2, O)``; None for the whole numbers alone.

    Returns:
        ``(..., O)`` of the input's dtype, contiguous. Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "binary_packed_linear"
    if not isinstance(weight, PackedBinaryWeight):
        raise TypeError(f"{name}: weight must be a PackedBinaryWeight, got {type(weight).__name__}")
    _, groups, _, *kernel, _, _ = weight.blocks.shape
    if groups != 1 or kernel != [1, 1]:
        raise ValueError(
            f"{name}: weight must be packed from (O, C, 1, 1) in one group, got a kernel of {tuple(kernel)} in {groups}"
        )
    if affine is not None:
        _check_affine(name, affine, weight)
    return multiply(name, input, weight, affine)


def multiply(where: str, input: Tensor, weight: PackedBinaryWeight, affine: Tensor | None) -> Tensor:
    """:func:`binary_packed_linear` of a weight and an affine that have been checked."""
    check_floating(where, input=input)
    if input.dtype not in DTYPES:
        raise TypeError(f"{where}: input must be float16, bfloat16 or float32, got {input.dtype}")
    blocks, sums, channels = weight
    if not input.dim() or input.shape[-1] != channels:
        raise ValueError(f"{where}: input must be (..., {channels}), got shape {tuple(input.shape)}")
    if blocks.device != input.device:
        raise ValueError(f"{where}: input must be on the device of weight {blocks.device}, got {input.device}")
    return _binary_packed_linear.inference(input, blocks, sums, affine)


def _check_affine(where: str, affine: Any, weight: PackedBinaryWeight) -> None:
    if not isinstance(affine, Tensor):
        raise TypeError(f"{where}: affine must be a torch.Tensor, got {type(affine).__name__}")
    shape, device = (2, weight.sums.shape[0]), weight.blocks.device
    if affine.dtype != torch.float32 or affine.shape != shape:
        raise ValueError(
            f"{where}: affine must be torch.float32 of shape {shape}, got {affine.dtype} of shape {tuple(affine.shape)}"
        )
    if affine.device != device:
        raise ValueError(f"{where}: affine must be on the device of weight {device}, got {affine.device}")


def _reference(input: Tensor, weight: Tensor, weight_sums: Tensor, affine: Tensor | None) -> Tensor:
    """By the two operators that it joins: where they have kernels, these run."""
    outputs, channels = weight_sums.shape[0], input.shape[-1]
    signs = _pack_signs.overload(input.reshape(-1, channels, 1, 1), None, 1)
    window = ([1, 1], [0, 0], [1, 1])
    end = (None, False, "none", None, torch.float32, False)
    y = _binary_packed_conv2d.overload(signs, weight, weight_sums, channels, *window, *end).flatten(1)
    if affine is not None:
        y = affine[0] * y + affine[1]
    return y.to(input.dtype).reshape(*input.shape[:-1], outputs)


def _fake(input: Tensor, weight: Tensor, weight_sums: Tensor, affine: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight_sums.shape[0]))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_binary_packed_linear.overload, info, in_dims, args)


_binary_packed_linear = operator(
    "binary_packed_linear(Tensor input, Tensor weight, Tensor weight_sums, Tensor? affine) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
