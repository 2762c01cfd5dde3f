"""PACT on GPUs, one pass each way; tiles and bytes are those of ``_fake_quantize``."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.fake_quantize_pact import _pact
from tersor.triton_kernels.quantization._fake_quantize import (
    SIZES,
    Case,
    backward,
    cases,
    forward,
    least,
    load,
    parameter,
    relu,
    round_half_even,
    store,
    store_partial,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, output, alpha, levels, rows, columns, size, ROUND: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    a = parameter(alpha, rows, columns, size, TILE)
    y = least(relu(x), a)
    if ROUND:
        y = tl.div_rn(round_half_even(tl.div_rn(y * levels, a)) * a, levels)
    store(output, start, offsets, present, y)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(grad_output, input, grad_input, partials, alpha, rows, columns, size, TILE: tl.constexpr):
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    a = parameter(alpha, rows, columns, size, TILE)
    above = x >= a
    store(grad_input, start, offsets, present, tl.where((x < 0) | above, 0.0, g))
    store_partial(partials, 0, tl.where(above, g, 0.0), rows, columns, TILE)


def fake_quantize_pact_forward(input: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """The operator ``tersor::fake_quantize_pact_forward`` for float16, bfloat16 and float32."""
    return forward(_forward_kernel, _pact.rule, [input], [alpha], float(2**bits - 1), ROUND=bits != 32)


def fake_quantize_pact_backward(grad_output: Tensor, input: Tensor, alpha: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The operator ``tersor::fake_quantize_pact_backward`` for float16, bfloat16 and float32."""
    return backward(_backward_kernel, grad_output, [input], [alpha])


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    yield from cases([_forward_kernel, _backward_kernel], {"": {"ROUND": True}}, ["levels"])
