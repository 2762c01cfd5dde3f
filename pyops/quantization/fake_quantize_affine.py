"""Affine fake-quantisation with trainable scale and zero point, compatible with torch's own learnable operator."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor._checks import as_int
from tersor.quantization._quantizer import Rule, check_parameters, quantizer
from tersor.quantization.fake_quantize_pact import check_positive


def fake_quantize_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    *,
    corrected: bool = False,
) -> Tensor:
    r"""Drop-in for ``torch._fake_quantize_learnable_per_tensor_affine``, in one pass each way.

    Forward: zf = clamp(R(zero_point)), q = clamp(R(input * (1 / scale)) + zf), output = (q - zf) scale, R rounding half
    to even, every clamp to ``[quant_min, quant_max]``. Torch's backward takes other levels than its forward:
    zb = trunc(clamp(zero_point + 0.5)), qb = R(input * (1 / scale) + zb). The input's gradient passes where
    quant_min <= qb <= quant_max; there the scale gets ((qb - zb) scale - input) / scale and the zero point nothing,
    elsewhere the scale gets quant_min - zb or quant_max - zb and the zero point -scale; both times ``grad_factor``.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        scale, zero_point: one element each, or one per index of one dimension of ``input`` (1 in all others).
        quant_min, quant_max: the lowest and highest level, within 24 bits.
        grad_factor: factor on the gradients of scale and zero point.
        corrected: let backward take the forward's levels: zb = zf and qb = R(input / scale) + zf.

    Returns:
        The shape, dtype and memory format of ``input``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape is not as stated or quant_min >= quant_max; or, on the CPU, a scale is not finite and
            positive or a zero point is not finite.
    """
    name = "fake_quantize_affine"
    scale, zero_point = check_parameters(name, input, scale=scale, zero_point=zero_point)
    quant_min, quant_max = as_int(name, quant_min=quant_min), as_int(name, quant_max=quant_max)
    if not -(2**23) <= quant_min < quant_max <= 2**23:
        raise ValueError(
            f"{name}: quant_min must be less than quant_max, both within 2**23, got {quant_min} and {quant_max}"
        )
    return _affine(input, scale, zero_point, quant_min, quant_max, float(grad_factor), bool(corrected))


def _check_values(scale: Tensor, zero_point: Tensor) -> None:
    check_positive("fake_quantize_affine", scale=scale)
    if not zero_point.isfinite().all():
        raise ValueError(
            f"fake_quantize_affine: zero_point must be finite, got {zero_point.detach().flatten().tolist()[:4]}"
        )


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    corrected: bool,
) -> Tensor:
    zero = torch.round(zero_point).clamp(quant_min, quant_max)
    value = torch.round(x / scale if corrected else x * (1 / scale))
    return ((value + zero).clamp(quant_min, quant_max) - zero) * scale


def _differentiate(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    corrected: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if corrected:
        zero = torch.round(zero_point).clamp(quant_min, quant_max)
        level = torch.round(x / scale) + zero
    else:
        zero = torch.trunc((zero_point + 0.5).clamp(quant_min, quant_max))
        level = torch.round(x * (1 / scale) + zero)
    inside = (level >= quant_min) & (level <= quant_max)
    grad_scale = torch.where(inside, ((level - zero) * scale - x) / scale, level.clamp(quant_min, quant_max) - zero)
    grad_zero = torch.where(inside, 0, -scale)
    return torch.where(inside, grad, 0), grad_factor * grad * grad_scale, grad_factor * grad * grad_zero


_affine = quantizer(
    __name__,
    "fake_quantize_affine",
    Rule(
        parameters=("scale", "zero_point"),
        constants="int quant_min, int quant_max, float grad_factor, bool corrected",
        quantize=_quantize,
        differentiate=_differentiate,
        check_values=_check_values,
    ),
)
