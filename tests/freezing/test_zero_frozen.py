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


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 9), (3, 64), (2, 17000)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_size_and_non_finite_values(shape: tuple[int, ...], dtype: torch.dtype, run: tuple[str, str]) -> None:
    if run[1] == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels have no float64")
    mask = torch.rand(shape) < 0.5
    input = torch.where(mask, float("nan"), torch.randn(shape)).to(dtype)
    output = zero_frozen(input.to(run[0]), pack_mask(mask).to(run[0]))
    assert torch.equal(output.cpu(), torch.where(mask, 0, input))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"frozen must be a uint8 tensor as pack_mask returns it, got torch\.bool"):
        zero_frozen(torch.zeros(9), torch.zeros(9, dtype=torch.bool))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frozen must have shape \(2,\), one bit for each element.*got \(3,\)"):
        zero_frozen(torch.zeros(9), torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="one bit per element"):
        torch.ops.tersor.zero_frozen(torch.zeros(90), torch.zeros(3, dtype=torch.uint8))
