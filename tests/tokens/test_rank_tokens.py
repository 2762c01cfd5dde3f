"""Stable ranking: ties by index, zeros of both signs alike, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tersor


def _function(scores: Any) -> Tensor:
    return tersor.rank_tokens(scores).to(scores.dtype)


def _exact(scores: Tensor) -> Tensor:
    """By counting who comes before."""
    place = torch.arange(scores.shape[1], device=scores.device)
    one, other = scores[:, :, None], scores[:, None, :]
    before = (other > one) | ((other == one) & (place < place[:, None]))
    return torch.empty_like(scores).scatter(1, before.sum(2), place.to(scores.dtype).expand_as(scores))


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, device=device).mul(4).round().div(4).to(dtype),)


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("rank_tokens",), lambda name, *given: _inputs(*given),
        [(2, 9), (3, 9), (4, 1), (2, 49), (1, 196), (3, 250)],
        quantizer=True, differentiable=False, autocast=False, name="rank_tokens",
    )
]  # fmt: skip


@given(st.integers(0, 3), st.integers(1, 300), st.integers(1, 5), st.sampled_from((torch.float32, torch.float64)))
def test_any_shape_and_many_ties(batch: int, count: int, levels: int, dtype: torch.dtype) -> None:
    scores = torch.randint(-levels, levels, (batch, count)).to(dtype) / levels
    scores[scores == 0] *= -1  # zeros of both signs are equal
    expected = torch.argsort(scores, dim=1, descending=True, stable=True)
    assert torch.equal(tersor.rank_tokens(scores), expected)


def test_infinities_are_numbers(run: tuple[str, str]) -> None:
    scores = torch.tensor([[0.0, float("-inf"), float("inf"), 1.0, float("inf")]], device=run[0])
    assert tersor.rank_tokens(scores).tolist() == [[2, 4, 3, 0, 1]]


def test_nan_is_refused_or_first(run: tuple[str, str]) -> None:
    scores = torch.tensor([[0.0, float("nan"), 3.0, float("nan")]], device=run[0])
    if run[0] == "cpu":
        with pytest.raises(ValueError, match="scores must not be NaN, got 2 that are"):
            tersor.rank_tokens(scores)
    assert torch.ops.tersor.rank_tokens(scores).tolist() == [[1, 3, 2, 0]]


def test_tensors_without_values_have_shapes() -> None:
    """What tools that count or place a model's memory run it with."""
    with FakeTensorMode():
        scores = torch.rand(2, 9)
        assert tersor.rank_tokens(scores).shape == (2, 9)
        assert tersor.gather_tokens(torch.rand(2, 9, 4), tersor.rank_tokens(scores)).shape == (2, 9, 4)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"scores must be \(B, N\) with N of at least 1, got shape \(2, 0\)"):
        tersor.rank_tokens(torch.empty(2, 0))
    with pytest.raises(ValueError, match="got shape"):
        tersor.rank_tokens(torch.empty(3))
