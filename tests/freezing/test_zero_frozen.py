"""The frozen elements are zero, all others untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject import Subject
from torch import Tensor

from tersor.freezing import pack_mask, zero_frozen


def mask_of(shape: Any, device: str = "cpu") -> Tensor:
    """A mask with whole bytes and words of ones and zeros in it."""
    count = torch.Size(shape).numel()
    index = torch.arange(count, device=device)
    return ((index % 7 < 2) | ((index // 64) % 3 == 1)).view(shape)


def _function(input: Any) -> Tensor:
    shape = input.shape if isinstance(input, Tensor) else (1,)
    frozen = pack_mask(mask_of(shape, input.device if isinstance(input, Tensor) else "cpu"))
    return zero_frozen(input, frozen)


SUBJECTS = [
    Subject(
        function=_function,
        exact=lambda input: torch.where(mask_of(input.shape, input.device), 0, input),
        inputs=lambda size, dtype, device: (torch.randn(*size, device=device).to(dtype),),
        options=(),
        operators=("zero_frozen",),
        raw=lambda name, size, dtype, device: (
            torch.randn(*size, device=device).to(dtype),
            pack_mask(mask_of(size, device)),
        ),
        sizes=[(2, 3, 4, 5), (4, 2, 3, 7), (3, 1, 1, 1), (2, 64, 30, 31)],
        quantizer=True,
        name="zero_frozen",
    )
]
