"""Bilinear resizing between corner pixels, as the papers' training code does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._checks import check_floating, check_pair


def resize_align_corners(images: Tensor, size: int | Sequence[int]) -> Tensor:
    r"""Bilinear interpolation whose corner pixels stay in place, with coordinates in float32 for every dtype.

    .. math:: y[t] = (1 - w)\, x[i] + w\, x[\min(i + 1, n - 1)], \quad u = t\, \frac{n - 1}{m - 1}, \quad
        i = \lfloor u \rfloor, \quad w = u - i

    along rows and columns, from n to m pixels. Double coordinates would move pixels of unit variance by up to 2e-4.

    Args:
        images: ``(B, C, H, W)``, float16, bfloat16, float32 or float64; H and W of at least 1.
        size: pixels of the result, one int for both sides or (height, width).

    Returns:
        ``(B, C, height, width)``. Differentiable.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: the shape or ``size`` does not fit.

    Source: the resizing in CF-ViT, arXiv 2203.03821, and SuperViT, arXiv 2205.11397.
    """
    name = "resize_align_corners"
    check_floating(name, images=images)
    if images.dim() != 4 or min(images.shape[1:]) < 1:
        raise ValueError(f"{name}: images must be (B, C, H, W), got shape {tuple(images.shape)}")
    height, width = check_pair(name, "size", size, 1)
    if tuple(images.shape[2:]) == (height, width):
        return images
    if images.dtype != torch.float64:  # torch's own coordinates are float32 then
        return F.interpolate(images, (height, width), mode="bilinear", align_corners=True)
    return _along(_along(images, 3, width), 2, height)


def _along(images: Tensor, dim: int, size: int) -> Tensor:
    length = images.shape[dim]
    step = torch.tensor(length - 1, dtype=torch.float32) / torch.tensor(max(1, size - 1), dtype=torch.float32)
    place = torch.arange(size, dtype=torch.float32) * (step if size > 1 else 0)
    low = place.long().clamp(max=length - 1)
    share = (place - low).to(images).view([-1 if d == dim else 1 for d in range(4)])
    low = low.to(images.device)
    first, second = (images.index_select(dim, i) for i in (low, (low + 1).clamp(max=length - 1)))
    return (1 - share) * first + share * second
