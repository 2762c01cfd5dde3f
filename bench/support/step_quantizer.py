"""The suite of a quantiser that learns a step or a clipping value, against its chain of torch operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import settings
import torch
from quantizer_inputs import between_ties, in_float32, tolerance
from suite import Implementation, Suite

CUDA = settings.device() == "cuda"


class Round(torch.autograd.Function):
    """Rounding that passes the gradient, as every published chain has it."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def suite(
    operator: str,
    ours: Callable[..., Any],
    chain: Callable[..., Any],
    parameters: Sequence[float],
    step: float,
    levels: tuple[int, int],
) -> Suite:
    """``ours`` and ``chain`` take the input and the parameters; inputs go a third beyond the ``levels``."""
    low, high = levels
    beyond = (high - low) // 3

    def make_inputs(size, dtype, device, generator):
        x = between_ties(size, step, low - beyond, high + beyond, generator).to(device, dtype)
        return x, *[torch.tensor([p], device=device) for p in parameters]

    def traffic(size, element_bytes, direction):
        tensors = 2 if direction == "forward" else 5
        return tensors * math.prod(size) * element_bytes, 8 * math.prod(size)

    implementations = [
        Implementation("tersor", lambda size: ours, ours=True, note="the default backend"),
        Implementation("eager", lambda size: chain, note="the chain of torch operations"),
    ]
    if CUDA:
        implementations.append(Implementation("triton", lambda size: ours, ours=True, backend="triton", note="Triton"))
    return Suite(
        operator=operator,
        sizes={"edsr_b2": (2, 64, 48, 48)} if settings.QUICK else {"edsr_b16": (16, 64, 48, 48)},
        small=(2, 3, 17, 19),
        make_inputs=make_inputs,
        traffic=traffic,
        reference=lambda size: in_float32(ours),
        implementations=implementations,
        operators=[f"{operator}_forward", f"{operator}_backward"],
        tolerance=tolerance,
    )
