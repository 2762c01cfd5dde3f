"""Masks of frozen weights, one bit each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mask_size(shape: Sequence[int]) -> int:
    """Bytes of the mask of a weight of that shape."""
    return -(-math.prod(shape) // 8)


def pack_mask(mask: Tensor) -> Tensor:
    """One bit per element: element i in row-major order lies in byte ``i // 8`` at bit ``i % 8``.

    Args:
        mask: bool, any shape; True where frozen.

    Returns:
        uint8, of shape ``(mask_size(mask.shape),)``; bits after the last element are 0.

    Raises:
        TypeError: ``mask`` is not a bool tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"pack_mask: mask must be a bool tensor, got {given}")
    flat = mask.reshape(-1).to(torch.uint8)
    eights = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    return (eights << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(frozen: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of the given shape that :func:`pack_mask` packed.

    Raises:
        TypeError, ValueError: ``frozen`` is not uint8 of shape ``(mask_size(shape),)``.
    """
    check_mask("unpack_mask", frozen, shape)
    bits = (frozen[:, None] >> torch.arange(8, dtype=torch.uint8, device=frozen.device)) & 1
    return bits.reshape(-1)[: math.prod(shape)].view(tuple(shape)).bool()


def check_mask(where: str, frozen: Any, shape: Sequence[int], device: torch.device | None = None) -> None:
    """Raises unless ``frozen`` can be the packed mask of a weight of that shape."""
    if not isinstance(frozen, Tensor) or frozen.dtype != torch.uint8:
        given = frozen.dtype if isinstance(frozen, Tensor) else type(frozen).__name__
        raise TypeError(f"{where}: frozen must be a uint8 tensor as pack_mask returns it, got {given}")
    if frozen.dim() != 1 or frozen.shape[0] != mask_size(shape):
        raise ValueError(
            f"{where}: frozen must have shape ({mask_size(shape)},), one bit for each element of the weight "
            f"{tuple(shape)}, got {tuple(frozen.shape)}"
        )
    if device is not None and frozen.device != device:
        raise ValueError(f"{where}: frozen must be on the device of the weight {device}, got {frozen.device}")
