"""Gradients equal the masked dense ones at every level of skipping, and nothing is kept for what is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
