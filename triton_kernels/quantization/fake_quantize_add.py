"""The sum of two fake-quantised tensors on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_add import _add
from tersor.triton_kernels.quantization._fake_quantize import (
    SIZES,
    Case,
    backward,
    cases,
    differentiate_ddtb,
    forward,
    load,
    parameter,
    quantize_ddtb,
    store,
    store_partial,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, other, output, lower, upper, other_lower, other_upper, levels, rows, columns, size, TILE: tl.constexpr
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    x_other = load(other, start, offsets, present, 1.0)
    low = parameter(lower, rows, columns, size, TILE)
    high = parameter(upper, rows, columns, size, TILE)
    y, _ = quantize_ddtb(x, low, high, levels)
    low = parameter(other_lower, rows, columns, size, TILE)
    high = parameter(other_upper, rows, columns, size, TILE)
    y_other, _ = quantize_ddtb(x_other, low, high, levels)
    store(output, start, offsets, present, y + y_other)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_output, input, other, grad_input, grad_other, partials, lower, upper, other_lower, other_upper, levels,
    rows, columns, size, TIE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    x_other = load(other, start, offsets, present, 1.0)
    low = parameter(lower, rows, columns, size, TILE)
    high = parameter(upper, rows, columns, size, TILE)
    grad, grad_low, grad_high = differentiate_ddtb(g, x, low, high, levels, TIE)
    store(grad_input, start, offsets, present, grad)
    store_partial(partials, 0, grad_low, rows, columns, TILE)
    store_partial(partials, 1, grad_high, rows, columns, TILE)
    low = parameter(other_lower, rows, columns, size, TILE)
    high = parameter(other_upper, rows, columns, size, TILE)
    grad, grad_low, grad_high = differentiate_ddtb(g, x_other, low, high, levels, TIE)
    store(grad_other, start, offsets, present, grad)
    store_partial(partials, 2, grad_low, rows, columns, TILE)
    store_partial(partials, 3, grad_high, rows, columns, TILE)


def fake_quantize_add_forward(
    input: Tensor,
    other: Tensor,
    lower: Tensor,
    upper: Tensor,
    other_lower: Tensor,
    other_upper: Tensor,
    bits: int,
    tie: str,
    grad_scale: float,
) -> Tensor:
    """The operator ``tersor::fake_quantize_add_forward`` for float16, bfloat16 and float32."""
    parameters = [lower, upper, other_lower, other_upper]
    return forward(_forward_kernel, _add.rule, [input, other], parameters, float(2**bits - 1))


def fake_quantize_add_backward(
    grad_output: Tensor,
    input: Tensor,
    other: Tensor,
    lower: Tensor,
    upper: Tensor,
    other_lower: Tensor,
    other_upper: Tensor,
    bits: int,
    tie: str,
    grad_scale: float,
) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_add_backward`` for float16, bfloat16 and float32."""
    tensors = [input, other], [lower, upper, other_lower, other_upper]
    return backward(_backward_kernel, grad_output, *tensors, float(2**bits - 1), factor=grad_scale, TIE=tie)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    yield from cases([_forward_kernel, _backward_kernel], {"": {"TIE": "half"}}, ["levels"])
