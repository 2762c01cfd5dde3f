"""What is special to affine quantisation: torch's own operator, bit by bit."""

from __future__ import annotations

import functools

import pytest
import torch
from quantizers import subject, values
from straight_through import round_through

from tersor.quantization import fake_quantize_affine


def _exact(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The corrected variant as a chain: the zero point learns from the clipped elements alone."""
    zero = round_through(zero_point).clamp(-8, 7)
    level = round_through(x / scale) + zero
    inside = (level >= -8) & (level <= 7)
    # Inside, the zero point cancels; outside, the level is a constant.
    return torch.where(inside, (level - zero) * scale, (level.clamp(-8, 7).detach() - zero) * scale)


def _subject(along: str = ""):
    function = functools.partial(fake_quantize_affine, quant_min=-8, quant_max=7, corrected=True)
    parameters = [(0.25, 0.0625), (-2.3, 1.0)] if not along else [(0.25, 0.0625), (-2.3, 0.05)]
    return subject(function, _exact, "fake_quantize_affine", parameters, (), (-8, 7, 1.0, True), along)


SUBJECTS = [_subject(), _subject("_per_channel")]


@pytest.mark.parametrize("zero_point", [0.0, 1.0, 1.3, 2.5, 3.5, -2.0, -0.5, 20.0])
@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 15), (-8, 7), (0, 255), (-3, 4)])
@pytest.mark.parametrize("scale", [0.25, 0.3, 0.0137])
def test_as_torch(zero_point: float, quant_min: int, quant_max: int, scale: float, run: tuple[str, str]) -> None:
    """Outputs and the input's gradient bit by bit, also where torch's backward takes other levels than its forward."""
    x = torch.cat([values((40, 50), torch.float32, run[0]), torch.randn(50, 50, device=run[0]) * 4 * scale])
    # Torch's own backward is compiled with fused multiply-adds, which take some exact ties the other way.
    tie = ((x.double() / scale).frac().abs() - 0.5).abs() < 1e-5
    x = x[~tie] if scale != 0.25 else x
    grad = torch.linspace(-2, 3, x.numel(), device=run[0]).view_as(x)
    results = []
    for function in (fake_quantize_affine, torch._fake_quantize_learnable_per_tensor_affine):
        tensors = [t.requires_grad_() for t in (x.clone(), torch.tensor([scale]), torch.tensor([zero_point]))]
        output = function(*tensors, quant_min, quant_max, 0.125)
        results.append([output, *torch.autograd.grad(output, tensors, grad)])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for ours, theirs in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_bad_arguments() -> None:
    x, one = torch.randn(3), torch.ones(1)
    for bad, message in (
        ({"quant_min": 5, "quant_max": 5}, "quant_min must be less than quant_max, both within 2..23, got 5 and 5"),
        ({"quant_max": 2**24}, r"quant_min must be less than .*got 0 and 16777216"),
        ({"scale": 0 * one}, r"scale must be finite and greater than 0, got \[0\.0\]"),
        ({"zero_point": one / 0}, r"zero_point must be finite, got \[inf\]"),
    ):
        arguments = {"input": x, "scale": one, "zero_point": one, "quant_min": 0, "quant_max": 15} | bad
        with pytest.raises(ValueError, match=f"fake_quantize_affine: {message}"):
            fake_quantize_affine(**arguments)
