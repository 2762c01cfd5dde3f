"""Affine fake-quantisation on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_affine import _affine
from tersor.triton_kernels.quantization._fake_quantize import (
    SIZES,
    Case,
    backward,
    cases,
    clamp,
    forward,
    load,
    parameter,
    round_half_even,
    store,
    store_partial,
    tile,
)


@triton.jit
def _trunc(x):
    return tl.where(x < 0.0, tl.ceil(x), tl.floor(x))


@triton.jit
def _steps(x, s, CORRECTED: tl.constexpr):
    """``x`` in units of ``s``, by division or, as torch does it, by the reciprocal."""
    return tl.div_rn(x, s) if CORRECTED else x * tl.div_rn(1.0, s)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, output, scale, zero_point, quant_min, quant_max, rows, columns, size,
    CORRECTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    zero = clamp(round_half_even(parameter(zero_point, rows, columns, size, TILE)), quant_min, quant_max)
    level = clamp(round_half_even(_steps(x, s, CORRECTED)) + zero, quant_min, quant_max)
    store(output, start, offsets, present, (level - zero) * s)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_output, input, grad_input, partials, scale, zero_point, quant_min, quant_max, rows, columns, size,
    CORRECTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    zero = parameter(zero_point, rows, columns, size, TILE)
    if CORRECTED:
        zero = clamp(round_half_even(zero), quant_min, quant_max)
        level = round_half_even(_steps(x, s, CORRECTED)) + zero
    else:
        zero = _trunc(clamp(zero + 0.5, quant_min, quant_max))
        level = round_half_even(_steps(x, s, CORRECTED) + zero)
    inside = (level >= quant_min) & (level <= quant_max)
    error = ((level - zero) * s - x) * tl.div_rn(1.0, s)  # only summed: one more rounding does not show
    step = tl.where(inside, error, clamp(level, quant_min, quant_max) - zero)
    store(grad_input, start, offsets, present, tl.where(inside, g, 0.0))
    store_partial(partials, 0, g * step, rows, columns, TILE)
    store_partial(partials, 1, g * tl.where(inside, 0.0, -s), rows, columns, TILE)


def fake_quantize_affine_forward(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    corrected: bool,
) -> Tensor:
    """The operator ``tersor::fake_quantize_affine_forward`` for float16, bfloat16 and float32."""
    numbers = float(quant_min), float(quant_max)
    return forward(_forward_kernel, _affine.rule, [input], [scale, zero_point], *numbers, CORRECTED=corrected)


def fake_quantize_affine_backward(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    corrected: bool,
) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_affine_backward`` for float16, bfloat16 and float32."""
    options = {"factor": grad_factor, "CORRECTED": corrected}
    numbers = float(quant_min), float(quant_max)
    return backward(_backward_kernel, grad_output, [input], [scale, zero_point], *numbers, **options)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    variants = {"": {"CORRECTED": False}, "corrected": {"CORRECTED": True}}
    yield from cases([_forward_kernel, _backward_kernel], variants, ["quant_min", "quant_max"])
