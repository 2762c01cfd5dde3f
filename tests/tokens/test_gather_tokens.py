"""Gathering and its adjoint: copies are added up, what is out of range is refused or NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

OPERATORS = ("gather_tokens_forward", "gather_tokens_backward")


def _index(batch: int, length: int, device: str = "cpu") -> Tensor:
    """More places than two thirds of the tokens, some of them twice."""
    place = torch.arange(batch * (length - length // 3), device=device).view(batch, -1)
    return (place * 7 + 3) % length


def _function(input: Any) -> Tensor:
    rows = (input.shape[0], input.shape[1], str(input.device)) if isinstance(input, Tensor) else (1, 1)
    return tersor.gather_tokens(input, _index(*rows))


def _exact(input: Tensor) -> Tensor:
    index = _index(input.shape[0], input.shape[1], str(input.device))
    return torch.stack([sample[own] for sample, own in zip(input, index, strict=True)])


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, dtype=dtype, device=device),)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    index = _index(size[0], size[1], device)
    if name == OPERATORS[0]:
        return (*_inputs(size, dtype, device), index)
    return torch.randn((*index.shape, size[2]), dtype=dtype, device=device), index, size[1]


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), OPERATORS, _raw, [(2, 9, 5), (3, 7, 6), (4, 1, 1), (2, 50, 16), (1, 197, 33)],
        autocast=False, name="gather_tokens",
    )
]  # fmt: skip


@given(st.integers(0, 3), st.integers(1, 20), st.integers(0, 30), st.integers(0, 40))
def test_any_shape(batch: int, length: int, count: int, channels: int) -> None:
    input = torch.randn(batch, length, channels, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, length, (batch, count))
    output = tersor.gather_tokens(input, index)
    assert output.shape == (batch, count, channels)
    expected = torch.gather(input, 1, index[..., None].expand(-1, -1, channels))
    assert torch.equal(output, expected)
    grad = torch.randn_like(output)
    given = torch.autograd.grad(output, input, grad)[0]
    torch.testing.assert_close(given, torch.autograd.grad(expected, input, grad)[0])


def test_out_of_range(run: tuple[str, str]) -> None:
    input = torch.randn(2, 4, 3, device=run[0])
    index = torch.tensor([[0, 4, 2], [-1, 1, 3]], device=run[0])
    if run[0] == "cpu":
        with pytest.raises(ValueError, match="gather_tokens: index must be from 0 to 3, got -1 to 4"):
            tersor.gather_tokens(input, index)
    output = torch.ops.tersor.gather_tokens_forward(input, index)
    outside = (index < 0) | (index > 3)
    assert output[outside].isnan().all()
    assert torch.equal(output[~outside], torch.stack([input[0, 0], input[0, 2], input[1, 1], input[1, 3]]))
    grad = torch.ops.tersor.gather_tokens_backward(torch.ones_like(output), index, 4)
    assert grad[..., 0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    far = torch.tensor([[2**62], [-(2**62)]], device=run[0])
    assert torch.ops.tersor.gather_tokens_forward(input, far).isnan().all()
    assert not torch.ops.tersor.gather_tokens_backward(torch.ones_like(output)[:, :1], far, 4).any()


def test_bad_input() -> None:
    input = torch.randn(2, 4, 3)
    with pytest.raises(TypeError, match=r"index must be a torch\.Tensor, got list"):
        tersor.gather_tokens(input, [[1], [2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"index must be int64, got torch\.int32"):
        tersor.gather_tokens(input, torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"index must be \(B, m\) with B = 2, got shape \(3, 1\)"):
        tersor.gather_tokens(input, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="index must be on the device of input cpu, got meta"):
        tersor.gather_tokens(input, torch.zeros(2, 1, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"input must be \(B, n, C\)"):
        tersor.gather_tokens(input[0], torch.zeros(4, 1, dtype=torch.int64))
