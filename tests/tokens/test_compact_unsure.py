"""The unsure images first: strict threshold, stable order, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

THRESHOLD = 0.4


def _function(logits: Any) -> Tensor:
    index, count = tersor.compact_unsure(logits, THRESHOLD)
    return torch.cat([index, count]).to(logits.dtype)


def _exact(logits: Tensor) -> Tensor:
    unsure = ~(torch.softmax(logits.float(), 1).amax(1) >= THRESHOLD)
    places = torch.cat([unsure.nonzero()[:, 0], (~unsure).nonzero()[:, 0], unsure.sum().view(1)])
    return places.to(logits.dtype)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, dtype=dtype, device=device),)


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("compact_unsure",), lambda name, *given: (*_inputs(*given), THRESHOLD),
        [(6, 5), (7, 4), (1, 1), (3, 1000), (65, 7)],
        quantizer=True, differentiable=False, autocast=False, name="compact_unsure",
    )
]  # fmt: skip


@given(st.integers(0, 70), st.integers(1, 40), st.floats(0, 1), st.floats(0.1, 20))
def test_any_shape(batch: int, classes: int, threshold: float, spread: float) -> None:
    logits = torch.randn(batch, classes) * spread
    confidence = torch.softmax(logits, 1).amax(1)
    if ((confidence - threshold).abs() < 1e-6).any():
        return  # the last bit of the softmax decides
    index, count = tersor.compact_unsure(logits, threshold)
    unsure = (confidence < threshold).nonzero()[:, 0]
    assert count.item() == len(unsure)
    assert torch.equal(index[: len(unsure)], unsure)
    assert torch.equal(index.sort().values, torch.arange(batch))
    assert (index[len(unsure) :].diff() > 0).all()


def test_the_threshold_is_strict(run: tuple[str, str]) -> None:
    logits = torch.tensor([[0.0, 0.0], [200.0, 0.0], [float("nan"), 0.0], [1e30, -1e30]], device=run[0])
    for threshold, expected in ((0.5, [2]), (0.51, [0, 2]), (1.0, [0, 2]), (0.0, [2])):
        index, count = tersor.compact_unsure(logits, threshold)
        assert index[: count.item()].tolist() == expected, threshold


def test_bucket_size() -> None:
    assert [tersor.bucket_size(n, 100) for n in (0, 1, 32, 33, 97, 100)] == [0, 32, 32, 64, 100, 100]
    assert tersor.bucket_size(5, 64, 4) == 8
    with pytest.raises(ValueError, match="count must be from 0 to 10, got 11"):
        tersor.bucket_size(11, 10)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        tersor.bucket_size(1, 10, 0)


def test_bad_input() -> None:
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must be from 0 to 1, got"):
            tersor.compact_unsure(torch.zeros(2, 3), threshold)
    with pytest.raises(TypeError, match="threshold must be a number, got bool"):
        tersor.compact_unsure(torch.zeros(2, 3), True)
    with pytest.raises(ValueError, match=r"logits must be \(B, classes\), got shape \(2, 0\)"):
        tersor.compact_unsure(torch.zeros(2, 0), 0.5)
