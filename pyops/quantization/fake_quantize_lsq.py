"""Fake-quantisation with a trainable step size: LSQ."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.quantization._quantizer import Rule, check_bits, check_parameters, quantizer
from tersor.quantization.fake_quantize_pact import check_positive


def fake_quantize_lsq(
    input: Tensor, scale: Tensor, bits: int, signed: bool = False, grad_factor: float | None = None
) -> Tensor:
    r"""Rounds to whole multiples of a learned step.

    With levels from -Qn to Qp (0 to 2^bits - 1, or -2^(bits-1) to 2^(bits-1) - 1 if ``signed``), v = input / scale,
    r = R(min(max(v, -Qn), Qp)), R rounding half to even: output = r scale. The input's gradient passes where
    -Qn < v < Qp; the step's is ``grad_factor`` times the sum of r - v inside, -Qn below and Qp above.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        scale: the step; one element, or one per index of one dimension of ``input`` (1 in all others). The paper
            begins with :func:`lsq_scale`.
        bits: 2 to 8; 32 returns the input.
        signed: which levels.
        grad_factor: ``None`` means 1 / sqrt(elements per step * Qp), as in the paper.

    Returns:
        The shape, dtype and memory format of ``input``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or ``bits`` is not as stated; or, on the CPU, a scale is not finite and positive.

    Source: Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """
    name = "fake_quantize_lsq"
    (scale,) = check_parameters(name, input, scale=scale)
    bits = check_bits(name, bits)
    if bits == 32:
        return input
    quant_min, quant_max = quant_range(bits, signed)
    return _lsq(input, scale, quant_min, quant_max, given_factor(grad_factor, input, scale, quant_max))


def given_factor(grad_factor: float | None, input: Tensor, scale: Tensor, quant_max: int) -> float | None:
    """What the kernel is given: None lets it count the elements, of which it sees but a piece of a DTensor."""
    if grad_factor is None and type(input) is not Tensor and hasattr(input, "full_tensor"):
        return factor_or_paper(None, input, scale, quant_max)
    return None if grad_factor is None else float(grad_factor)


def lsq_scale(input: Tensor, bits: int, signed: bool = False) -> Tensor:
    """The paper's first step size for a tensor, 2 mean|input| / sqrt(Qp), of shape ``(1,)``."""
    quant_max = quant_range(check_bits("lsq_scale", bits), signed)[1]
    return (2 * input.detach().abs().mean() / quant_max**0.5).reshape(1)


def quant_range(bits: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest level."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def factor_or_paper(grad_factor: float | None, input: Tensor, scale: Tensor, quant_max: int) -> float:
    """The factor, or where it is None 1 / sqrt(elements per step * Qp); 1 element for an empty input."""
    if grad_factor is not None:
        return grad_factor
    return float(max(input.numel() // max(scale.numel(), 1), 1) * quant_max) ** -0.5


def _quantize(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float | None) -> Tensor:
    return torch.round((x / scale).clamp(quant_min, quant_max)) * scale


def _differentiate(
    grad: Tensor, x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float | None
) -> tuple[Tensor, Tensor]:
    value = x / scale
    outside = (value <= quant_min) | (value >= quant_max)
    clipped = value.clamp(quant_min, quant_max)
    step = torch.where(outside, clipped, torch.round(clipped) - value)
    factor = factor_or_paper(grad_factor, x, scale, quant_max)
    return torch.where(outside, 0, grad), factor * grad * step


_lsq = quantizer(
    __name__,
    "fake_quantize_lsq",
    Rule(
        parameters=("scale",),
        constants="int quant_min, int quant_max, float? grad_factor",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=lambda scale: check_positive("fake_quantize_lsq", scale=scale),
    ),
)
