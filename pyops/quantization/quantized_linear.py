"""Linear layer on a quantised activation with quantised weights, in whole numbers; for inference."""

from __future__ import annotations

import math

from torch import Tensor

from tersor._checks import check_floating
from tersor.quantization.quantized_conv2d import PreparedWeight, convolve, prepare_weight


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
    check_floating(name, input=input, lower=lower, upper=upper)
    if not input.dim() or input.shape[-1] != weight.channels:
        raise ValueError(f"{name}: input must be (..., {weight.channels}), got shape {tuple(input.shape)}")
    samples = 1
    for argument, bound in (("lower", lower), ("upper", upper)):
        if bound.numel() == 1:
            continue
        samples = bound.numel()
        if input.dim() < 2 or tuple(bound.shape) != (input.shape[0], *[1] * (input.dim() - 1)):
            raise ValueError(
                f"{name}: {argument} must have one element or one per sample (N, 1, ..., 1) for input "
                f"{tuple(input.shape)}, got shape {tuple(bound.shape)}"
            )
    rows = math.prod(input.shape[:-1])
    if not rows:
        return input.new_empty((*input.shape[:-1], weight.sums.shape[0]))
    # A row is a position of an image one line high: the kernel takes several positions of a line at once.
    points = input.reshape(samples, rows // samples, weight.channels).permute(0, 2, 1).unsqueeze(2)
    lower, upper = (b if b.numel() == 1 else b.reshape(-1, 1, 1, 1) for b in (lower, upper))
    window = ((1, 1), (0, 0), (1, 1))
    output = convolve(name, points, weight, lower, upper, bits, *window, relu=relu, channels_last=True)
    return output.squeeze(2).permute(0, 2, 1).reshape(*input.shape[:-1], -1)
