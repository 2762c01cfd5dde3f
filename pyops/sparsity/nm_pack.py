"""Packed N:M matrices: the values that are kept, and an index of where they stood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor.freezing.mask import check_mask, unpack_mask
from tersor.sparsity.nm_pattern import check_pattern, to_groups


def index_bits(n: int, m: int) -> int:
    """Bits that the index of one group takes: a place, two places of two bits each, or one bit for every place."""
    if n == 1:
        return 1 if m == 2 else 2 if m <= 4 else 4
    return 4 if m <= 4 else 8 if m <= 8 else 16


def index_size(groups: int, n: int, m: int) -> int:
    """Bytes of the index of a row of that many groups."""
    return (groups * index_bits(n, m) + 7) // 8


def nm_pack(weight: Tensor, mask: Tensor | None, n: int, m: int) -> tuple[Tensor, Tensor]:
    r"""Values and index of a weight of which at most n in every m consecutive elements are kept.

    A row is an output channel, in the order kernel row, kernel column, input channel. The index of a group is

    - for n = 1 the place of the kept element, in 1 bit (m = 2), 2 bits (m = 3, 4) or 4 bits (m = 5 to 16);
    - for 2 of 3 or 4 the two places, ``first | second << 2``, in 4 bits;
    - else a mask, bit p for place p, in 4 bits (m = 4), 8 bits (m = 5 to 8) or 16 bits (m = 9 to 16).

    Indices lie side by side from the lowest bit of a row's first byte on; every row begins with a new byte. Of a group
    with fewer than n kept elements zeros are kept too, at its lowest free places.

    Args:
        weight: ``(O, I)`` or ``(O, I, KH, KW)``; float16, bfloat16, float32 or float64.
        mask: which elements are kept: bool of the weight's shape, or packed as :func:`nm_remove_` returns it; None for
            those that are not zero.
        n, m: 1 <= n < m <= 16; m divides I.

    Returns:
        Values ``(O, K / m, n)`` with K = KH KW I, and the index, uint8 ``(O, bytes of a row)``.

    Raises:
        TypeError, ValueError: an argument is not as stated, or not finite; or a group has more than n kept elements.
    """
    name = "nm_pack"
    n, m = check_pattern(name, n, m, scored=False)
    check_floating(name, weight=weight)
    if weight.dim() not in (2, 4) or weight.shape[1] % m:
        raise ValueError(
            f"{name}: weight must be (O, I) or (O, I, KH, KW) with I a multiple of m = {m}, "
            f"got shape {tuple(weight.shape)}"
        )
    weight = weight.detach()
    if not weight.isfinite().all():
        raise ValueError(f"{name}: weight must be finite, got {int((~weight.isfinite()).sum())} elements that are not")
    outputs, row = weight.shape[0], math.prod(weight.shape[1:])
    groups = to_groups(weight, m).reshape(outputs, row // m, m)
    kept = _kept(name, mask, weight, groups, m)
    most = int(kept.sum(2).max()) if kept.numel() else 0
    if most > n:
        raise ValueError(f"{name}: at most {n} of every {m} elements must be kept, got a group with {most}")
    # Stable: kept places first, then the free ones, each ascending.
    places = torch.sort((~kept).to(torch.uint8), dim=2, stable=True).indices[..., :n].sort(dim=2).values
    values = torch.where(kept, groups, 0).gather(2, places)
    return values.contiguous(), _index(places, n, m)


def check_packed(where: str, values: Any, index: Any, n: int, m: int) -> tuple[int, int]:
    """``n`` and ``m`` as ints; raises unless values and index can be a packed matrix of that pattern."""
    n, m = check_pattern(where, n, m, scored=False)
    check_floating(where, values=values)
    if values.dim() != 3 or values.shape[2] != n:
        raise ValueError(f"{where}: values must be (O, K / m, n) with n = {n}, got shape {tuple(values.shape)}")
    if not isinstance(index, Tensor) or index.dtype != torch.uint8:
        given = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{where}: index must be a uint8 tensor as nm_pack returns it, got {given}")
    expected = (values.shape[0], index_size(values.shape[1], n, m))
    if tuple(index.shape) != expected:
        raise ValueError(
            f"{where}: index must have shape {expected} for values {tuple(values.shape)} and {n}:{m}, "
            f"got {tuple(index.shape)}"
        )
    if index.device != values.device:
        raise ValueError(f"{where}: index must be on the device of values {values.device}, got {index.device}")
    return n, m


def check_index(where: str, index: Tensor, groups: int, n: int, m: int) -> None:
    """Raises where an index of the right shape holds places that :func:`nm_pack` cannot have written."""
    codes = _codes(index, groups, n, m)
    if n == 1:
        wrong = codes >= m
    elif n == 2 and m <= 4:
        wrong = ((codes & 3) >= (codes >> 2)) | ((codes >> 2) >= m)
    else:
        wrong = (codes >= 1 << m) | ((codes[..., None] >> torch.arange(16, device=index.device) & 1).sum(-1) != n)
    if wrong.any():
        raise ValueError(f"{where}: {int(wrong.sum())} groups do not have {n} places below {m}")


def unpack_rows(values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    """:func:`nm_unpack` for checked arguments, as ``(O, K)``."""
    outputs, groups = values.shape[:2]
    # A damaged index may hold places beyond the group; they are dropped like the kernels drop them.
    wide = values.new_zeros(outputs, groups, 16)
    wide.scatter_(2, places_of(index, groups, n, m), values)
    return wide[..., :m].reshape(outputs, groups * m)


def _kept(where: str, mask: Tensor | None, weight: Tensor, groups: Tensor, m: int) -> Tensor:
    if mask is None:
        return groups != 0
    if isinstance(mask, Tensor) and mask.dtype == torch.uint8:
        check_mask(where, mask, weight.shape, weight.device)
        return unpack_mask(mask, groups.shape)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{where}: mask must be a bool tensor, or uint8 as nm_remove_ returns it, got {given}")
    if mask.shape != weight.shape or mask.device != weight.device:
        raise ValueError(
            f"{where}: mask must have the shape and device of weight {tuple(weight.shape)} on {weight.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    return to_groups(mask, m).reshape(groups.shape)


def _index(places: Tensor, n: int, m: int) -> Tensor:
    bits = index_bits(n, m)
    if n == 1:
        codes = places[..., 0]
    elif n == 2 and m <= 4:
        codes = places[..., 0] | places[..., 1] << 2
    else:
        codes = (1 << places).sum(2)
    if bits == 16:
        return torch.stack([codes & 255, codes >> 8], dim=2).to(torch.uint8).flatten(1)
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    return (codes << bits * torch.arange(per_byte, device=codes.device)).sum(2).to(torch.uint8)


def _codes(index: Tensor, groups: int, n: int, m: int) -> Tensor:
    """``(O, groups)``: the index of every group as a number."""
    bits, wide = index_bits(n, m), index.long()
    if bits == 16:
        return wide[:, ::2] | wide[:, 1::2] << 8
    shifts = bits * torch.arange(8 // bits, device=index.device)
    return (wide[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)[:, :groups]


def places_of(index: Tensor, groups: int, n: int, m: int) -> Tensor:
    """``(O, groups, n)``: the places of the kept elements, ascending."""
    codes = _codes(index, groups, n, m)
    if n == 1:
        return codes[..., None]
    if n == 2 and m <= 4:
        return torch.stack([codes & 3, codes >> 2], dim=2)
    free = 1 - (codes[..., None] >> torch.arange(16, device=index.device) & 1)
    return torch.sort(free, dim=2, stable=True).indices[..., :n]
