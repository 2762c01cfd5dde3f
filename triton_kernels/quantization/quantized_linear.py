"""Launches the kernels of quantized_conv2d, for which rows are positions of an image."""

from __future__ import annotations

from torch import Tensor

from tersor.triton_kernels.quantization.quantized_conv2d import quantized_conv2d


def quantized_linear(
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
    """The operator ``tersor::quantized_linear`` for float16, bfloat16 and float32."""
    *leading, channels = input.shape
    if not input.numel():
        return input.new_empty((*leading, weight_sums.shape[0]))
    points = input.reshape(leading[0] if len(leading) > 0 else 1, -1, 1, channels).permute(0, 3, 1, 2)
    numbers = (weight, weight_sums, weight_scale, weight_zero, lower, upper, bias, None, bits)
    output = quantized_conv2d(points, *numbers, [1, 1], [0, 0], [1, 1], relu, False, True)
    return output.permute(0, 2, 3, 1).reshape(*leading, -1)
