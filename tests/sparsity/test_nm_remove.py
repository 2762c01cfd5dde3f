"""The k lowest of every group, ties by index, zeros first; the published trajectory's odd corners."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor.freezing import unpack_mask
from tersor.sparsity import nm_combinations, nm_remove_, nm_schedule


def _function(scores: Any) -> Tensor:
    changed = scores.detach().clone(memory_format=torch.contiguous_format) if isinstance(scores, Tensor) else scores
    mask = nm_remove_(changed, 3, 2, 4)
    return torch.cat([changed.flatten(), mask.to(changed.dtype)])


def _exact(scores: Tensor) -> Tensor:
    marked = torch.where(scores == 0, -1000.0, scores)
    lowest = torch.sort(marked, dim=1, stable=True).indices[:, :3]
    scores = marked.scatter(1, lowest, 0.0)
    kept = (scores != 0).float() @ nm_combinations(2, 4).to(scores.device) > 0
    bits = kept.reshape(-1, 2, 4).to(torch.uint8) if kept.shape[0] % 2 == 0 else None
    assert bits is not None
    bytes = (bits.flatten(1) << torch.arange(8, dtype=torch.uint8, device=scores.device)).sum(1)
    return torch.cat([scores.flatten(), bytes.to(scores.dtype)])


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    values = torch.randn(*size)
    return (torch.where(torch.rand(*size) < 0.3, 0, values).to(dtype).to(device),)


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("nm_remove",),
        raw=lambda name, size, dtype, device: (*_inputs(size, dtype, device), 3, 2, 4),
        sizes=[(8, 6), (12, 6), (2, 6), (10002, 6)],
        dtypes=(torch.float32,),
        quantizer=True,
        differentiable=False,
        inner=True,
        changes=True,
        name="nm_remove",
    )
]


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 8), (1, 16)]),
    share=st.floats(0, 1),
    zeros=st.sampled_from([0, 0.2, 0.9]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_pattern(pattern: tuple[int, int], share: float, zeros: float, ties: bool, seed: int) -> None:
    torch.manual_seed(seed)
    n, m = pattern
    combinations = math.comb(m, n)
    k = round(share * (combinations - 1))
    scores = torch.randint(-2, 3, (37, combinations)).float() if ties else torch.randn(37, combinations)
    scores = torch.where(torch.rand(37, combinations) < zeros, 0, scores)
    before = torch.where(scores == 0, -1000.0, scores)
    mask = nm_remove_(scores, k, n, m)
    order = torch.sort(before, dim=1, stable=True).indices
    assert torch.all(scores.gather(1, order[:, :k]) == 0)
    assert torch.equal(scores.gather(1, order[:, k:]), before.gather(1, order[:, k:]))
    kept = (scores != 0).float() @ nm_combinations(n, m) > 0
    assert torch.equal(unpack_mask(mask, (37, m)), kept)


def test_zeros_beyond_k_come_back_to_life() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.5, 0.6, 0.7]])
    nm_remove_(scores, 1, 2, 4)
    assert scores.tolist() == [[0, -1000, -1000, 0.5, pytest.approx(0.6), pytest.approx(0.7)]]
    nm_remove_(scores, 0, 2, 4)
    assert scores[0, 0] == -1000


def test_removed_scores_stay_removed() -> None:
    scores = torch.rand(50, 6)
    nm_remove_(scores, 3, 2, 4)
    before = scores.clone()
    nm_remove_(scores, 3, 2, 4)
    assert torch.equal(scores, before)


def test_the_version_counts_up() -> None:
    scores = torch.rand(4, 6, requires_grad=True)
    loss = (scores**2).sum()
    nm_remove_(scores, 3, 2, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 6}, ValueError, "k must be from 0 to 5, got 6"),
        ({"k": -1}, ValueError, "k must be from 0 to 5, got -1"),
        ({"k": 1.0}, TypeError, "k must be an int"),
        ({"scores": torch.full((3, 6), float("nan"))}, ValueError, "scores must not be NaN, got 18 that are"),
        ({"scores": torch.zeros(3, 5)}, ValueError, r"scores must have shape \(G, 6\), got \(3, 5\)"),
        ({"scores": torch.zeros(6, 3).t()}, ValueError, "contiguous"),
        ({"scores": torch.zeros(3, 6).half()}, ValueError, "float32 or float64"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, run: tuple[str, str]) -> None:
    arguments = {"scores": torch.rand(3, 6), "k": 2, "n": 2, "m": 4} | change
    with pytest.raises(error, match=message):
        nm_remove_(**arguments)


def test_schedule() -> None:
    assert [nm_schedule(e, 6, 5) for e in range(7)] == [0, 2, 3, 4, 4, 5, 5]
    # Worked out in float64 and in this order; the exact values would be 19 and 26.
    assert (nm_schedule(1, 28, 3), nm_schedule(2, 28, 3)) == (18, 25)
    assert nm_schedule(0, 70, 10) == 0
    assert nm_schedule(10, 70, 10) == 69
    for options, message in (
        ({"epoch": -1}, "epoch must be at least 0"),
        ({"final_epoch": 0}, "final_epoch must be at least 1"),
        ({"combinations": 1}, "combinations must be at least 2"),
        ({"power": 0}, "power must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            nm_schedule(**({"epoch": 0, "combinations": 6, "final_epoch": 5} | options))
