"""LSQ+ on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_lsq import factor_or_paper
from tersor.quantization.fake_quantize_lsq_plus import _lsq_plus
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
def _forward_kernel(input, output, scale, offset, levels, rows, columns, size, TILE: tl.constexpr):
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    b = parameter(offset, rows, columns, size, TILE)
    y = round_half_even(clamp(tl.div_rn(x - b, s), 0.0, levels)) * s + b
    store(output, start, offsets, present, y)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_output, input, grad_input, partials, scale, offset, levels, rows, columns, size, TILE: tl.constexpr
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    s = parameter(scale, rows, columns, size, TILE)
    b = parameter(offset, rows, columns, size, TILE)
    value = tl.div_rn(x - b, s)
    outside = (value <= 0.0) | (value >= levels)
    clipped = clamp(value, 0.0, levels)
    step = tl.where(outside, clipped, round_half_even(clipped) - value)
    store(grad_input, start, offsets, present, tl.where(outside, 0.0, g))
    store_partial(partials, 0, g * step, rows, columns, TILE)
    store_partial(partials, 1, tl.where(outside, g, 0.0), rows, columns, TILE)


def fake_quantize_lsq_plus_forward(
    input: Tensor, scale: Tensor, offset: Tensor, levels: int, grad_factor: float | None
) -> Tensor:
    """The operator ``tersor::fake_quantize_lsq_plus_forward`` for float16, bfloat16 and float32."""
    return forward(_forward_kernel, _lsq_plus.rule, [input], [scale, offset], float(levels))


def fake_quantize_lsq_plus_backward(
    grad_output: Tensor, input: Tensor, scale: Tensor, offset: Tensor, levels: int, grad_factor: float | None
) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_lsq_plus_backward`` for float16, bfloat16 and float32."""
    factor = factor_or_paper(grad_factor, input, scale, levels)
    return backward(_backward_kernel, grad_output, [input], [scale, offset], float(levels), factor=factor)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    yield from cases([_forward_kernel, _backward_kernel], {"": {}}, ["levels"])
