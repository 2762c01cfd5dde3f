"""Fake-quantisation between two trainable bounds: the rules of DDTB and of LTS."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.quantization._quantizer import Rule, check_bits, check_parameters, quantizer

RULES = ("ddtb", "unit")
TIES = ("half", "bound")


def fake_quantize_bounds(
    input: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    rule: str = "ddtb",
    tie: str = "half",
    *,
    signed: bool = False,
    relu: bool = False,
    grad_scale: float = 1.0,
) -> Tensor:
    r"""Clips to ``[lower, upper]`` and rounds to ``2**bits`` levels, with gradients for the bounds.

    With n = 2^bits - 1, R rounding half to even, and the rounding passed through by the gradient:

    - ``rule="ddtb"``: s = n / (upper - lower), z = R(s lower) + 2^(bits-1), c = max(min(input, upper), lower),
      q = R(s c - z), output = (q + z) / s, in the input's units. The zero point is rounded, hence 0 maps to 0 and
      the outermost levels are not exactly the bounds; clipped elements and the rounding errors of all others move
      the bounds. Where s lower is a whole number and a half (as for lower = -upper), the top takes one level more:
      2^bits + 1 in all.
    - ``rule="unit"``: output = R(n clamp((input - lower) / (upper - lower), 0, 1)) / n in [0, 1], **not** scaled
      back; with ``signed`` 2 (output - 1/2) in [-1, 1]. Clipped elements give no gradient to anything.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        lower, upper: one element each, or one per sample ``(N, 1, ..., 1)`` or per index of any one other dimension.
            Computed with in float32 (float64 for a float64 input).
        bits: 2 to 8; 32 returns the input (after the ReLU).
        rule: ``"ddtb"`` or ``"unit"``.
        tie: for an element equal to a bound, ``"half"`` of its gradient goes to the bound (torch's own rule for
            ``minimum``), or with ``"bound"`` all of it. For ``rule="ddtb"``.
        signed: for ``rule="unit"``, the output range [-1, 1].
        relu: quantise ``relu(input)`` instead, in the same pass.
        grad_scale: factor on the gradients of the bounds only.

    Returns:
        The shape, dtype and memory format of ``input``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape, ``bits``, ``rule`` or ``tie`` is not as stated; or, on the CPU, a bound is not finite or
            ``lower >= upper`` (on a GPU nothing waits for the values; equal bounds give NaN there).

    Source: Zhong et al., "Dynamic Dual Trainable Bounds for Ultra-low Precision Super-Resolution Networks", arXiv
    2203.03844; the unit rule as in Zhong et al., arXiv 2211.08544.
    """
    name = "fake_quantize_bounds"
    lower, upper = check_parameters(name, input, lower=lower, upper=upper)
    bits = check_bits(name, bits)
    if rule not in RULES:
        raise ValueError(f"{name}: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if tie not in TIES:
        raise ValueError(f"{name}: tie must be one of {', '.join(TIES)}, got {tie!r}")
    if signed and rule != "unit":
        raise ValueError(f"{name}: signed must be False for rule {rule!r}, whose levels have the input's units")
    if bits == 32:
        return torch.relu(input) if relu else input
    return _bounds(input, lower, upper, bits, rule, tie, bool(signed), bool(relu), float(grad_scale))


def check_bounds(lower: Tensor, upper: Tensor, where: str = "fake_quantize_bounds") -> None:
    """Raises ValueError unless lower < upper and both are finite; reads the values."""
    for name, bound in (("lower", lower), ("upper", upper)):
        if not bound.isfinite().all():
            raise ValueError(f"{where}: {name} must be finite, got {bound.detach().flatten().tolist()[:4]}")
    wrong = (lower >= upper).flatten().nonzero()
    if len(wrong):
        first = [b.detach().flatten()[wrong[0] if b.numel() > 1 else 0].item() for b in (lower, upper)]
        raise ValueError(f"{where}: lower must be less than upper, got lower {first[0]} and upper {first[1]}")


def quantize_ddtb(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Output and clipped input; all in the written order, in the dtype of ``x``."""
    scale = torch.full_like(upper, 2**bits - 1) / (upper - lower)  # number / tensor would multiply by a reciprocal
    zero = torch.round(scale * lower) + 2 ** (bits - 1)
    clipped = torch.maximum(torch.minimum(x, upper), lower)
    code = torch.round(scale * clipped - zero)
    return (code + zero) / scale, clipped


def differentiate_ddtb(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, bits: int, tie: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The input's gradient, and what each element gives to lower and to upper."""
    output, clipped = quantize_ddtb(x, lower, upper, bits)
    error = (output - clipped) / (upper - lower)
    equal = 0.5 if tie == "half" else 1.0
    above = (x > upper).to(x) + equal * (x == upper).to(x)
    least = torch.minimum(x, upper)
    below = (least < lower).to(x) + equal * (least == lower).to(x)
    return grad * (1 - above) * (1 - below), grad * (below - error), grad * (above * (1 - below) + error)


def _quantize_unit(x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool) -> Tensor:
    levels = torch.full_like(upper, 2**bits - 1)
    output = torch.round(((x - lower) / (upper - lower)).clamp(0, 1) * levels) / levels
    return (output - 0.5) * 2 if signed else output


def _differentiate_unit(
    grad: Tensor, x: Tensor, lower: Tensor, upper: Tensor, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    place = (x - lower) / (upper - lower)
    inside = (place >= 0) & (place <= 1)
    grad = torch.where(inside, grad * (2 if signed else 1) / (upper - lower), 0)
    clamped = place.clamp(0, 1)  # a place far outside would make 0 * inf
    return grad, grad * (clamped - 1), -grad * clamped


def _quantize(
    x: Tensor, lower: Tensor, upper: Tensor, bits: int, rule: str, tie: str, signed: bool, relu: bool, grad_scale: float
) -> Tensor:
    x = torch.relu(x) if relu else x
    return quantize_ddtb(x, lower, upper, bits)[0] if rule == "ddtb" else _quantize_unit(x, lower, upper, bits, signed)


def _differentiate(
    grad: Tensor,
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    rule: str,
    tie: str,
    signed: bool,
    relu: bool,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    positive = torch.relu(x) if relu else x
    if rule == "ddtb":
        grad_x, *bounds = differentiate_ddtb(grad, positive, lower, upper, bits, tie)
    else:
        grad_x, *bounds = _differentiate_unit(grad, positive, lower, upper, signed)
    grad_x = torch.where(x <= 0, 0, grad_x) if relu else grad_x
    return grad_x, grad_scale * bounds[0], grad_scale * bounds[1]


_bounds = quantizer(
    __name__,
    "fake_quantize_bounds",
    Rule(
        parameters=("lower", "upper"),
        constants="int bits, str rule, str tie, bool signed, bool relu, float grad_scale",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=check_bounds,
    ),
)
