"""From bits back to a map of -1, 0 and 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import FLOATING
from tersor._operator import operator
from tersor.binary.pack_signs import WORD, PackedSigns, bits_of


def unpack_signs(signs: PackedSigns, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """The inverse of :func:`pack_signs`.

    Args:
        signs: from :func:`pack_signs`.
        dtype: float16, bfloat16, float32 or float64.
        channels_last: asks for that memory format.

    Returns:
        ``(N, C, H, W)``, of -1, 0 and 1.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    check_signs("unpack_signs", signs)
    if dtype not in FLOATING:
        raise TypeError(f"unpack_signs: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    return _unpack_signs.without_gradient(*signs, dtype, bool(channels_last))


def check_signs(where: str, signs: Any) -> None:
    """Raises unless these can be from :func:`pack_signs`."""
    if not isinstance(signs, PackedSigns):
        raise TypeError(f"{where}: signs must be PackedSigns, got {type(signs).__name__}")
    words, channels = signs
    if not isinstance(words, Tensor) or words.dtype != torch.int64:
        given = words.dtype if isinstance(words, Tensor) else type(words).__name__
        raise TypeError(f"{where}: the words of signs must be a tensor of int64, got {given}")
    fits = words.dim() == 6 and words.shape[0] == 2 and words.shape[4] > 0 and channels > 0
    if not fits or channels % words.shape[4] or words.shape[5] != -(-channels // words.shape[4] // WORD):
        raise ValueError(
            f"{where}: the words of signs must be (2, N, H, W, groups, ceil(C / groups / {WORD})) for C = {channels}, "
            f"got shape {tuple(words.shape)}"
        )


def _reference(signs: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    positive, nonzero = bits_of(signs, channels).unbind(0)
    map = torch.where(nonzero, 2 * positive.to(dtype) - 1, 0).permute(0, 3, 1, 2)
    return torch.empty_like(map, memory_format=_format(channels_last)).copy_(map)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _fake(signs: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    _, batch, height, width, _, _ = signs.shape
    shape = (batch, channels, height, width)
    return torch.empty(shape, dtype=dtype, device=signs.device, memory_format=_format(channels_last))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_unpack_signs.overload, info, in_dims, args)


_unpack_signs = operator(
    "unpack_signs(Tensor signs, SymInt channels, ScalarType dtype, bool channels_last) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
