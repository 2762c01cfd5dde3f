"""Argument checks shared by the operators: each error names the operator, the argument, what came and what may."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are computed in: float64 for itself, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_int(where: str, **argument: Any) -> int:
    """The one named argument as an int; bool and float are refused."""
    ((name, value),) = argument.items()
    if isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be an int, got bool")
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}") from None


def check_share(where: str, above_zero: bool = False, **argument: Any) -> None:
    """The one named argument is a number from 0 to 1, or above 0 and at most 1."""
    ((name, value),) = argument.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= 1 or (above_zero and value == 0):
        allowed = "above 0 and at most 1" if above_zero else "from 0 to 1"
        raise ValueError(f"{where}: {name} must be {allowed}, got {value}")


def check_floating(where: str, **tensors: Any) -> None:
    """Every named argument is a strided floating-point tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{where}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{where}: {name} must be a strided tensor, got {tensor.layout}")


def check_same(where: str, **tensors: torch.Tensor) -> None:
    """All named tensors have the first one's shape, dtype and device."""
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{where}: {name} must have the shape of {first_name} {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != first.dtype:
            raise TypeError(f"{where}: {name} must have the dtype of {first_name} {first.dtype}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(
                f"{where}: {name} must be on the device of {first_name} {first.device}, got {tensor.device}"
            )


def check_pair(where: str, name: str, value: Any, least: int) -> list[int]:
    """The argument as two ints, for rows and columns; one int stands for both."""
    if isinstance(value, (str, bytes)) or not isinstance(value, (int, Sequence)):
        raise TypeError(f"{where}: {name} must be an int or two ints, got {type(value).__name__}")
    pair = [as_int(where, **{name: v}) for v in ([value, value] if isinstance(value, int) else value)]
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{where}: {name} must be an int or two ints of at least {least}, got {value!r}")
    return pair


def check_window(
    where: str, stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Each as two ints, for rows and columns."""
    return (
        check_pair(where, "stride", stride, 1),
        check_pair(where, "padding", padding, 0),
        check_pair(where, "dilation", dilation, 1),
    )
