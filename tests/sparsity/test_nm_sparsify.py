"""The mask is what alive combinations keep, in any layout; gradients as torch's own of the written chain."""

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
from tersor.sparsity import nm_combinations, nm_remove_, nm_sparsify

N, M = 2, 4


def scores_of(weight: Tensor, n: int = N, m: int = M) -> Tensor:
    """About a third of them alive, some of those negative."""
    generator = torch.Generator().manual_seed(weight.numel())
    shape = weight.numel() // m, math.comb(m, n)
    values = torch.randn(shape, generator=generator)
    values = torch.where(torch.rand(shape, generator=generator) < 0.6, 0, values)
    return values.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)


class Written(torch.autograd.Function):
    """The formulas as they stand: the mask's gradient passes its binarisation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, scores, n, m):
        kept = (scores != 0).to(scores) @ nm_combinations(n, m).to(scores) > 0
        return _ordered(torch.where(kept, _groups(weight, m), 0), weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, ctx.n, ctx.m = inputs
        ctx.save_for_backward(weight, scores)

    @staticmethod
    def backward(ctx, grad):
        weight, scores = ctx.saved_tensors
        table = nm_combinations(ctx.n, ctx.m).to(scores)
        kept = (scores != 0).to(scores) @ table > 0
        products = _groups(grad, ctx.m).to(scores) * _groups(weight, ctx.m).to(scores)
        grad_weight = _ordered(torch.where(kept, _groups(grad, ctx.m), 0), weight)
        return grad_weight, torch.where(scores != 0, products @ table.t(), 0), None, None


def _groups(weight: Tensor, m: int) -> Tensor:
    return (weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight).reshape(-1, m)


def _ordered(groups: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return groups.reshape(weight.shape)
    outputs, inputs, height, width = weight.shape
    return groups.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)


def chain(weight: Tensor, scores: Tensor, n: int = N, m: int = M) -> Tensor:
    return Written.apply(weight, scores, n, m)


def _function(weight: Any, scores: Any) -> Tensor:
    return nm_sparsify(weight, scores, N, M)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    weight = torch.randn(*size).to(dtype).to(device)
    return weight, scores_of(weight)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight, scores = _inputs(size, dtype, device)
    if name.endswith("_forward"):
        return weight, scores, None, N, M
    mask = torch.ops.tersor.nm_sparsify_forward(weight, scores, None, N, M)[1]
    return torch.ones_like(weight), weight, scores, mask, N, M


def _numbers(scores: Any) -> Any:
    """Of five scores in each group, not the same in all groups; torch.compile takes equal sizes for one, so no 3."""
    if not isinstance(scores, Tensor) or scores.dim() != 2:
        return None
    few = torch.tensor([[0, 1, 2, 4, 5], [0, 2, 3, 4, 5]], dtype=torch.uint8, device=scores.device)
    return few[torch.arange(scores.shape[0], device=scores.device) % 2]


def _full(scores: Tensor) -> Tensor:
    return scores.new_zeros(scores.shape[0], 6).scatter(1, _numbers(scores).long(), scores)


def _compact(weight: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    return weight, scores[:, :5].contiguous()


def _raw_compact(name: str, weight: Tensor, scores: Tensor) -> tuple[Any, ...]:
    numbers = _numbers(scores)
    if name.endswith("_forward"):
        return weight, scores, None, N, M, numbers
    mask = torch.ops.tersor.nm_sparsify_forward(weight, scores, None, N, M, numbers)[1]
    return torch.ones_like(weight), weight, scores, mask, N, M, numbers


SUBJECTS = [
    Subject(
        function=_function,
        exact=chain,
        inputs=_inputs,
        options=(),
        operators=("nm_sparsify_forward", "nm_sparsify_backward"),
        raw=_raw,
        sizes=[(4, 8, 3, 3), (3, 12, 2, 2), (4, 6, 1, 2), (33, 64, 3, 3)],
        surrogate=True,
        alike=False,
        autocast=False,
        dtypes=(torch.float32,),  # the scores have it, whatever the weight is in
        name="nm_sparsify",
    ),
    Subject(
        function=lambda weight, scores: nm_sparsify(weight, scores, N, M, combinations=_numbers(scores)),
        exact=lambda weight, scores: chain(weight, _full(scores)),
        inputs=lambda size, dtype, device: _compact(*_inputs(size, dtype, device)),
        options=(),
        operators=("nm_sparsify_forward", "nm_sparsify_backward"),
        raw=lambda name, size, dtype, device: _raw_compact(name, *_compact(*_inputs(size, dtype, device))),
        sizes=[(4, 8, 3, 3), (3, 12, 2, 2), (4, 6, 1, 2), (33, 64, 3, 3)],
        surrogate=True,
        alike=False,
        autocast=False,
        dtypes=(torch.float32,),
        name="nm_sparsify_compact",
    ),
]


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 16), (5, 7), (2, 3)]),
    kernel=st.sampled_from([None, (1, 1), (3, 3), (1, 2)]),
    last=st.booleans(),
    cached=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_pattern_and_layout(
    pattern: tuple[int, int], kernel: tuple[int, int] | None, last: bool, cached: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    n, m = pattern
    shape = (m, 5) if kernel is None else (m, 5, *kernel)  # a group crosses rows unless m divides 5
    weight = torch.randn(shape).to(dtype)
    if last and kernel is not None:
        weight = weight.to(memory_format=torch.channels_last)
    scores = scores_of(weight, n, m)
    mask = nm_remove_(scores, math.comb(m, n) // 2, n, m) if cached else None
    weight.requires_grad_()
    scores.requires_grad_()
    output, expected = nm_sparsify(weight, scores, n, m, mask), chain(weight, scores, n, m)
    incoming = torch.randn(shape).to(dtype)
    assert torch.equal(output, expected)
    assert output.stride() == weight.stride()
    ours, theirs = (torch.autograd.grad(o, (weight, scores), incoming) for o in (output, expected))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    assert torch.all(ours[1][scores == 0] == 0)


def test_negative_scores_are_alive_and_zero_is_not() -> None:
    weight, scores = torch.ones(1, 4), torch.zeros(1, 6)
    scores[0, 1] = -0.5  # keeps 0 and 2
    scores[0, 3] = -0.0
    assert nm_sparsify(weight, scores, 2, 4).tolist() == [[1, 0, 1, 0]]
    scores[0, 4] = 0.5  # keeps 1 and 3; the sum of both is 0 nowhere
    assert nm_sparsify(weight, scores, 2, 4).tolist() == [[1, 1, 1, 1]]


def test_the_table_is_lexicographic() -> None:
    rows = [row.nonzero().flatten().tolist() for row in nm_combinations(2, 4)]
    assert rows == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert nm_combinations(4, 8).shape == (70, 8)


def test_what_is_kept_for_the_backward_pass() -> None:
    weight, scores = torch.randn(64, 64, requires_grad=True), torch.full((1024, 6), 1 / 3, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nm_sparsify(weight, scores, 2, 4)
    extra = [t for t in kept if t.data_ptr() not in (weight.data_ptr(), scores.data_ptr())]
    assert [(t.dtype, t.numel()) for t in extra] == [(torch.uint8, 4096 // 8)], "one bit per weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 4}, ValueError, "n and m must satisfy 1 <= n < m <= 16, got 4:4"),
        ({"n": 0}, ValueError, "got 0:4"),
        ({"m": 17}, ValueError, "got 2:17"),
        ({"n": 7, "m": 15}, ValueError, "7:15 has 6435 combinations, more than 4096"),
        ({"n": 1, "m": 7}, ValueError, "m must divide the 32 elements of the weight"),
        ({"n": 2.0}, TypeError, "n must be an int"),
        ({"weight": torch.zeros(32)}, ValueError, "weight must be"),
        ({"scores": torch.zeros(8, 5)}, ValueError, r"scores must have shape \(8, 6\), got \(8, 5\)"),
        ({"scores": torch.zeros(7, 6)}, ValueError, r"scores must have shape \(8, 6\), got \(7, 6\)"),
        ({"scores": torch.zeros(8, 6).bfloat16()}, TypeError, r"scores must be torch\.float32, got torch\.bfloat16"),
        ({"mask": torch.zeros(5, dtype=torch.uint8)}, ValueError, r"frozen must have shape|mask must have shape"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weight": torch.zeros(4, 8), "scores": torch.zeros(8, 6), "n": 2, "m": 4} | change
    with pytest.raises(error, match=message):
        nm_sparsify(**arguments)


def test_direct_calls_with_wrong_sizes_do_not_reach_memory(run: tuple[str, str]) -> None:
    weight = torch.zeros(4, 8, device=run[0])
    for scores, mask in ((weight.new_zeros(7, 6), None), (weight.new_zeros(8, 6), torch.zeros(1, dtype=torch.uint8))):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.tersor.nm_sparsify_forward(weight, scores, mask, 2, 4)


def test_mask_bits_follow_the_groups() -> None:
    weight = torch.randn(2, 4, 1, 2)
    scores = torch.zeros(4, 6)
    scores[:, 0] = 1  # keeps 0 and 1
    mask = torch.ops.tersor.nm_sparsify_forward(weight, scores, None, 2, 4)[1]
    assert unpack_mask(mask, (4, 4)).tolist() == [[True, True, False, False]] * 4
    output = nm_sparsify(weight, scores, 2, 4)
    assert torch.equal(output[:, :2], weight[:, :2])
    assert not output[:, 2:].any()
