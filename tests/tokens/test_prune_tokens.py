"""Residual, choice of tokens and layer norm in one: what is kept, and the adjoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

OPERATORS = ("prune_tokens_forward", "prune_tokens_backward")
SCALE, EPS = 0.5, 1e-5
# batch, length, channels
SIZES = [(2, 6, 5), (3, 7, 4), (1, 2, 3), (2, 50, 16), (1, 197, 33)]


def _count(length: int) -> int:
    return (length + 1) // 2


def _scores(batch: int, length: int, device: str = "cpu") -> Tensor:
    place = torch.arange(batch * (length - 1), device=device).view(batch, length - 1)
    return ((place * 11 + 5) % 7).float() / 8


def _prune(input: Any, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    whole = isinstance(input, Tensor) and input.dim() == 3
    shape = (input.shape[0], input.shape[1], str(input.device)) if whole else (1, 2)
    return tersor.prune_tokens(_scores(*shape), input, branch, weight, bias, _count(shape[1]), SCALE, EPS)


def _function(input: Any, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(_prune(input, branch, weight, bias)[:2], 2)


def _exact(input: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scores: Any = None, count: int = 0) -> Tensor:
    batch, length, channels = input.shape
    scores = _scores(batch, length, str(input.device)) if scores is None else scores
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, : count or _count(length)]
    every = input + SCALE * branch
    tokens = torch.stack([torch.cat([own[:1], own[1 + i]]) for own, i in zip(every, order, strict=True)])
    return torch.cat([tokens, F.layer_norm(tokens, (channels,), weight, bias, EPS)], 2)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    shapes = [size, size, size[2:], size[2:]]
    return tuple(torch.randn(s, dtype=dtype, device=device) for s in shapes)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    tensors, count = _inputs(size, dtype, device), min(_count(size[1]), size[1] - 1)
    forward = (*tensors, _scores(size[0], size[1], device), count, SCALE, EPS)
    if name == OPERATORS[0]:
        return forward
    tokens, _, index = torch.ops.tersor.prune_tokens_forward(*forward)
    first, second = torch.randn_like(tokens), torch.randn_like(tokens)
    return first, second, tokens, tensors[2], index, size[1], SCALE, EPS, True, True


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), OPERATORS, _raw, SIZES, autocast=False, alike=False, name="prune_tokens",
    )
]  # fmt: skip


@given(st.integers(1, 3), st.integers(2, 20), st.integers(2, 40), st.integers(1, 25), st.integers(1, 5))
def test_any_shape(batch: int, length: int, channels: int, count: int, levels: int) -> None:
    tensors = [t.requires_grad_() for t in _inputs((batch, length, channels), torch.float64, "cpu")]
    scores = torch.randint(0, levels, (batch, length - 1)).float()
    tokens, normalized, index = tersor.prune_tokens(scores, *tensors, count, SCALE, EPS)
    kept = min(count, length - 1)
    assert tokens.shape == normalized.shape == (batch, 1 + kept, channels)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :kept]
    assert torch.equal(index, F.pad(1 + order, (1, 0)))
    expected = _exact(*tensors, scores, kept)
    given = torch.cat([tokens, normalized], 2)
    torch.testing.assert_close(given, expected)
    grad = torch.randn_like(given)
    for g, e in zip(
        torch.autograd.grad(given, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone(used: int, run: tuple[str, str]) -> None:
    tensors = [t.requires_grad_() for t in _inputs((2, 9, 5), torch.float32, run[0])]
    half = slice(0, 5) if used == 0 else slice(5, 10)
    wanted = tensors[:2] if used == 0 else tensors
    given = torch.autograd.grad(_prune(*tensors)[used].square().sum(), wanted)
    expected = torch.autograd.grad(_exact(*tensors)[..., half].square().sum(), wanted)
    for g, e in zip(given, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_an_empty_batch() -> None:
    tensors = [t.requires_grad_() for t in _inputs((0, 9, 5), torch.float32, "cpu")]
    tokens, normalized, index = _prune(*tensors)
    assert (tokens.shape, normalized.shape, index.shape) == ((0, 6, 5), (0, 6, 5), (0, 6))
    assert all(not g.any() for g in torch.autograd.grad(normalized.sum(), tensors))


def test_a_damaged_index_harms_nothing(run: tuple[str, str]) -> None:
    first, second, tokens, weight, index, *options = _raw(OPERATORS[1], (2, 9, 5), torch.float32, run[0])
    damaged = index.clone()
    damaged[0, 1], damaged[1, 2] = 99, -7
    grad = torch.ops.tersor.prune_tokens_backward(first, second, tokens, weight, damaged, *options)[0]
    assert grad.isfinite().all()


def test_bad_input() -> None:
    input, branch, weight, bias = _inputs((2, 9, 5), torch.float32, "cpu")
    scores = torch.rand(2, 8)

    def call(**changed: Any) -> Any:
        given = {"scores": scores, "input": input, "branch": branch, "weight": weight, "bias": bias, "count": 3}
        return tersor.prune_tokens(**(given | changed))

    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        call(count=0)
    with pytest.raises(TypeError, match="count must be an int, got float"):
        call(count=1.5)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="eps must be above 0, got"):
            call(eps=eps)
    with pytest.raises(ValueError, match=r"input must be \(B, n, C\) with n of at least 2, got shape \(2, 1, 5\)"):
        call(input=input[:, :1])
    with pytest.raises(ValueError, match=r"branch must be \(2, 9, 5\) for this input, got shape \(2, 8, 5\)"):
        call(branch=branch[:, 1:])
    with pytest.raises(ValueError, match=r"scores must be \(2, 8\) for this input, got shape \(2, 7\)"):
        call(scores=scores[:, 1:])
    with pytest.raises(ValueError, match="weight must be on the device of input cpu, got meta"):
        call(weight=weight.to("meta"))
    with pytest.raises(TypeError, match="bias must have the dtype of input"):
        call(bias=bias.double())
    with pytest.raises(ValueError, match="scores must not be NaN, got 8 that are"):
        call(scores=scores * torch.tensor([[float("nan")], [1.0]]))
