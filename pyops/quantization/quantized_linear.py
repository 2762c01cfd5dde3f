"""Linear layer on a quantised activation with quantised weights, in whole numbers; for inference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor._batching import one_by_one
from tersor._operator import operator
from tersor.quantization._quantizer import check_bits
from tersor.quantization.quantized_conv2d import (
    PreparedWeight,
    check_quantized_input,
    explain_bounds,
    prepare_weight,
)
from tersor.quantization.quantized_conv2d import _reference as convolve_exactly


def quantized_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """``linear`` of the input quantised between two bounds with a weight given by its codes.

    The formula, the accuracy and the other arguments are those of :func:`quantized_conv2d` with a 1x1 window.

    Args:
        input: ``(..., C)``, float16, bfloat16 or float32.
        weight: codes ``(O, C)``, int8.
        lower, upper: one element each, or one per sample ``(N, 1, ..., 1)``.

    Returns:
        ``(..., O)`` in the input's dtype, contiguous. Has no derivative.

    Raises:
        TypeError, ValueError: as :func:`quantized_conv2d`.
    """
    name = "quantized_linear"
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        given = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{name}: weight must be a tensor (O, C), got {given}")
    prepared = prepare_weight(weight[:, :, None, None], weight_scale, weight_zero, bias)
    return multiply(name, input, prepared, lower, upper, bits, relu=relu)


def multiply(
    name: str, input: Tensor, weight: PreparedWeight, lower: Tensor, upper: Tensor, bits: int, *, relu: bool = False
) -> Tensor:
    """:func:`quantized_linear` with a prepared weight; ``name`` is for errors."""
    check_quantized_input(name, input, weight, lower, upper)
    if not input.dim() or input.shape[-1] != weight.channels:
        raise ValueError(f"{name}: input must be (..., {weight.channels}), got shape {tuple(input.shape)}")
    per_sample = (input.shape[0], *[1] * (input.dim() - 1)) if input.dim() > 1 else (1,)
    for argument, bound in (("lower", lower), ("upper", upper)):
        if bound.numel() != 1 and tuple(bound.shape) != per_sample:
            raise ValueError(
                f"{name}: {argument} must have one element or one per sample (N, 1, ..., 1) for input "
                f"{tuple(input.shape)}, got shape {tuple(bound.shape)}"
            )
    bits = check_bits(name, bits)
    if bits == 32:
        raise ValueError(f"{name}: bits must be 2 to 8, got 32")
    bounds = lower.float(), upper.float()
    try:
        return _quantized_linear.inference(input, *weight[:3], weight.zero, *bounds, weight.bias, bits, bool(relu))
    except RuntimeError:
        explain_bounds(name, input, *bounds)
        raise


def _reference(
    input: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    bias: Tensor | None,
    bits: int,
    relu: bool,
) -> Tensor:
    """A convolution of one tap over the rows of each sample."""
    if not input.numel():
        return input.new_empty((*input.shape[:-1], weight_sums.shape[0]))
    points = input.reshape(input.shape[0] if input.dim() > 1 else 1, -1, 1, input.shape[-1])
    window = ([1, 1], [0, 0], [1, 1])
    numbers = (weight, weight_sums, weight_scale, weight_zero, lower, upper, bias, None, bits)
    output = convolve_exactly(points.permute(0, 3, 1, 2), *numbers, *window, relu, False, True)
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1).contiguous()


def _fake(input: Tensor, weight: Tensor, weight_sums: Tensor, *args: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight_sums.shape[0]))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_quantized_linear.overload, info, in_dims, args)


_quantized_linear = operator(
    "quantized_linear(Tensor input, Tensor weight, Tensor weight_sums, Tensor weight_scale, Tensor? weight_zero,"
    " Tensor lower, Tensor upper, Tensor? bias, int bits, bool relu) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
