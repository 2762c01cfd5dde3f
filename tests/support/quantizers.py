"""Inputs for the quantisers' subjects: values on, between and far outside the levels, and exact ties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from subject import Subject
from torch import Tensor

SIZES = ((2, 3, 4, 5), (4, 2, 3, 7), (3, 1, 1, 1), (2, 5, 33, 17), (2, 64, 30, 31))
ALONG = {"": (), "_per_sample": (0,), "_per_channel": (1,)}


def values(size: Sequence[int], dtype: torch.dtype, device: str, span: float = 3.0) -> Tensor:
    """Random, and in between multiples of 1/8: bounds, levels and ties of power-of-two scales among them."""
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(*size, generator=generator) * span / 2
    steps = torch.randint(-24, 25, size, generator=generator) / 8
    return torch.where(torch.rand(*size, generator=generator) < 0.3, steps, x).to(dtype).to(device)


def parameter(size: Sequence[int], along: str, value: float, step: float, dtype: torch.dtype, device: str) -> Tensor:
    """``value``, ``value + step``, ... along the dimension that ``along`` names; of the dtype parameters have."""
    shape = [n if i in ALONG[along] else 1 for i, n in enumerate(size)] if along else [1]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    count = torch.Size(shape).numel()
    return (value + step * torch.arange(count, dtype=exact)).reshape(shape).to(device)


def subject(
    function: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    operator: str,
    parameters: Sequence[tuple[float, float]],
    options: tuple[Any, ...],
    constants: tuple[Any, ...],
    along: str = "",
    name: str = "",
    inputs: int = 1,
) -> Subject:
    """A quantiser's subject; a parameter is (first value, step along the dimension), ``constants`` the operator's."""

    def make(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        data = [values(size, dtype, device, 3.0 + i) for i in range(inputs)]
        return *data, *[parameter(size, along, *p, dtype, device) for p in parameters]

    def raw(which: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        tensors = make(size, dtype, device)
        grad = (torch.ones_like(tensors[0]),) if which.endswith("_backward") else ()
        return *grad, *tensors, *constants

    return Subject(
        function=lambda *tensors: function(*tensors, *options),
        exact=exact,
        inputs=make,
        options=(),
        operators=(f"{operator}_forward", f"{operator}_backward"),
        raw=raw,
        sizes=SIZES,
        quantizer=True,
        data=inputs,
        name=(name or operator) + along,
    )
