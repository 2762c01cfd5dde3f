"""Gradients equal the masked dense ones at every level of skipping, window, stride and memory format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subject import Subject
from torch import Tensor

from tersor.freezing import FreezePlan, freeze_plan, frozen_conv2d, pack_mask

TILE = (4, 3)
TILES = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.int32)  # of which something is free
WINDOW = (2, 1), (1, 0), (1, 2)  # stride, padding, dilation


def mask_of(shape: Any, device: Any = "cpu") -> Tensor:
    """All but the listed tiles, and single elements in these."""
    index = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    rows, columns = torch.arange(shape[0], device=device) // TILE[0], torch.arange(shape[1], device=device) // TILE[1]
    listed = ((rows < 2)[:, None] & (columns < 2)) & ((rows[:, None] + columns) > 0)
    return ~listed[:, :, None, None] | (index % 5 == 3)


def _function(input: Any, weight: Any) -> Tensor:
    frozen = plan = None
    if isinstance(weight, Tensor) and weight.dim() == 4:
        frozen = pack_mask(mask_of(weight.shape, weight.device))
        plan = FreezePlan("tiles", TILES.to(weight.device), TILE, 0.5)
    return frozen_conv2d(input, weight, None, *WINDOW, frozen=frozen, plan=plan)


def _exact(input: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(input, torch.where(mask_of(weight.shape, weight.device), weight.detach(), weight), None, *WINDOW)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    batch, outputs, inputs, height, width = size
    shapes = (batch, inputs, height, width), (outputs, inputs, 3, 2)
    return tuple((torch.randn(*shape) / inputs**0.5 / 2).to(dtype).to(device) for shape in shapes)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    input, weight = _inputs(size, dtype, device)
    grad, frozen = torch.ones_like(F.conv2d(input, weight, None, *WINDOW)), pack_mask(mask_of(weight.shape, device))
    return grad, input, frozen, TILES.to(device), [3, 2], *map(list, WINDOW), *TILE


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("frozen_conv2d_backward",),
        raw=_raw,
        sizes=[(4, 8, 9, 5, 6), (5, 12, 8, 6, 7), (1, 5, 4, 1, 3), (3, 17, 20, 19, 30)],
        surrogate=True,
        alike=False,
        in_forward=False,
        name="frozen_conv2d",
    )
]


CASES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": (2, 0), "stride": (2, 1)},
    {"stride": 3, "dilation": 2, "padding": 2},
    {"kernel": (1, 1), "stride": 2},
    {"padding": 4},
    {"size": (2, 600), "kernel": (1, 5), "padding": (0, 2)},
    {"size": (40, 30), "padding": 1},
    {"batch": 0},
]


def problem(case: dict[str, Any], dtype: torch.dtype, device: str, last: bool) -> tuple[list[Tensor], dict[str, Any]]:
    shape = (9, 7, *case.get("kernel", (3, 2)))
    input = torch.randn(case.get("batch", 2), 7, *case.get("size", (9, 8)))
    input = input.to(memory_format=torch.channels_last) if last else input
    tensors = [t.to(device, dtype).requires_grad_() for t in (input, torch.randn(shape) / 8, torch.randn(9))]
    return tensors, {k: v for k, v in case.items() if k in ("stride", "padding", "dilation")}


@pytest.mark.parametrize("level", ["dense", "tiles", "rows", "columns"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_masked_dense_ones(
    case: dict[str, Any], last: bool, level: str, run: tuple[str, str]
) -> None:
    if run == ("cpu", "triton") and (level != "tiles" or case not in CASES[:4]):
        pytest.skip("Triton's interpreter takes seconds for a call; other levels have no Triton kernel")
    dtype = torch.float32 if run[1] == "triton" else torch.float64
    tensors, window = problem(case, dtype, run[0], last)
    shape = tensors[1].shape
    mask = torch.rand(shape, device=run[0]) < 0.3
    mask[:4, :3] = mask[2] = mask[:, 1] = True
    frozen = pack_mask(mask)
    plan = freeze_plan(frozen, shape, TILE, level=level)
    output, expected = frozen_conv2d(*tensors, **window, frozen=frozen, plan=plan), F.conv2d(*tensors, **window)
    incoming = torch.randn_like(output)
    ours, dense = (torch.autograd.grad(o, tensors, incoming) for o in (output, expected))
    assert torch.equal(output, expected)
    torch.testing.assert_close(ours[0], dense[0])
    torch.testing.assert_close(ours[1], torch.where(mask, 0, dense[1]))
    assert torch.all(ours[1][mask] == 0)
    torch.testing.assert_close(ours[2], dense[2])


def test_groups() -> None:
    input, weight = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    mask = torch.rand(4, 3, 3, 3) < 0.5
    output = frozen_conv2d(input, weight, groups=2, frozen=pack_mask(mask))
    ours = torch.autograd.grad(output.sum(), (input, weight))
    dense = torch.autograd.grad(F.conv2d(input, weight, groups=2).sum(), (input, weight))
    torch.testing.assert_close(ours[0], dense[0])
    torch.testing.assert_close(ours[1], torch.where(mask, 0, dense[1]))


def test_a_frozen_layer_keeps_no_input() -> None:
    weight, input = torch.randn(8, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 9, 9, requires_grad=True)
    kept: list[Tensor] = []
    frozen = pack_mask(torch.ones(8, 4, 3, 3, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = frozen_conv2d(input, weight, padding=1, frozen=frozen)
    assert [t.shape for t in kept] == [(8, 4, 3, 3)], "only the weight, for the input's gradient"
    (expected,) = torch.autograd.grad(F.conv2d(input, weight, padding=1).sum(), input)
    output.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(input.grad, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(1, 5, 9, 9)}, ValueError, r"input must be \(N, C, H, W\) for a weight"),
        ({"weight": torch.zeros(8, 4)}, ValueError, "got shapes"),
        ({"groups": 0}, ValueError, "groups 0"),
        ({"groups": 3, "input": torch.zeros(1, 12, 9, 9)}, ValueError, r"groups must divide the output channels \(8\)"),
        ({"stride": 0}, ValueError, "stride must be an int or two ints of at least 1"),
        ({"padding": "same"}, TypeError, "padding must be an int or two ints, got str"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias must have shape \(8,\)"),
        ({"frozen": torch.zeros(7, dtype=torch.uint8)}, ValueError, r"frozen must have shape \(36,\)"),
        (
            {"plan": FreezePlan("rows", torch.tensor([8]), (1, 1), 0.5, (9, 4))},
            ValueError,
            "plan must be of this weight",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"input": torch.zeros(1, 4, 9, 9), "weight": torch.zeros(8, 4, 3, 3)} | change
    with pytest.raises(error, match=message):
        frozen_conv2d(**arguments)
