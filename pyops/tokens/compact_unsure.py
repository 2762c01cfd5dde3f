"""Batched early exit: the images whose prediction is not sure enough, gathered without waiting for a GPU (CF-ViT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import as_int, check_floating, check_share
from tersor._operator import operator


def compact_unsure(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""Orders a batch so that the images that need a second look come first.

    An image is unsure where :math:`\max_c \mathrm{softmax}(\mathrm{logits})_c < \mathrm{threshold}`, in float32 and
    strictly. Sizes do not depend on the values, so nothing is waited for; ``index[: bucket_size(int(count), B)]`` are
    the unsure images and a few more, whose second results are not used.

    Args:
        logits: ``(B, classes)``, float16, bfloat16, float32 or float64; classes of at least 1.
        threshold: from 0 to 1.

    Returns:
        ``(B,)`` int64: the unsure images in ascending order, then the others in ascending order; and ``(1,)`` int64:
        how many are unsure. An image with a NaN logit counts as unsure.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: the shape or the threshold does not fit.

    Source: Chen et al., "CF-ViT", arXiv 2203.03821.
    """
    name = "compact_unsure"
    check_floating(name, logits=logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"{name}: logits must be (B, classes), got shape {tuple(logits.shape)}")
    check_share(name, threshold=threshold)
    return _compact.without_gradient(logits.detach(), float(threshold))


def bucket_size(count: int, batch: int, multiple: int = 32) -> int:
    """``count`` rounded up to the multiple, at most ``batch``: few sizes, for captured graphs and compiled code.

    Raises:
        TypeError, ValueError: ``count`` is not an int from 0 to ``batch``, or ``multiple`` is not at least 1.
    """
    name = "bucket_size"
    count, batch, multiple = as_int(name, count=count), as_int(name, batch=batch), as_int(name, multiple=multiple)
    if not 0 <= count <= batch:
        raise ValueError(f"{name}: count must be from 0 to {batch}, got {count}")
    if multiple < 1:
        raise ValueError(f"{name}: multiple must be at least 1, got {multiple}")
    return min(batch, -(-count // multiple) * multiple)


def _reference(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    sure = torch.softmax(logits.float(), 1).amax(1) >= threshold
    order = torch.argsort(sure.to(torch.uint8), stable=True)
    return order, (~sure).sum().view(1)


def _fake(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0], dtype=torch.int64), logits.new_empty(1, dtype=torch.int64)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_compact.overload, info, in_dims, args)


_compact = operator(
    "compact_unsure(Tensor logits, float threshold) -> (Tensor index, Tensor count)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
