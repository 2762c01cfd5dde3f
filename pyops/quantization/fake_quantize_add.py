"""The sum of two fake-quantised tensors, as at the end of a residual block."""

from __future__ import annotations

from torch import Tensor

from tersor._checks import check_floating, check_same
from tersor.quantization._quantizer import Rule, check_bits, check_parameters, quantizer
from tersor.quantization.fake_quantize_bounds import TIES, check_bounds, differentiate_ddtb, quantize_ddtb


def fake_quantize_add(
    input: Tensor,
    other: Tensor,
    lower: Tensor,
    upper: Tensor,
    other_lower: Tensor,
    other_upper: Tensor,
    bits: int,
    tie: str = "half",
    *,
    grad_scale: float = 1.0,
) -> Tensor:
    """``fake_quantize_bounds(input, lower, upper) + fake_quantize_bounds(other, other_lower, other_upper)``.

    With ``rule="ddtb"``, in one pass each way: two tensors are read and one written instead of five.

    Args:
        input, other: of the same shape and dtype; float16, bfloat16, float32 or float64.
        lower, upper, other_lower, other_upper: as for :func:`fake_quantize_bounds`; those of more than one element
            along the same dimension.
        bits: 2 to 8, for both; 32 adds without quantising.
        tie, grad_scale: as for :func:`fake_quantize_bounds`.

    Returns:
        The shape, dtype and memory format of ``input``; summed before rounding to a half type. Differentiable once.

    Raises:
        TypeError, ValueError: as :func:`fake_quantize_bounds`, and if ``other`` is not like ``input``.

    Source: the quantisers of Zhong et al., arXiv 2203.03844; doing two in one pass is ours.
    """
    name = "fake_quantize_add"
    check_floating(name, input=input, other=other)
    check_same(name, input=input, other=other)
    bounds = check_parameters(name, input, lower=lower, upper=upper, other_lower=other_lower, other_upper=other_upper)
    bits = check_bits(name, bits)
    if tie not in TIES:
        raise ValueError(f"{name}: tie must be one of {', '.join(TIES)}, got {tie!r}")
    if bits == 32:
        return input + other
    return _add(input, other, *bounds, bits, tie, float(grad_scale))


def _check_values(lower: Tensor, upper: Tensor, other_lower: Tensor, other_upper: Tensor) -> None:
    check_bounds(lower, upper, "fake_quantize_add")
    check_bounds(other_lower, other_upper, "fake_quantize_add (other)")


def _quantize(
    x: Tensor,
    other: Tensor,
    lower: Tensor,
    upper: Tensor,
    other_lower: Tensor,
    other_upper: Tensor,
    bits: int,
    tie: str,
    grad_scale: float,
) -> Tensor:
    return quantize_ddtb(x, lower, upper, bits)[0] + quantize_ddtb(other, other_lower, other_upper, bits)[0]


def _differentiate(
    grad: Tensor,
    x: Tensor,
    other: Tensor,
    lower: Tensor,
    upper: Tensor,
    other_lower: Tensor,
    other_upper: Tensor,
    bits: int,
    tie: str,
    grad_scale: float,
) -> tuple[Tensor, ...]:
    grad_x, *bounds = differentiate_ddtb(grad, x, lower, upper, bits, tie)
    grad_other, *other_bounds = differentiate_ddtb(grad, other, other_lower, other_upper, bits, tie)
    return grad_x, grad_other, *[grad_scale * bound for bound in (*bounds, *other_bounds)]


_add = quantizer(
    __name__,
    "fake_quantize_add",
    Rule(
        parameters=("lower", "upper", "other_lower", "other_upper"),
        constants="int bits, str tie, float grad_scale",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=_check_values,
        inputs=("input", "other"),
    ),
)
