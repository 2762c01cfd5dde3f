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
        sizes=[(2, 8, 9, 5, 6), (1, 12, 8, 4, 7), (1, 5, 4, 1, 3), (3, 17, 20, 19, 30)],
        surrogate=True,
        alike=False,
        in_forward=False,
        name="frozen_conv2d",
    )
]
