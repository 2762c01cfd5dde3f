"""Coarse tokens that give way to finer ones: order, index arithmetic, adjoint, both modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

OPERATORS = ("resplit_tokens_forward", "resplit_tokens_backward")
ALPHA = 0.5
# batch, side, channels
SIZES = [(3, 2, 7), (4, 2, 6), (1, 2, 1), (2, 4, 16), (3, 7, 33), (2, 9, 8)]
Size = tuple[int, ...]


def _scores(batch: int, count: int, device: str = "cpu") -> Tensor:
    """Few levels, so that many are equal."""
    place = torch.arange(batch * count, device=device).view(batch, count)
    return ((place * 11 + 5) % 7).float() / 8


def _order(batch: int, count: int, device: str = "cpu") -> Tensor:
    return torch.argsort(_scores(batch, count, device), dim=1, descending=True, stable=True)


def _shape_of(coarse: Any) -> tuple[Any, ...]:
    return (coarse.shape[0], coarse.shape[1] - 1, str(coarse.device)) if isinstance(coarse, Tensor) else (1, 1)


def _function(coarse: Any, fine: Tensor, reuse: Tensor, position: Tensor, cls: Tensor) -> Tensor:
    scores = _scores(*_shape_of(coarse)) if not isinstance(coarse, Tensor) or coarse.dim() == 3 else None
    return tersor.resplit_tokens(scores, coarse, fine, reuse, position, cls, ALPHA)[0]


def _selected(coarse: Any, fine: Tensor, reuse: Tensor, cls: Tensor) -> Tensor:
    order = _order(*_shape_of(coarse)) if not isinstance(coarse, Tensor) or coarse.dim() == 3 else None
    return tersor.resplit_tokens(None, coarse, fine, reuse, None, cls, ALPHA, order=order)[0]


def _loop(fine: Tensor, coarse: Tensor, first: Tensor, order: Tensor, alpha: float = ALPHA) -> Tensor:
    """Token by token, from rows and columns; ``fine`` holds all patches of the fine grid."""
    samples = []
    for b, own in enumerate(order.tolist()):
        side, chosen = math.isqrt(len(own)), math.ceil(alpha * len(own))
        rows = [first[b, 0]]
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            for i in own[:chosen]:
                row, column = divmod(i, side)
                rows.append(fine[b, (2 * row + down) * 2 * side + 2 * column + right])
        rows.extend(coarse[b, 1 + i] for i in own[chosen:])
        samples.append(torch.stack(rows))
    return torch.stack(samples)


def _upsample(reuse: Tensor) -> Tensor:
    side = math.isqrt(reuse.shape[1])
    wide = reuse.unflatten(1, (side, side)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return wide.flatten(1, 2)


def _exact(coarse: Tensor, fine: Tensor, reuse: Tensor, position: Tensor, cls: Tensor) -> Tensor:
    every = fine + _upsample(reuse) + position[:, 1:]
    first = (cls + position[:, :1]).expand(len(coarse), -1, -1)
    return _loop(every, coarse, first, _order(*_shape_of(coarse)))


def _exact_selected(coarse: Tensor, fine: Tensor, reuse: Tensor, cls: Tensor) -> Tensor:
    chosen = reuse.shape[1]
    left = [sample[1 + own[chosen:]] for sample, own in zip(coarse, _order(*_shape_of(coarse)), strict=True)]
    return torch.cat([cls.expand(len(coarse), -1, -1), fine + reuse.repeat(1, 4, 1), torch.stack(left)], 1)


def _inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    batch, side, channels = size
    count = side * side
    shapes = [
        (batch, 1 + count, channels), (batch, 4 * count, channels), (batch, count, channels),
        (1, 1 + 4 * count, channels), (1, 1, channels),
    ]  # fmt: skip
    return tuple(torch.randn(s, dtype=dtype, device=device) for s in shapes)


def _selected_inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    coarse, fine, reuse, _, _ = _inputs(size, dtype, device)
    chosen = math.ceil(ALPHA * reuse.shape[1])
    cls = torch.randn(size[0], 1, size[2], dtype=dtype, device=device)
    return coarse, fine[:, : 4 * chosen].contiguous(), reuse[:, :chosen].contiguous(), cls


def _raw(name: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    batch, side, channels = size
    chosen = math.ceil(ALPHA * side**2)
    if name == OPERATORS[0]:
        return (*_inputs(size, dtype, device), _scores(batch, side**2, device), None, chosen)
    grad = torch.randn(batch, 1 + 3 * chosen + side**2, channels, dtype=dtype, device=device)
    return grad, _order(batch, side**2, device), chosen, False, True, True, True, True, 1


def _raw_selected(name: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    batch, side, _ = size
    chosen, order = math.ceil(ALPHA * side**2), _order(batch, side**2, device)
    if name == OPERATORS[0]:
        coarse, fine, reuse, cls = _selected_inputs(size, dtype, device)
        return coarse, fine, reuse, None, cls, None, order, chosen
    grad = _raw(name, size, dtype, device)[0]
    return grad, order, chosen, True, True, True, True, False, batch


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), OPERATORS, _raw, SIZES, autocast=False, alike=False, name="resplit_tokens",
    ),
    Subject(
        _selected, _exact_selected, _selected_inputs, (), OPERATORS, _raw_selected, SIZES, autocast=False, alike=False,
        name="resplit_tokens_selected",
    ),
]  # fmt: skip


@given(
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(1, 9),
    st.floats(0.01, 1.0),
    st.booleans(),
    st.booleans(),
    st.sampled_from((torch.float32, torch.float64)),
)
def test_any_shape(
    batch: int, side: int, channels: int, alpha: float, reused: bool, placed: bool, dtype: torch.dtype
) -> None:
    coarse, fine, reuse, position, _ = (t.requires_grad_() for t in _inputs((batch, side, channels), dtype, "cpu"))
    cls = torch.randn(batch, 1, channels, dtype=dtype, requires_grad=True)
    scores = torch.randint(0, 4, (batch, side**2)).to(dtype)
    tensors = [coarse, fine, *([reuse] if reused else []), *([position] if placed else []), cls]
    tokens, order = tersor.resplit_tokens(
        scores, coarse, fine, reuse if reused else None, position if placed else None, cls, alpha
    )
    assert torch.equal(order, torch.argsort(scores, dim=1, descending=True, stable=True))
    chosen = math.ceil(alpha * side**2)
    assert tokens.shape == (batch, 1 + 3 * chosen + side**2, channels)
    if batch == 0:
        assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(tokens.sum(), tensors))
        return
    every, first = fine, cls
    if reused:
        every = every + _upsample(reuse)
    if placed:
        every, first = every + position[:, 1:], first + position[:, :1]
    expected = _loop(every, coarse, first, order, alpha)
    assert torch.equal(tokens, expected)
    grad = torch.randn_like(tokens)
    given = torch.autograd.grad(tokens, tensors, grad)
    wanted = torch.autograd.grad(expected, tensors, grad, allow_unused=True)
    for g, e in zip(
        given, (torch.zeros_like(t) if w is None else w for w, t in zip(wanted, tensors, strict=True)), strict=True
    ):
        torch.testing.assert_close(g, e)

    index, left = tersor.resplit_index(order, alpha)
    chosen_fine = tersor.gather_tokens(fine, index)
    chosen_reuse = tersor.gather_tokens(reuse, order[:, :chosen]) if reused else None
    again, same = tersor.resplit_tokens(
        None, coarse, chosen_fine, chosen_reuse, position if placed else None, cls, alpha, order=order
    )
    assert same is order
    assert left.shape == (batch, side**2 - chosen)
    assert torch.equal(again, tokens)
    for g, e in zip(torch.autograd.grad(again, tensors, grad), given, strict=True):
        torch.testing.assert_close(g, e)


def test_published_numbers() -> None:
    """7 x 7: 25 tokens are split, 125 in the sequence; 9 x 9: 41 and 205; and 0.3 of 100 is 30, not 31."""
    for side, alpha, chosen in ((7, 0.5, 25), (9, 0.5, 41), (10, 0.3, 30)):
        index, left = tersor.resplit_index(torch.arange(side**2)[None], alpha)
        assert index.shape == (1, 4 * chosen)
        assert 1 + index.shape[1] + left.shape[1] == {7: 125, 9: 205, 10: 191}[side]
    first = tersor.resplit_index(torch.arange(49)[None])[0][0]
    assert first[[0, 1, 25, 50, 75]].tolist() == [0, 2, 1, 14, 15]  # children of coarse patch 0, and the next patch's


def test_an_order_out_of_range_harms_nothing(run: tuple[str, str]) -> None:
    coarse, fine, reuse, position, cls = _inputs((2, 2, 3), torch.float32, run[0])
    order = torch.tensor([[0, 9, 2, 3], [-5, 1, 4, 2**62]], device=run[0])
    chosen = 2
    fine, reuse = fine[:, : 4 * chosen], reuse[:, :chosen]
    if run[0] == "cpu":
        with pytest.raises(ValueError, match="resplit_tokens: index must be from 0 to 3"):
            tersor.resplit_tokens(None, coarse, fine, reuse, position, cls, order=order)
    tokens, _ = torch.ops.tersor.resplit_tokens_forward(coarse, fine, reuse, position, cls, None, order, chosen)
    assert tokens[1, -2:].isnan().all()
    torch.ops.tersor.resplit_tokens_backward(tokens, order, chosen, True, True, True, True, True, 1)
    torch.ops.tersor.resplit_tokens_backward(tokens, order, chosen, False, True, True, True, True, 2)


def test_bad_input() -> None:
    coarse, fine, reuse, position, cls = _inputs((2, 3, 5), torch.float32, "cpu")
    scores = torch.rand(2, 9)

    def call(**changed: Any) -> Any:
        given = {
            "scores": scores, "coarse": coarse, "fine_patches": fine, "reuse": reuse, "position": position, "cls": cls,
        }  # fmt: skip
        return tersor.resplit_tokens(**(given | changed))

    for alpha in (0.0, 1.5, -1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be above 0 and at most 1, got"):
            call(alpha=alpha)
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        call(alpha="half")
    with pytest.raises(ValueError, match="coarse tokens must fill a square grid, got 8 of them"):
        call(coarse=coarse[:, :-1])
    with pytest.raises(ValueError, match=r"fine_patches must be \(2, 36, 5\) for this coarse, got shape \(2, 35, 5\)"):
        call(fine_patches=fine[:, 1:])
    with pytest.raises(ValueError, match=r"scores must be \(2, 9\) for this coarse, got shape \(2, 8\)"):
        call(scores=scores[:, 1:])
    with pytest.raises(ValueError, match=r"cls must be \(1, 1, 5\)"):
        call(cls=cls[0])
    with pytest.raises(TypeError, match="reuse must have the dtype of coarse"):
        call(reuse=reuse.double())
    with pytest.raises(ValueError, match="position must be on the device of coarse cpu, got meta"):
        call(position=position.to("meta"))
    with pytest.raises(ValueError, match="scores must not be NaN, got 1 that are"):
        call(scores=torch.where(torch.arange(18).view(2, 9) == 3, float("nan"), scores))
    with pytest.raises(ValueError, match="one of scores and order must be given, got none"):
        call(scores=None)
    with pytest.raises(ValueError, match="one of scores and order must be given, got both"):
        call(order=torch.zeros(2, 9, dtype=torch.int64), fine_patches=fine[:, :20], reuse=reuse[:, :5])
    with pytest.raises(ValueError, match=r"order must be \(2, 9\), got shape \(2, 8\)"):
        call(scores=None, order=torch.zeros(2, 8, dtype=torch.int64), fine_patches=fine[:, :20], reuse=reuse[:, :5])
    with pytest.raises(TypeError, match="order must be an int64 tensor"):
        tersor.resplit_index(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"order must be \(B, N\)"):
        tersor.resplit_index(torch.zeros(9, dtype=torch.int64))


def test_autocast_takes_the_widest(run: tuple[str, str]) -> None:
    if run == ("cpu", "triton"):
        pytest.skip("Triton's interpreter is wrong for bfloat16")
    coarse, fine, reuse, position, cls = _inputs((2, 3, 5), torch.float32, run[0])
    scores = _scores(2, 9, run[0])
    with torch.autocast(run[0], torch.bfloat16):
        tokens, _ = tersor.resplit_tokens(scores, coarse, fine.bfloat16(), reuse.bfloat16(), position, cls)
        low, _ = tersor.resplit_tokens(scores, *(t.bfloat16() for t in (coarse, fine, reuse, position, cls)))
    assert (tokens.dtype, low.dtype) == (torch.float32, torch.bfloat16)
