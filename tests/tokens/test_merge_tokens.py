"""Weighted means of the tokens of a place: against loops, sizes over several merges, damaged places, its adjoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

OPERATORS = ("merge_tokens_forward", "merge_tokens_backward")


def _places(length: int) -> int:
    return length - length // 3


def _index(batch: int, length: int, device: str = "cpu") -> Tensor:
    """Every place is gone to, some by several tokens."""
    token = torch.arange(batch * length, device=device).view(batch, length)
    return (token * 13 + 3) % _places(length)


def _sizes(batch: int, length: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    token = torch.arange(batch * length, device=device).view(batch, length)
    return (1 + token * 5 % 3).to(torch.float64 if dtype == torch.float64 else torch.float32)


def _function(input: Any) -> Tensor:
    if not isinstance(input, Tensor) or input.dim() != 3:
        return tersor.merge_tokens(input, torch.zeros(1, 1, dtype=torch.int64), 1)[0]
    batch, length, device = *input.shape[:2], str(input.device)
    sizes = _sizes(batch, length, input.dtype, device)
    return tersor.merge_tokens(input, _index(batch, length, device), _places(length), sizes)[0]


def _exact(input: Tensor) -> Tensor:
    batch, length, device = *input.shape[:2], str(input.device)
    index, sizes = _index(batch, length, device), _sizes(batch, length, input.dtype, device)
    images = []
    for tokens, places, weights in zip(input, index, sizes, strict=True):
        means = []
        for place in range(_places(length)):
            members = (places == place).nonzero()[:, 0]
            total = (tokens[members] * weights[members, None].to(input.dtype)).sum(0)
            means.append(total / weights[members].sum().to(input.dtype))
        images.append(torch.stack(means))
    return torch.stack(images)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, dtype=dtype, device=device),)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    index, sizes = _index(*size[:2], device), _sizes(*size[:2], dtype, device)
    if size[1] % 2:  # ones are not written out
        sizes = None
    forward = (*_inputs(size, dtype, device), index, sizes, _places(size[1]))
    if name == OPERATORS[0]:
        return forward
    output, output_sizes = torch.ops.tersor.merge_tokens_forward(*forward)
    return torch.randn_like(output), index, sizes, output_sizes


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), OPERATORS, _raw, [(2, 10, 5), (3, 7, 6), (4, 1, 1), (2, 50, 16), (1, 197, 33)],
        autocast=False, name="merge_tokens",
    )
]  # fmt: skip


@given(st.integers(0, 3), st.integers(0, 20), st.integers(1, 12), st.integers(0, 80), st.booleans(), st.booleans())
def test_any_shape(batch: int, length: int, places: int, channels: int, sized: bool, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    input = torch.randn(batch, length, channels, dtype=dtype, requires_grad=True)
    index = torch.randint(0, places, (batch, length))
    sizes = torch.rand(batch, length, dtype=dtype) + 0.5 if sized else None
    output, output_sizes = tersor.merge_tokens(input, index, places, sizes)
    weights = torch.ones(batch, length, dtype=dtype) if sizes is None else sizes
    grad = torch.randn(batch, places, channels, dtype=dtype)
    (gradient,) = torch.autograd.grad(output, input, grad)
    for b in range(batch):
        for place in range(places):
            members = [i for i in range(length) if index[b, i] == place]
            total = sum(weights[b, i].item() for i in members)
            assert output_sizes[b, place].item() == pytest.approx(total, rel=1e-6)
            mean = sum((input[b, i].detach() * weights[b, i] / total for i in members), torch.zeros(channels))
            torch.testing.assert_close(output[b, place], mean.to(dtype), rtol=1e-5, atol=1e-6)
            for i in members:
                torch.testing.assert_close(gradient[b, i], grad[b, place] * weights[b, i] / total, rtol=1e-5, atol=1e-6)


def test_merging_twice_is_merging_once(run: tuple[str, str]) -> None:
    """Sizes remember what a token stands for: the mean over all patches stays what it was."""
    input = torch.randn(2, 17, 6, device=run[0])
    index, places = tersor.match_tokens(input[:, :, None], 5)
    once, sizes = tersor.merge_tokens(input, index, places)
    again, fewer = tersor.match_tokens(once[:, :, None], 4)
    twice, total = tersor.merge_tokens(once, again, fewer, sizes)
    direct, counts = tersor.merge_tokens(input, torch.gather(again, 1, index), fewer)
    torch.testing.assert_close(twice, direct)
    assert torch.equal(total, counts)
    assert total.sum(1).tolist() == [17, 17]
    torch.testing.assert_close((twice * total[..., None]).sum(1) / 17, input.mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_token_alone_keeps_its_bits(dtype: torch.dtype, run: tuple[str, str]) -> None:
    input = torch.randn(2, 9, 37, device=run[0]).to(dtype)
    order = torch.rand(2, 9, device=run[0]).argsort(1)
    sizes = torch.tensor([1.0, 3, 7, 49, 2, 1, 5, 6, 11], device=run[0]).expand(2, 9)
    output, output_sizes = tersor.merge_tokens(input, order, 9, sizes)
    assert torch.equal(tersor.gather_tokens(output, order), input)
    assert torch.equal(torch.gather(output_sizes, 1, order), sizes)


def test_every_backend_has_the_same_bits(run: tuple[str, str]) -> None:
    """Shares are rounded, multiplied and added in the same order everywhere."""
    input, index, sizes, places = _raw(OPERATORS[0], (2, 50, 40), torch.float32, run[0])
    given = tersor.merge_tokens(input, index, places, sizes)
    with tersor.use_backend("reference"):
        expected = tersor.merge_tokens(input.cpu(), index.cpu(), places, sizes.cpu())
    assert all(torch.equal(g.cpu(), e) for g, e in zip(given, expected, strict=True))


def test_a_place_that_none_goes_to_is_zero(run: tuple[str, str]) -> None:
    input = torch.randn(1, 3, 5, device=run[0], requires_grad=True)
    output, sizes = tersor.merge_tokens(input, torch.tensor([[2, 0, 2]], device=run[0]), 4)
    assert sizes.tolist() == [[1, 0, 2, 0]]
    assert not output[0, [1, 3]].any()
    (gradient,) = torch.autograd.grad(output.sum(), input)
    assert gradient[0, :, 0].tolist() == [0.5, 1, 0.5]


def test_the_sizes_have_no_gradient(run: tuple[str, str]) -> None:
    input = torch.randn(1, 4, 3, device=run[0], requires_grad=True)
    sizes = torch.ones(1, 4, device=run[0], requires_grad=True)
    output, output_sizes = tersor.merge_tokens(input, torch.tensor([[0, 1, 1, 0]], device=run[0]), 2, sizes)
    assert not output_sizes.requires_grad
    output.sum().backward()
    assert sizes.grad is None


def test_out_of_range(run: tuple[str, str]) -> None:
    input = torch.randn(2, 3, 4, device=run[0])
    index = torch.tensor([[0, 2, 2**62], [-1, 1, -(2**62)]], device=run[0])
    if run[0] == "cpu":
        with pytest.raises(ValueError, match="merge_tokens: index must be from 0 to 1, got"):
            tersor.merge_tokens(input, index, 2)
    output, sizes = torch.ops.tersor.merge_tokens_forward(input, index, None, 2)
    assert sizes.tolist() == [[1, 0], [0, 1]]
    assert torch.equal(output[0, 0], input[0, 0])
    assert torch.equal(output[1, 1], input[1, 1])
    assert not output[0, 1].any()
    gradient = torch.ops.tersor.merge_tokens_backward(torch.ones_like(output), index, None, sizes)
    assert gradient[..., 0].tolist() == [[1, 0, 0], [0, 1, 0]]


def test_mismatched_tensors_are_refused_by_the_operators(run: tuple[str, str]) -> None:
    if run[1] == "reference":
        pytest.skip("nothing of it reads outside a tensor")
    input, index, sizes, places = _raw(OPERATORS[0], (2, 10, 5), torch.float32, run[0])
    output, output_sizes = torch.ops.tersor.merge_tokens_forward(input, index, sizes, places)
    for wrong in (
        (input[0], index, sizes, places),
        (input, index[:, 1:], None, places),
        (input, index[:1], None, places),
        (input, index, sizes[:, 1:], places),
        (input, index, sizes.half(), places),
        (input, index, sizes, -1),
    ):
        with pytest.raises((RuntimeError, ValueError), match="must"):
            torch.ops.tersor.merge_tokens_forward(*wrong)
    for wrong in (
        (output, index, sizes, output_sizes[:, 1:]),
        (output, index, sizes, output_sizes.half()),
        (output, index, sizes[:1], output_sizes),
        (output, index[:1], None, output_sizes),
    ):
        with pytest.raises((RuntimeError, ValueError), match="must"):
            torch.ops.tersor.merge_tokens_backward(*wrong)


def test_bad_input() -> None:
    input, index, sizes = torch.randn(2, 9, 5), torch.zeros(2, 9, dtype=torch.int64), torch.ones(2, 9)
    with pytest.raises(ValueError, match=r"input must be \(B, n, C\), got shape \(9, 5\)"):
        tersor.merge_tokens(input[0], index, 3)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        tersor.merge_tokens(input, index, -1)
    with pytest.raises(TypeError, match="length must be an int, got float"):
        tersor.merge_tokens(input, index, 3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index must be from 0 to 2, got 0 to 3"):
        tersor.merge_tokens(input, index.clone().fill_diagonal_(3), 3)
    with pytest.raises(ValueError, match=r"index must be \(2, 9\) for this input, got \(2, 8\)"):
        tersor.merge_tokens(input, index[:, 1:], 3)
    with pytest.raises(TypeError, match=r"index must be int64, got torch\.float32"):
        tersor.merge_tokens(input, sizes, 3)
    with pytest.raises(ValueError, match=r"sizes must be \(2, 9\) for this input, got \(2, 9, 1\)"):
        tersor.merge_tokens(input, index, 3, sizes[..., None])
    with pytest.raises(TypeError, match=r"sizes must be torch\.float32 for this input, got torch\.float64"):
        tersor.merge_tokens(input.half(), index, 3, sizes.double())
    with pytest.raises(ValueError, match="sizes must be on the device of input cpu, got meta"):
        tersor.merge_tokens(input, index, 3, sizes.to("meta"))
    with pytest.raises(TypeError, match="sizes must be float16, bfloat16, float32 or float64"):
        tersor.merge_tokens(input, index, 3, index)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"sizes must be above 0, got {wrong}"):
            tersor.merge_tokens(input, index, 3, sizes.clone().fill_diagonal_(wrong))
