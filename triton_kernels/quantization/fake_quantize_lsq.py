"""LSQ on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_lsq import _lsq, factor_or_paper
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


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(input, output, scale, quant_min, quant_max, rows, columns, size, TILE: tl.constexpr):
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    y = round_half_even(clamp(tl.div_rn(x, s), quant_min, quant_max)) * s
    store(output, start, offsets, present, y)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_output, input, grad_input, partials, scale, quant_min, quant_max, rows, columns, size, TILE: tl.constexpr
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    value = tl.div_rn(x, s)
    outside = (value <= quant_min) | (value >= quant_max)
    clipped = clamp(value, quant_min, quant_max)
    step = tl.where(outside, clipped, round_half_even(clipped) - value)
    store(grad_input, start, offsets, present, tl.where(outside, 0.0, g))
    store_partial(partials, 0, g * step, rows, columns, TILE)


def fake_quantize_lsq_forward(
    input: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float | None
) -> Tensor:
    """The operator ``tersor::fake_quantize_lsq_forward`` for float16, bfloat16 and float32."""
    return forward(_forward_kernel, _lsq.rule, [input], [scale], float(quant_min), float(quant_max))


def fake_quantize_lsq_backward(
    grad_output: Tensor, input: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float | None
) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_lsq_backward`` for float16, bfloat16 and float32."""
    factor = factor_or_paper(grad_factor, input, scale, quant_max)
    numbers = float(quant_min), float(quant_max)
    return backward(_backward_kernel, grad_output, [input], [scale], *numbers, factor=factor)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    yield from cases([_forward_kernel, _backward_kernel], {"": {}}, ["quant_min", "quant_max"])
