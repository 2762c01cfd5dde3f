"""Removal of the lowest scores of every group (LBC)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._checks import as_int
from tersor._operator import operator
from tersor.freezing.mask import pack_mask
from tersor.sparsity.nm_pattern import check_pattern
from tersor.sparsity.nm_sparsify import alive_mask, check_scores

DEAD = -1000.0  # what an exact zero becomes before the k smallest are set to zero


def nm_remove_(scores: Tensor, k: int, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    """Sets the k smallest scores of each group to zero, in place: exact zeros count as the smallest.

    Run it at the start of every training iteration, before the forward pass. Of equal scores the one with the lower
    index goes first. Where more than k scores are zero already, those beyond the first k become -1000: they are alive
    again, as published, and so are all zeros for k = 0.

    Args:
        scores: ``(G, binom(m, n))``, or fewer columns if compact; contiguous; float32 or float64.
        k: of these columns, 0 to all but one.
        n, m, combinations: as for :func:`nm_sparsify`.

    Returns:
        The packed mask of the positions that are still kept, for :func:`nm_sparsify`.

    Raises:
        TypeError, ValueError: an argument is not as stated; or, on the CPU, a score is NaN.

    Source: Zhang et al., arXiv 2206.06662.
    """
    name = "nm_remove_"
    n, m = check_pattern(name, n, m)
    check_scores(name, scores, None, n, m, combinations=combinations)
    if scores.dtype not in (torch.float32, torch.float64) or not scores.is_contiguous():
        raise ValueError(f"{name}: scores must be float32 or float64 and contiguous, got {scores.dtype}")
    k, most = as_int(name, k=k), scores.shape[1] - 1
    if not 0 <= k <= most:
        raise ValueError(f"{name}: k must be from 0 to {most}, got {k}")
    with torch.no_grad():
        try:
            mask = _remove.overload(scores, k, n, m, combinations)
        except RuntimeError:
            if not torch.compiler.is_compiling() and scores.device.type == "cpu":
                _check_numbers(scores)
            raise
        if not torch.compiler.is_compiling() and not scores.is_inference():
            torch.autograd.graph.increment_version(scores)
        return mask


def _check_numbers(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError(f"nm_remove_: scores must not be NaN, got {int(scores.isnan().sum())} that are")


def _reference(scores: Tensor, k: int, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    if scores.device.type == "cpu":
        _check_numbers(scores)
    marked = torch.where(scores == 0, DEAD, scores)
    lowest = torch.sort(marked, dim=1, stable=True).indices[:, :k]
    scores.copy_(marked.scatter(1, lowest, 0.0))
    return pack_mask(alive_mask(scores, n, m, combinations))


def _fake(scores: Tensor, k: int, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    return scores.new_empty(((scores.shape[0] * m + 7) // 8,), dtype=torch.uint8)


def _vmap(
    info: Any, in_dims: Any, scores: Tensor, k: int, n: int, m: int, combinations: Tensor | None = None
) -> tuple[Tensor, int]:
    if in_dims[0] is None:
        raise ValueError("nm_remove_: under vmap the scores must be mapped, since every call changes them")
    mapped = combinations is not None and len(in_dims) > 4 and in_dims[4] is not None
    numbers = combinations.unbind(in_dims[4]) if mapped else [combinations] * info.batch_size  # type: ignore[union-attr]
    masks = []
    for each, which in zip(scores.unbind(in_dims[0]), numbers, strict=True):
        own = each.contiguous()
        masks.append(_remove.overload(own, k, n, m, which))
        if own.data_ptr() != each.data_ptr():
            each.copy_(own)
    return torch.stack(masks), 0


_remove = operator(
    "nm_remove(Tensor(a!) scores, int k, int n, int m, Tensor? combinations=None) -> Tensor mask",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
