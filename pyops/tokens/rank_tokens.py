"""Stable ranking of few tokens by their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, unfold
from tersor._checks import check_floating
from tersor._operator import operator


def rank_tokens(scores: Tensor) -> Tensor:
    """The tokens of every image from the highest to the lowest score: of equal scores the lower index comes first.

    Args:
        scores: ``(B, N)``, float16, bfloat16, float32 or float64.

    Returns:
        ``(B, N)``, int64: row by row a permutation of ``0 .. N - 1``.

    Raises:
        TypeError: ``scores`` is not a floating-point tensor.
        ValueError: its shape is not ``(B, N)`` with N of at least 1; or, on the CPU, a score is NaN. On a GPU, which is
            not waited for, and in compiled graphs NaN comes first.
    """
    name = "rank_tokens"
    check_scores(name, scores)
    return _rank.without_gradient(scores.detach())


def check_scores(name: str, scores: Tensor) -> None:
    """Floating point, ``(B, N)`` and, where that can be seen without waiting, numbers."""
    check_floating(name, scores=scores)
    if scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(f"{name}: scores must be (B, N) with N of at least 1, got shape {tuple(scores.shape)}")
    if can_read(scores) and not torch.equal(scores, scores):  # NaN equals nothing; half the time of a sum
        raise ValueError(f"{name}: scores must not be NaN, got {int(scores.isnan().sum())} that are")


def can_read(tensor: Tensor) -> bool:
    """Whether values can be looked at here: plain tensors on the CPU, outside of graphs and torch.func's transforms."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _reference(scores: Tensor) -> Tensor:
    return torch.argsort(scores, dim=1, descending=True, stable=True)


def _fake(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int64)


def _vmap(info: Any, in_dims: Any, scores: Tensor) -> tuple[Tensor, int]:
    return unfold(_rank.overload(fold(scores, in_dims[0], info.batch_size)), info), 0


_rank = operator("rank_tokens(Tensor scores) -> Tensor", reference=_reference, fake=_fake, vmap=_vmap)
