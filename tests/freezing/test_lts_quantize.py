"""Quantising and freezing: bit by bit like the reference over whole trainings, blocks, resumption, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantizers import SIZES, parameter, values
from straight_through import unit
from subject import Subject
from torch import Tensor

import tersor
from tersor.freezing import FreezeSchedule, LtsState, lts_quantize, lts_state, mask_size, unpack_mask

SCHEDULE = FreezeSchedule(batches_per_epoch=2, epochs=5, warmup_epochs=1, momentum=0.8)
PATTERN = 0x92  # of each eight elements, those that are frozen


def pattern(weight: Tensor) -> Tensor:
    return (PATTERN >> torch.arange(weight.numel(), device=weight.device) % 8 & 1).bool().view(weight.shape)


def state_of(weight: Any) -> LtsState:
    state = lts_state(weight.detach())
    state.frozen.copy_(torch.zeros_like(state.frozen) + PATTERN)
    return state


def _function(weight: Any, lower: Tensor, upper: Tensor) -> Tensor:
    strided = isinstance(weight, Tensor) and weight.is_floating_point() and weight.layout == torch.strided
    state = state_of(weight if strided else torch.zeros(1, 1, 1, 1))
    return lts_quantize(weight, state, lower, upper, 3, SCHEDULE)


def _exact(weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Frozen elements have the saved value 0 here, no gradient of their own, and keep moving the bounds."""
    return unit(torch.where(pattern(weight), 0, weight), lower, upper, 3, signed=True)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    bounds = [parameter(size, "", value, 0, dtype, device) for value in (-1.25, 1.5)]
    return values(size, dtype, device), *bounds


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight, lower, upper = _inputs(size, dtype, device)
    if name.endswith("_backward"):
        return torch.ones_like(weight), weight, torch.zeros_like(weight), lower, upper, state_of(weight).frozen
    return weight, lower, upper, *state_of(weight), 3, True, "linear", 0.1, 0.8, 2, 10, 1, 1, 1.0


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("lts_quantize_forward", "lts_quantize_backward"),
        raw=_raw,
        sizes=SIZES,
        quantizer=True,
        changes=True,
        name="lts_quantize",
    )
]
