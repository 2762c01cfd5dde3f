"""What is special to PACT."""

from __future__ import annotations

import functools

import pytest
import torch
from quantizers import subject
from straight_through import round_through

from tersor.quantization import fake_quantize_pact


def _exact(x: torch.Tensor, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """PACT's own derivative: alpha learns from the clipped elements alone, so the levels see a copy without one."""
    levels, fixed = 2**bits - 1, alpha.detach()
    clipped = torch.where(x < 0, 0 * x, torch.where(x >= alpha, alpha + 0 * x, x))
    return round_through(clipped * levels / fixed) * fixed / levels


def _subject(bits: int, along: str = ""):
    function, exact = (functools.partial(f, bits=bits) for f in (fake_quantize_pact, _exact))
    return subject(function, exact, "fake_quantize_pact", [(1.5, 0.125)], (), (bits,), along)


SUBJECTS = [_subject(2), _subject(4, "_per_channel")]


def test_32_bits_clip_only(run: tuple[str, str]) -> None:
    x = torch.linspace(-2, 3, 41, device=run[0], requires_grad=True)
    alpha = torch.tensor([1.5], device=run[0], requires_grad=True)
    output = fake_quantize_pact(x, alpha, 32)
    assert torch.equal(output, x.detach().clamp(0, 1.5))
    grad_x, grad_alpha = torch.autograd.grad(output.sum(), (x, alpha))
    assert torch.equal(grad_x, ((x >= 0) & (x < 1.5)).float())
    assert grad_alpha.item() == (x >= 1.5).sum()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha(alpha: float, run: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="fake_quantize_pact: alpha must be finite and greater than 0, got"):
        fake_quantize_pact(torch.randn(3), torch.tensor([alpha]), 4)
