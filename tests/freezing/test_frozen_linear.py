"""Gradients equal the masked dense ones at every level of skipping, and nothing is kept for what is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor.freezing import FreezePlan, freeze_plan, frozen_linear, pack_mask

TILE = (4, 3)
TILES = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.int32)  # of which something is free


def mask_of(shape: Any, device: Any = "cpu") -> Tensor:
    """All but the listed tiles, and single elements in these."""
    index = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    rows, columns = torch.arange(shape[0], device=device) // TILE[0], torch.arange(shape[1], device=device) // TILE[1]
    listed = ((rows < 2)[:, None] & (columns < 2)) & ((rows[:, None] + columns) > 0)
    return ~listed | (index % 5 == 3)


def _function(input: Any, weight: Any) -> Tensor:
    frozen = plan = None
    if isinstance(weight, Tensor) and weight.dim() == 2:
        frozen = pack_mask(mask_of(weight.shape, weight.device))
        plan = FreezePlan("tiles", TILES.to(weight.device), TILE, 0.5)
    return frozen_linear(input, weight, None, frozen, plan)


def _exact(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input, torch.where(mask_of(weight.shape, weight.device), weight.detach(), weight))


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    rows, outputs, inputs = size
    shapes = (rows, inputs), (outputs, inputs)
    return tuple((torch.randn(*shape) / shape[1] ** 0.5).to(dtype).to(device) for shape in shapes)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    input, weight = _inputs(size, dtype, device)
    return input.new_ones(size[0], size[1]), input, pack_mask(mask_of(weight.shape, device)), TILES.to(device), *TILE


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("frozen_linear_backward",),
        raw=_raw,
        sizes=[(6, 8, 9), (5, 16, 7), (1, 5, 4), (700, 33, 50)],
        surrogate=True,
        alike=False,
        in_forward=False,
        name="frozen_linear",
    )
]

LEVELS = ("dense", "tiles", "rows", "columns")


def random_mask(shape: Any) -> Tensor:
    mask = torch.rand(shape) < 0.3
    mask[:4, :3] = mask[2] = mask[:, 1] = True
    return mask


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(9, 7), (33, 50), (4, 3)])
def test_gradients_equal_the_masked_dense_ones(level: str, shape: tuple[int, int], run: tuple[str, str]) -> None:
    device = run[0]
    mask = random_mask(shape).to(device)
    if mask.all():
        mask[0, 0] = False
    frozen = pack_mask(mask)
    plan = freeze_plan(frozen, shape, TILE, level=level)
    tensors = [
        t.to(device).requires_grad_() for t in (torch.randn(2, 5, shape[1]), torch.randn(shape), torch.randn(shape[0]))
    ]
    output, expected = frozen_linear(*tensors, frozen, plan), F.linear(*tensors)
    incoming = torch.randn_like(output)
    ours, dense = (torch.autograd.grad(o, tensors, incoming) for o in (output, expected))
    assert torch.equal(output, expected)
    torch.testing.assert_close(ours[0], dense[0])
    torch.testing.assert_close(ours[1], torch.where(mask, 0, dense[1]))
    assert torch.all(ours[1][mask] == 0)
    torch.testing.assert_close(ours[2], dense[2])


@given(
    tokens=st.integers(0, 40),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_tiles(
    tokens: int, shape: tuple[int, int], tile: tuple[int, int], dtype: torch.dtype, masked: bool, seed: int
) -> None:
    """The operator against the float64 product; tiles that are not listed are zero."""
    torch.manual_seed(seed)
    grad_output, input = torch.randn(tokens, shape[0]).to(dtype), torch.randn(tokens, shape[1]).to(dtype)
    grid = torch.rand(-(-shape[0] // tile[0]), -(-shape[1] // tile[1])) < 0.6
    listed = grid.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]
    mask = (torch.rand(shape) < 0.3) & masked
    expected = torch.where(listed & ~mask, grad_output.double().t() @ input.double(), 0)
    tiles = grid.nonzero().to(torch.int32)
    frozen = pack_mask(mask) if masked else None
    given_gradient = torch.ops.tersor.frozen_linear_backward(grad_output, input, frozen, tiles, *tile)
    rounding = max(torch.finfo(dtype).eps, 2.0**-20 if dtype != torch.float64 else 0)
    torch.testing.assert_close(given_gradient.double(), expected, rtol=rounding, atol=8 * rounding)
    assert torch.all(given_gradient[~listed | mask] == 0)


def test_a_frozen_layer_keeps_no_input() -> None:
    weight, input = torch.randn(8, 9, requires_grad=True), torch.randn(50, 9, requires_grad=True)
    kept: list[Tensor] = []
    frozen = pack_mask(torch.ones(8, 9, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = frozen_linear(input, weight, None, frozen)
    assert [t.shape for t in kept] == [(8, 9)], "only the weight, for the input's gradient"
    output.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(input.grad, weight.detach().sum(0).expand(50, 9))


def test_a_plan_without_a_mask_leaves_single_elements_alone() -> None:
    weight, input = torch.randn(9, 7, requires_grad=True), torch.randn(5, 7)
    plan = freeze_plan(pack_mask(mask_of((9, 7))), (9, 7), TILE, level="tiles")
    frozen_linear(input, weight, plan=plan).sum().backward()
    listed = torch.zeros(9, 7, dtype=torch.bool)
    listed[:8, :6] = True
    listed[:4, :3] = False
    torch.testing.assert_close(weight.grad, torch.where(listed, input.sum(0).expand(9, 7), 0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(5, 8)}, ValueError, r"input must be \(..., I\) for a weight \(O, I\), got shapes"),
        ({"weight": torch.zeros(9)}, ValueError, "got shapes"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(9,\), got \(8,\)"),
        ({"bias": torch.zeros(9).double()}, TypeError, "bias must have the dtype of input"),
        ({"frozen": torch.zeros(9, 7, dtype=torch.bool)}, TypeError, "frozen must be a uint8 tensor"),
        ({"frozen": torch.zeros(7, dtype=torch.uint8)}, ValueError, r"frozen must have shape \(8,\)"),
        ({"plan": "tiles"}, TypeError, "plan must be a FreezePlan or None, got str"),
        (
            {"plan": FreezePlan("columns", torch.tensor([8]), (1, 1), 0.5, (9, 9))},
            ValueError,
            "plan must be of this weight",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"input": torch.zeros(5, 7), "weight": torch.zeros(9, 7)} | change
    with pytest.raises(error, match=message):
        frozen_linear(**arguments)


def test_direct_calls_with_wrong_tiles_do_not_reach_memory() -> None:
    for tiles in ([[0, 3]], [[-1, 0]], [[3, 0]]):
        with pytest.raises(RuntimeError, match=r"tiles must lie inside the weight|index|out of"):
            torch.ops.tersor.frozen_linear_backward(
                torch.zeros(5, 9), torch.zeros(5, 7), None, torch.tensor(tiles, dtype=torch.int32), *TILE
            )
