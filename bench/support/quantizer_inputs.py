"""Inputs that every right implementation quantises alike: nothing near a tie, where a last bit decides the level."""

from __future__ import annotations

import torch
from gate import default_tolerance
from torch import Tensor


def between_ties(shape: tuple[int, ...], step: float, low: int, high: int, generator: torch.Generator) -> Tensor:
    """``step`` times whole numbers from ``low`` to ``high``, each moved by up to 0.4 steps."""
    whole = torch.randint(low, high + 1, shape, generator=generator)
    return step * (whole + 0.8 * (torch.rand(shape, generator=generator) - 0.5))


def in_float32(function):
    """The reference for float64 copies of inputs: quantised in float32, as every implementation does it."""
    return lambda *tensors: function(*(t.float() for t in tensors)).to(tensors[0].dtype)


def tolerance(dtype: torch.dtype, name: str) -> float:
    """Gradients of parameters are sums of up to 16 million float32 numbers of both signs, which others add up in
    float32 too; all else as everywhere."""
    return 2e-4 if name.startswith("gradient") and name != "gradient 0" else default_tolerance(dtype, name)
