"""Two opposite percentiles of a tensor on GPUs, by torch's sort: no kernel of its own, and no waiting for the GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def percentile_bounds(input: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::percentile_bounds``; unlike the reference it makes no float64 copy of all elements."""
    ordered = input.flatten().sort().values
    lower, upper = (_interpolate(ordered, percent) for percent in (100 - percentile, percentile))
    return lower, upper


def _interpolate(ordered: Tensor, percent: float) -> Tensor:
    """One percentile, ``(1,)``, in the arithmetic of the reference."""
    last = len(ordered) - 1
    place = last * percent / 100
    before = math.floor(place)
    after, t = min(before + 1, last), place - before
    a, b = ordered[before : before + 1].double(), ordered[after : after + 1].double()
    bound = a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)
    end = ordered[last:].double()
    return torch.where(end.isnan(), end, bound).float()  # NaN sorts last
