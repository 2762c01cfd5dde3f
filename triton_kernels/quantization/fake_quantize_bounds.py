"""Fake-quantisation between two bounds on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_bounds import _bounds
from tersor.triton_kernels.quantization._fake_quantize import (
    SIZES,
    Case,
    backward,
    cases,
    clamp,
    differentiate_ddtb,
    forward,
    load,
    parameter,
    quantize_ddtb,
    relu,
    round_half_even,
    store,
    store_partial,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, output, lower, upper, levels, rows, columns, size,
    RULE: tl.constexpr, SIGNED: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    low = parameter(lower, rows, columns, size, TILE)
    high = parameter(upper, rows, columns, size, TILE)
    if RELU:
        x = relu(x)
    if RULE == "ddtb":
        y, _ = quantize_ddtb(x, low, high, levels)
    else:
        place = clamp(tl.div_rn(x - low, high - low), 0.0, 1.0)
        y = tl.div_rn(round_half_even(place * levels), levels)
        if SIGNED:
            y = (y - 0.5) * 2.0
    store(output, start, offsets, present, y)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_output, input, grad_input, partials, lower, upper, levels, rows, columns, size,
    RULE: tl.constexpr, TIE: tl.constexpr, SIGNED: tl.constexpr, RELU: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    low = parameter(lower, rows, columns, size, TILE)
    high = parameter(upper, rows, columns, size, TILE)
    closed = x <= 0.0
    if RELU:
        x = relu(x)
    if RULE == "ddtb":
        grad, grad_low, grad_high = differentiate_ddtb(g, x, low, high, levels, TIE)
    else:
        place = tl.div_rn(x - low, high - low)
        if SIGNED:
            g *= 2.0
        grad = tl.where((place >= 0.0) & (place <= 1.0), tl.div_rn(g, high - low), 0.0)
        place = clamp(place, 0.0, 1.0)  # one far outside would make 0 * inf
        grad_low = grad * (place - 1.0)
        grad_high = -grad * place
    if RELU:
        grad = tl.where(closed, 0.0, grad)
    store(grad_input, start, offsets, present, grad)
    store_partial(partials, 0, grad_low, rows, columns, TILE)
    store_partial(partials, 1, grad_high, rows, columns, TILE)


def fake_quantize_bounds_forward(
    input: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    rule: str,
    tie: str,
    signed: bool,
    relu: bool,
    grad_scale: float,
) -> Tensor:
    """The operator ``tersor::fake_quantize_bounds_forward`` for float16, bfloat16 and float32."""
    constants = {"RULE": rule, "SIGNED": signed, "RELU": relu}
    return forward(_forward_kernel, _bounds.rule, [input], [lower, upper], float(2**bits - 1), **constants)


def fake_quantize_bounds_backward(
    grad_output: Tensor,
    input: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    rule: str,
    tie: str,
    signed: bool,
    relu: bool,
    grad_scale: float,
) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_bounds_backward`` for float16, bfloat16 and float32."""
    options: dict[str, Any] = {"RULE": rule, "TIE": tie, "SIGNED": signed, "RELU": relu}
    levels = float(2**bits - 1)
    return backward(_backward_kernel, grad_output, [input], [lower, upper], levels, factor=grad_scale, **options)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    kernels = [_forward_kernel, _backward_kernel]
    ddtb = {"RULE": "ddtb", "TIE": "half", "SIGNED": False, "RELU": False}
    yield from cases(kernels, {"ddtb": ddtb}, ["levels"], everywhere=True)
    unit = {"RULE": "unit", "TIE": "half", "SIGNED": True, "RELU": False}
    yield from cases(kernels, {"ddtb relu": ddtb | {"RELU": True}, "unit signed": unit}, ["levels"])
