"""The signs of a map as bits, 64 channels to a word."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import as_int, check_floating
from tersor._operator import operator

WORD = 64  # channels


class PackedSigns(NamedTuple):
    """Signs of a map ``(N, C, H, W)`` as two bits each.

    Attributes:
        words: int64 ``(2, N, H, W, groups, ceil(C / groups / 64))``; channel c of a group is bit ``c % 64`` of word
            ``c // 64``. In the first plane a bit is set for a positive number, in the second for one that is not zero.
            Bits beyond the channels are 0.
        channels: C.
    """

    words: Tensor
    channels: int


def pack_signs(input: Tensor, shift: Tensor | None = None, groups: int = 1) -> PackedSigns:
    """The signs of ``input + shift`` as :class:`PackedSigns`; NaN counts as 0.

    Args:
        input: ``(N, C, H, W)``; float16, bfloat16, float32 or float64; any strides.
        shift: ``(C,)``, of the input's dtype; None for none.
        groups: of the convolution that takes them; divides C.

    Returns:
        Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "pack_signs"
    check_floating(name, input=input)
    if input.dim() != 4 or not input.shape[1]:
        raise ValueError(f"{name}: input must be (N, C, H, W) with C of at least 1, got shape {tuple(input.shape)}")
    groups, channels = as_int(name, groups=groups), input.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{name}: groups must divide the channels ({channels}), got {groups}")
    if shift is not None:
        check_floating(name, shift=shift)
        if shift.shape != (channels,) or shift.dtype != input.dtype:
            raise ValueError(
                f"{name}: shift must be {input.dtype} of shape ({channels},), got {shift.dtype} of shape "
                f"{tuple(shift.shape)}"
            )
        if shift.device != input.device:
            raise ValueError(f"{name}: shift must be on the device of input {input.device}, got {shift.device}")
    return PackedSigns(_pack_signs.without_gradient(input.detach(), shift, groups), channels)


def words_of(bits: Tensor, groups: int) -> Tensor:
    """Bits ``(..., C)`` of bool as words ``(..., groups, ceil(C / groups / 64))``."""
    bits = bits.unflatten(-1, (groups, -1))
    bits = F.pad(bits.to(torch.int64), (0, -bits.shape[-1] % WORD)).unflatten(-1, (-1, WORD))
    return (bits << torch.arange(WORD, device=bits.device)).sum(-1)


def bits_of(words: Tensor, channels: int) -> Tensor:
    """The inverse of :func:`words_of`."""
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten(-2)[..., : channels // words.shape[-2]].flatten(-2).bool()


def _reference(input: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    x = input.permute(0, 2, 3, 1)
    x = x if shift is None else x + shift
    return torch.stack([words_of(x > 0, groups), words_of((x > 0) | (x < 0), groups)])


def _fake(input: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    batch, channels, height, width = input.shape
    words = (channels // groups + WORD - 1) // WORD
    return input.new_empty((2, batch, height, width, groups, words), dtype=torch.int64)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_pack_signs.overload, info, in_dims, args)


_pack_signs = operator(
    "pack_signs(Tensor input, Tensor? shift, SymInt groups) -> Tensor signs",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
