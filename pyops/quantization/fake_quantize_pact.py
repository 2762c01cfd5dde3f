"""Fake-quantisation with a trainable clipping value: PACT."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.quantization._quantizer import Rule, check_bits, check_parameters, quantizer


def fake_quantize_pact(input: Tensor, alpha: Tensor, bits: int) -> Tensor:
    r"""Clips to ``[0, alpha]`` and rounds to ``2**bits`` levels; elements at or above alpha move alpha.

    With n = 2^bits - 1 and R rounding half to even: c = min(max(input, 0), alpha), output = R(c n / alpha) alpha / n.
    The input's gradient passes where 0 <= input < alpha; alpha's is the sum over input >= alpha, without a rounding
    term.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        alpha: one element, or one per index of one dimension of ``input`` (1 in all others).
        bits: 2 to 8; 32 clips only.

    Returns:
        The shape, dtype and memory format of ``input``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or ``bits`` is not as stated; or, on the CPU, an alpha is not finite and positive.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085.
    """
    name = "fake_quantize_pact"
    (alpha,) = check_parameters(name, input, alpha=alpha)
    return _pact(input, alpha, check_bits(name, bits))


def check_positive(where: str, **values: Tensor) -> None:
    """Raises ValueError unless every element is finite and positive; reads the values."""
    for name, value in values.items():
        if not ((value > 0) & value.isfinite()).all():
            raise ValueError(
                f"{where}: {name} must be finite and greater than 0, got {value.detach().flatten().tolist()[:4]}"
            )


def _quantize(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    clipped = torch.minimum(x.clamp(min=0), alpha)
    if bits == 32:
        return clipped
    levels = torch.full_like(alpha, 2**bits - 1)  # by a plain number a GPU would multiply with the reciprocal
    return torch.round(clipped * levels / alpha) * alpha / levels


def _differentiate(grad: Tensor, x: Tensor, alpha: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    outside = (x < 0) | (x >= alpha)
    return torch.where(outside, 0, grad), torch.where(x >= alpha, grad, 0)


_pact = quantizer(
    __name__,
    "fake_quantize_pact",
    Rule(
        parameters=("alpha",),
        constants="int bits",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=lambda alpha: check_positive("fake_quantize_pact", alpha=alpha),
    ),
)
