"""Two opposite percentiles of a tensor, without moving it to the host."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import operator
from tersor.quantization._quantizer import exact_dtype


def percentile_bounds(input: Tensor, percentile: float = 99.0) -> tuple[Tensor, Tensor]:
    """The ``100 - percentile``-th and the ``percentile``-th percentile of all elements.

    The p-th percentile lies at place (elements - 1) p / 100 among the sorted elements, between two of them by linear
    interpolation, as numpy does it; interpolated in float64.

    Args:
        input: any shape, at least one element; float16, bfloat16, float32 or float64. Taken without its gradient.
        percentile: from 50 to 100.

    Returns:
        Lower and upper, each of shape ``(1,)``, in float32 (float64 for float64). NaN if an element is NaN.

    Raises:
        TypeError: ``input`` is not a floating-point tensor.
        ValueError: ``input`` is empty or ``percentile`` out of range.
    """
    name = "percentile_bounds"
    check_floating(name, input=input)
    if not input.numel():
        raise ValueError(f"{name}: input must have at least one element, got shape {tuple(input.shape)}")
    lower, upper = _percentile_bounds.overload(input.detach(), check_percentile(name, percentile))
    return lower, upper


def check_percentile(where: str, percentile: float) -> float:
    """``percentile`` as a float from 50 to 100."""
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)):
        raise TypeError(f"{where}: percentile must be a number, got {type(percentile).__name__}")
    if not 50 <= percentile <= 100:
        raise ValueError(f"{where}: percentile must be from 50 to 100, got {percentile}")
    return float(percentile)


def interpolate_percentiles(input: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The reference: sorted, then interpolated the way numpy rounds it."""
    ordered = input.flatten().sort().values.double()
    bounds = []
    for percent in (100 - percentile, percentile):
        place = (len(ordered) - 1) * percent / 100
        before = math.floor(place)
        a, b, t = ordered[before], ordered[min(before + 1, len(ordered) - 1)], place - before
        bound = a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)
        bound = torch.where(ordered[-1].isnan(), ordered[-1], bound)  # NaN sorts last
        bounds.append(bound.to(exact_dtype(input.dtype)).reshape(1))
    return bounds[0], bounds[1]


def _fake(input: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    dtype = exact_dtype(input.dtype)
    return input.new_empty((1,), dtype=dtype), input.new_empty((1,), dtype=dtype)


def _vmap(info: Any, in_dims: Any, input: Tensor, percentile: float) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    bounds = [_percentile_bounds.overload(x, percentile) for x in input.unbind(in_dims[0])]
    return (torch.stack([b[0] for b in bounds]), torch.stack([b[1] for b in bounds])), (0, 0)


_percentile_bounds = operator(
    "percentile_bounds(Tensor input, float percentile) -> (Tensor lower, Tensor upper)",
    reference=interpolate_percentiles,
    fake=_fake,
    vmap=_vmap,
)
