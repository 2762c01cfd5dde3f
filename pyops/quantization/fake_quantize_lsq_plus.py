"""Fake-quantisation with a trainable step size and offset: LSQ+."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.quantization._quantizer import Rule, check_bits, check_parameters, quantizer
from tersor.quantization.fake_quantize_lsq import factor_or_paper, given_factor
from tersor.quantization.fake_quantize_pact import check_positive


def fake_quantize_lsq_plus(
    input: Tensor, scale: Tensor, offset: Tensor, bits: int, grad_factor: float | None = None
) -> Tensor:
    r"""Rounds to ``offset`` plus 0 to n steps, n = 2^bits - 1.

    v = (input - offset) / scale, r = R(min(max(v, 0), n)), R rounding half to even: output = r scale + offset. The
    input's gradient passes where 0 < v < n. ``grad_factor`` times the sum of r - v inside, 0 below and n above is the
    step's gradient, ``grad_factor`` times the sum over all clipped elements (v <= 0 or v >= n) the offset's.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        scale, offset: one element each, or one per index of one dimension of ``input`` (1 in all others). The usual
            first values are :func:`lsq_plus_parameters`.
        bits: 2 to 8; 32 returns the input.
        grad_factor: ``None`` means 1 / sqrt(elements per step * n).

    Returns:
        The shape, dtype and memory format of ``input``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or ``bits`` is not as stated; or, on the CPU, a scale is not finite and positive or an
            offset is not finite.

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization", arXiv 2004.09576.
    """
    name = "fake_quantize_lsq_plus"
    scale, offset = check_parameters(name, input, scale=scale, offset=offset)
    bits = check_bits(name, bits)
    if bits == 32:
        return input
    levels = 2**bits - 1
    return _lsq_plus(input, scale, offset, levels, given_factor(grad_factor, input, scale, levels))


def lsq_plus_parameters(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """First values for an activation, scale = (max - min) / n and offset = min, each of shape ``(1,)``."""
    levels = 2 ** check_bits("lsq_plus_parameters", bits) - 1
    least, greatest = input.detach().aminmax()
    return ((greatest - least) / levels).reshape(1), least.reshape(1)


def _check_values(scale: Tensor, offset: Tensor) -> None:
    check_positive("fake_quantize_lsq_plus", scale=scale)
    if not offset.isfinite().all():
        raise ValueError(f"fake_quantize_lsq_plus: offset must be finite, got {offset.detach().flatten().tolist()[:4]}")


def _quantize(x: Tensor, scale: Tensor, offset: Tensor, levels: int, grad_factor: float | None) -> Tensor:
    return torch.round(((x - offset) / scale).clamp(0, levels)) * scale + offset


def _differentiate(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, levels: int, grad_factor: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    value = (x - offset) / scale
    outside = (value <= 0) | (value >= levels)
    clipped = value.clamp(0, levels)
    step = torch.where(outside, clipped, torch.round(clipped) - value)
    grad_input = torch.where(outside, 0, grad)
    factor = factor_or_paper(grad_factor, x, scale, levels)
    return grad_input, factor * grad * step, factor * (grad - grad_input)


_lsq_plus = quantizer(
    __name__,
    "fake_quantize_lsq_plus",
    Rule(
        parameters=("scale", "offset"),
        constants="int levels, float? grad_factor",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=_check_values,
    ),
)
