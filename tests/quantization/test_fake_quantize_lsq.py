"""What is special to LSQ."""

from __future__ import annotations

import functools

import pytest
import straight_through
import torch
from quantizers import subject

from tersor.quantization import fake_quantize_lsq, lsq_scale


def _subject(bits: int, signed: bool, along: str = "", name: str = ""):
    quant_min, quant_max = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    function = functools.partial(fake_quantize_lsq, bits=bits, signed=signed, grad_factor=0.25)
    exact = functools.partial(straight_through.lsq, quant_min=quant_min, quant_max=quant_max, grad_factor=0.25)
    constants = (quant_min, quant_max, 0.25)
    return subject(function, exact, "fake_quantize_lsq", [(0.25, 0.0625)], (), constants, along, name)


SUBJECTS = [_subject(3, True), _subject(8, True, "_per_channel"), _subject(2, False, name="fake_quantize_lsq_unsigned")]


@pytest.mark.parametrize("shape", [(1,), (1, 3, 1)])
def test_papers_grad_factor(shape: tuple[int, ...], run: tuple[str, str]) -> None:
    """1 / sqrt(elements that share a step * Qp), by default."""
    x = torch.randn(4, 3, 5, device=run[0])
    factor = (60 / torch.Size(shape).numel() * 7) ** -0.5
    gradients = []
    for given in (None, factor):
        scale = torch.full(shape, 0.2, device=run[0], requires_grad=True)
        output = fake_quantize_lsq(x, scale, 4, signed=True, grad_factor=given)
        gradients.append(torch.autograd.grad(output.square().sum(), scale)[0])
    torch.testing.assert_close(*gradients)


def test_first_scale() -> None:
    x = torch.tensor([1.0, -3.0])
    torch.testing.assert_close(lsq_scale(x, 3, signed=True), torch.tensor([2 * 2 / 3**0.5]))
    torch.testing.assert_close(lsq_scale(x, 2), torch.tensor([2 * 2 / 3**0.5]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scale(scale: float, run: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="fake_quantize_lsq: scale must be finite and greater than 0, got"):
        fake_quantize_lsq(torch.randn(3), torch.tensor([scale]), 4)


def test_empty_input(run: tuple[str, str]) -> None:
    x, scale = torch.empty(0, 3, requires_grad=True), torch.ones(1, requires_grad=True)
    output = fake_quantize_lsq(x, scale, 4)
    assert output.shape == (0, 3)
    assert torch.autograd.grad(output.sum(), scale)[0].item() == 0
