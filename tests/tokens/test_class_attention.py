"""Attention with the class token's row: the same output as without, scores of the right softmax, averages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor
from tersor.tokens import mean_heads

DECAY = 0.75


def _scores(query: Any, key: Tensor) -> Tensor:
    return tersor.class_scores(query, key).to(key.dtype)


def _average(key: Any) -> Tensor:
    shape = (key.shape[0], key.shape[1] - 1)
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    return (torch.arange(shape[0] * shape[1], device=key.device) / 256).to(dtype).view(shape)


def _averaged(query: Any, key: Tensor) -> Tensor:
    average = _average(query) if isinstance(query, Tensor) and query.dim() == 4 else None
    return tersor.class_scores(query, key, average, DECAY, 0.3).to(key.dtype)


def _matrix(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    products = torch.einsum("bnhd,bmhd->bhnm", query, key) * (query.shape[3] ** -0.5 if scale is None else scale)
    return torch.softmax(products, 3)


def _exact(query: Tensor, key: Tensor) -> Tensor:
    return mean_heads(_matrix(query, key)[:, :, 0, 1:])


def _exact_averaged(query: Tensor, key: Tensor) -> Tensor:
    now = mean_heads(_matrix(query, key, 0.3)[:, :, 0, 1:])
    return (DECAY * _average(query) + (1 - DECAY) * now).to(key.dtype)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, dtype=dtype, device=device) for _ in range(2))


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    query, key = _inputs(size, dtype, device)
    return query[:, 0].contiguous(), key, None, size[3] ** -0.5, 0.0


def _raw_averaged(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    query, key, *_ = _raw(name, size, dtype, device)
    return query, key, _average(key), 0.3, DECAY


SIZES = [(2, 9, 3, 4), (3, 8, 2, 4), (1, 2, 1, 1), (2, 50, 6, 64), (1, 197, 3, 33)]
SUBJECTS = [
    Subject(
        _scores, _exact, _inputs, (), ("class_scores",), _raw, SIZES, differentiable=False, autocast=False,
        name="class_scores",
    ),
    Subject(
        _averaged, _exact_averaged, _inputs, (), ("class_scores",), _raw_averaged, SIZES, differentiable=False,
        autocast=False, name="class_scores_average",
    ),
]  # fmt: skip


@given(st.integers(0, 3), st.integers(2, 70), st.integers(1, 4), st.integers(1, 40), st.booleans())
def test_attention_of_any_shape(batch: int, length: int, heads: int, width: int, packed: bool) -> None:
    qkv = torch.randn(batch, length, 3, heads, width, dtype=torch.float64, requires_grad=True)
    if packed:
        output, scores = tersor.class_attention_qkvpacked(qkv)
    else:
        output, scores = tersor.class_attention(*qkv.unbind(2))
    matrix = _matrix(qkv[:, :, 0], qkv[:, :, 1])
    expected = torch.einsum("bhnm,bmhd->bnhd", matrix, qkv[:, :, 2])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(scores, mean_heads(matrix[:, :, 0, 1:]).detach())
    assert output.requires_grad
    assert not scores.requires_grad
    grad = torch.randn_like(output)
    given, wanted = (torch.autograd.grad(t, qkv, grad)[0] for t in (output, expected))
    torch.testing.assert_close(given, wanted)


def test_average_over_layers(run: tuple[str, str]) -> None:
    """Zero start: after three layers the published weights .01 * .99 ** 2, .01 * .99 and .01."""
    qkv = [torch.randn(2, 10, 3, 2, 8, device=run[0]) for _ in range(3)]
    average = None
    for each in qkv:
        _, average = tersor.class_attention_ema(*each.unbind(2), average, 0.99)
    rows = [mean_heads(_matrix(each[:, :, 0], each[:, :, 1])[:, :, 0, 1:]) for each in qkv]
    expected = sum(0.01 * 0.99 ** (2 - i) * row for i, row in enumerate(rows))
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=0)


def test_heads_are_added_in_ascending_order() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 in float32 for some; equality of scores is judged on that value."""
    rows = torch.rand(50, 5, 30)
    expected = (((rows[:, 0] + rows[:, 1]) + rows[:, 2]) + rows[:, 3] + rows[:, 4]) / 5
    assert torch.equal(mean_heads(rows), expected)
    assert not torch.equal(mean_heads(rows), mean_heads(rows.flip(1)))


def test_bad_input() -> None:
    query, key = _inputs((2, 9, 3, 5), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"query must be \(B, n, heads, head_dim\) with n of at least 2"):
        tersor.class_scores(query[:, :1], key[:, :1])
    with pytest.raises(ValueError, match="decay must be from 0 to 1, got 2"):
        tersor.class_scores(query, key, decay=2)
    with pytest.raises(TypeError, match="decay must be a number, got str"):
        tersor.class_scores(query, key, decay="0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"average must be \(2, 8\) for this query, got shape \(2, 9\)"):
        tersor.class_scores(query, key, torch.zeros(2, 9))
    with pytest.raises(TypeError, match=r"average must be torch\.float32 for this query, got torch\.float64"):
        tersor.class_scores(query, key, torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="average must be on the device of query cpu, got meta"):
        tersor.class_scores(query, key, torch.zeros(2, 8, device="meta"))
    with pytest.raises(ValueError, match=r"qkv must be \(B, n, 3, heads, head_dim\), got shape \(2, 9, 2, 3, 5\)"):
        tersor.class_attention_qkvpacked(torch.randn(2, 9, 2, 3, 5))
    with pytest.raises(ValueError, match="value must have the shape of query"):
        tersor.class_attention(query, key, key[:, 1:])
