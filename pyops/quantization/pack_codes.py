"""Codes of 1 to 8 bits, side by side in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor._checks import as_int

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in as few bytes as they take: code i lies at bit ``i * bits`` of the result, lowest bits first.

    Args:
        codes: any shape, of whole numbers from 0 to ``2**bits - 1``.
        bits: 1 to 8.

    Returns:
        uint8, of shape ``(packed_size(codes.numel(), bits),)``; bits after the last code are 0.

    Raises:
        TypeError: ``codes`` is not a tensor of whole numbers, or ``bits`` not an int.
        ValueError: a code or ``bits`` is out of range.
    """
    name = "pack_codes"
    bits = _check_bits(name, bits)
    if not isinstance(codes, Tensor) or codes.dtype not in _WHOLE:
        given = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"{name}: codes must be a tensor of uint8, int8, int16, int32 or int64, got {given}")
    flat = codes.detach().flatten().long()
    if flat.numel() and not 0 <= flat.min() <= flat.max() < 2**bits:
        raise ValueError(
            f"{name}: codes must lie from 0 to {2**bits - 1} for bits {bits}, got {flat.min()} to {flat.max()}"
        )
    size = packed_size(flat.numel(), bits)
    eights = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)  # they fill `bits` whole bytes
    words = (eights << bits * torch.arange(8, device=flat.device)).sum(1)
    parts = words[:, None] >> 8 * torch.arange(bits, device=flat.device)
    return (parts & 255).to(torch.uint8).flatten()[:size]


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that :func:`pack_codes` packed.

    Args:
        packed: uint8, of shape ``(packed_size(elements of shape, bits),)``.
        bits: 1 to 8.
        shape: of the codes.

    Returns:
        uint8, of the given shape.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: ``bits`` is out of range, or ``packed`` has another size.
    """
    name = "unpack_codes"
    bits = _check_bits(name, bits)
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        given = packed.dtype if isinstance(packed, Tensor) else type(packed).__name__
        raise TypeError(f"{name}: packed must be a tensor of uint8, got {given}")
    shape = tuple(as_int(name, shape=size) for size in shape)
    count = math.prod(shape)
    if min(shape, default=1) < 0 or tuple(packed.shape) != (packed_size(count, bits),):
        raise ValueError(
            f"{name}: packed must have shape {(packed_size(max(count, 0), bits),)} for codes of shape {shape} and bits "
            f"{bits}, got {tuple(packed.shape)}"
        )
    whole = torch.cat([packed, packed.new_zeros(-packed.numel() % bits)]).view(-1, bits).long()
    words = (whole << 8 * torch.arange(bits, device=packed.device)).sum(1)
    parts = words[:, None] >> bits * torch.arange(8, device=packed.device)
    return (parts & (2**bits - 1)).to(torch.uint8).flatten()[:count].reshape(shape)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return (count * bits + 7) // 8


def _check_bits(where: str, bits: int) -> int:
    bits = as_int(where, bits=bits)
    if not 1 <= bits <= 8:
        raise ValueError(f"{where}: bits must be 1 to 8, got {bits}")
    return bits
