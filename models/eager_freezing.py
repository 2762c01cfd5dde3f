"""Freezing in the plain-torch way that the package replaces: the peer in benchmarks and in the training job."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.freezing import FreezeSchedule


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output


def unit(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Place between the bounds, and the level in [0, 1]."""
    levels = 2**bits - 1
    place = (x - lower) / (upper - lower)
    return place, _RoundThrough.apply(place.clamp(0, 1) * levels) / levels


class EagerLtsWeight(nn.Module):
    """One weight's quantiser with four buffers of its shape, all replaced in every step; masks the dense gradient."""

    previous: Tensor
    distance: Tensor
    frozen: Tensor
    saved: Tensor

    def __init__(self, weight: Tensor, bits: int, schedule: FreezeSchedule | None = None) -> None:
        super().__init__()
        self.bits, self.schedule, self.step = bits, schedule, -1
        self.lower, self.upper = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        for name in ("previous", "distance", "frozen", "saved"):
            self.register_buffer(name, torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        free = (self.frozen == 0).float()
        effective = weight * free + self.saved * (1 - free)
        self.saved = effective.detach().clone()
        place, level = unit(effective, self.lower, self.upper, self.bits)
        if self.training and self.schedule is not None:
            self._evolve(place.detach(), level.detach(), self.schedule)
        return (level - 0.5) * 2

    def _evolve(self, place: Tensor, level: Tensor, schedule: FreezeSchedule) -> None:
        levels = 2**self.bits - 1
        away = (place - level).abs()
        if self.step == 0:
            self.distance = away
        else:
            self.distance = (1 - schedule.momentum) * away + schedule.momentum * self.distance
            moved = (level != self.previous).float()
            self.distance = self.distance * (1 - moved) + moved / levels
        self.previous = level
        self.step += 1
        if self.step > schedule.warmup_steps:
            part = (self.step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
            rate = {"fixing": schedule.rate, "linear": part, "sine": math.sin(math.pi / 2 * part)}[schedule.growth]
            settled = ((self.distance <= rate / levels) & (self.frozen == 0)).float()
            self.frozen = self.frozen * (1 - settled) + self.step * settled


class _Eager:
    weight: Tensor

    def _configure(self, bits: int, schedule: FreezeSchedule | None) -> None:
        self.quantize_weight = EagerLtsWeight(self.weight, bits, schedule)
        self.input_lower, self.input_upper = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def quantized(self, input: Tensor) -> tuple[Tensor, Tensor]:
        quantizer = self.quantize_weight
        return unit(input, self.input_lower, self.input_upper, quantizer.bits)[1], quantizer(self.weight)


class EagerLtsConv2d(_Eager, nn.Conv2d):
    """``torch.nn.Conv2d`` with the arguments of :class:`tersor.LtsConv2d`."""

    def __init__(self, *args: Any, bits: int, schedule: FreezeSchedule | None = None, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._configure(bits, schedule)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(*self.quantized(input), self.bias)


class EagerLtsLinear(_Eager, nn.Linear):
    """``torch.nn.Linear`` with the arguments of :class:`tersor.LtsLinear`."""

    def __init__(self, *args: Any, bits: int, schedule: FreezeSchedule | None = None, **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._configure(bits, schedule)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(*self.quantized(input), self.bias)
