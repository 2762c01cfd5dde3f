"""What is special to quantising weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from quantizers import SIZES, values
from straight_through import ddtb, number, round_through
from subject import Subject

import tersor
from tersor.quantization import percentile_bounds, weight_fake_quantize

_SIZES = [size for size in SIZES if torch.Size(size).numel() > 3]


def _exact(weight: torch.Tensor, bits: int, mode: str) -> torch.Tensor:
    fixed = weight.detach()
    if mode == "symmetric":
        largest, levels = fixed.abs().max() + 1e-8, 2 ** (bits - 1) - 1
        fixed_levels = number(largest, levels)
        return _through(weight, round_through(fixed * fixed_levels / largest) * largest / fixed_levels)
    if mode == "minmax":
        return _through(weight, ddtb(fixed, fixed.min(), fixed.max(), bits))
    lower, upper = percentile_bounds(fixed)
    return ddtb(weight, lower, upper, bits)


def _through(weight: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return weight + (output - weight).detach() if not weight.requires_grad else _Through.apply(weight, output)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, output):
        return output.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _subject(bits: int, mode: str) -> Subject:
    def make(size: Any, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        return (values(size, dtype, device),)

    def raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        (weight,) = make(size, dtype, device)
        if name == "weight_fake_quantize_forward":
            return weight, bits, mode, 99.0
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.ones_like(weight), weight, torch.tensor([-1.0, 1.5], dtype=exact, device=device)

    backward = ("weight_fake_quantize_backward",) if mode == "percentile" else ()
    return Subject(
        function=functools.partial(weight_fake_quantize, bits=bits, mode=mode),
        exact=functools.partial(_exact, bits=bits, mode=mode),
        inputs=make,
        options=(),
        operators=("weight_fake_quantize_forward", *backward),
        raw=raw,
        sizes=_SIZES,
        quantizer=True,
        name=f"weight_fake_quantize_{mode}",
    )


SUBJECTS = [_subject(4, "symmetric"), _subject(3, "minmax"), _subject(2, "percentile")]


def test_zeros_stay_zero(run: tuple[str, str]) -> None:
    assert torch.equal(weight_fake_quantize(torch.zeros(3, 4), 2), torch.zeros(3, 4))


def test_two_bits_are_ternary(run: tuple[str, str]) -> None:
    weight = torch.tensor([-2.0, -0.9, 0.1, 1.1, 1.9])
    torch.testing.assert_close(weight_fake_quantize(weight, 2), torch.tensor([-2.0, 0.0, 0.0, 2.0, 2.0]))


def test_32_bits_pass_through() -> None:
    weight = torch.randn(4)
    assert weight_fake_quantize(weight, 32) is weight


@pytest.mark.parametrize("shape", [(101,), (201, 1)])
def test_half_a_gradient_on_a_percentile(shape: tuple[int, ...], run: tuple[str, str]) -> None:
    """With 1 element more than a multiple of 100 the percentiles are elements."""
    weight = torch.randperm(torch.Size(shape).numel()).float().view(shape).requires_grad_()
    (grad,) = torch.autograd.grad(weight_fake_quantize(weight, 2, "percentile").sum(), weight)
    assert (grad == 0.5).sum() == 2
    assert (grad == 0).sum() == 2 * (weight.numel() // 100)


def test_bad_weights() -> None:
    for backend in ("native", "reference"):
        with tersor.use_backend(backend):
            for mode in ("minmax", "percentile"):
                with pytest.raises(ValueError, match=r"weight must have unequal bounds for mode .*got 2\.0 for both"):
                    weight_fake_quantize(torch.full((3, 3), 2.0), 4, mode)
            for mode in ("symmetric", "minmax", "percentile"):
                with pytest.raises(ValueError, match=r"weight must have at least one element, got shape \(0, 3\)"):
                    weight_fake_quantize(torch.empty(0, 3), 4, mode)
                with pytest.raises(ValueError, match="must be finite"):
                    weight_fake_quantize(torch.tensor([1.0, float("nan"), 2.0]), 4, mode)
    with pytest.raises(ValueError, match="mode must be one of symmetric, minmax, percentile, got 'absmax'"):
        weight_fake_quantize(torch.randn(3), 4, "absmax")
    with pytest.raises(ValueError, match="percentile must be from 50 to 100, got 1"):
        weight_fake_quantize(torch.randn(3), 4, "percentile", 1)
