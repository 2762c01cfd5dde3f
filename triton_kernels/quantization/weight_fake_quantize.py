"""Fake-quantisation of weights on GPUs: the bounds by torch on the device, then one pass over the weight.

The weight is read twice and the output written, 3u of u bytes; for percentiles the sort comes to that. Tiles are
those of ``_fake_quantize``.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization.weight_fake_quantize import _check_values
from tersor.triton_kernels.quantization._fake_quantize import (
    SIZES,
    Case,
    cases,
    differentiate_ddtb,
    greatest,
    laid_out_like,
    launch,
    load,
    one_value_each,
    quantize_ddtb,
    round_half_even,
    store,
    tile,
)
from tersor.triton_kernels.quantization.percentile_bounds import percentile_bounds


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    input, output, bounds, lower, upper, levels, rows, columns, size, SYMMETRIC: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """``lower`` and ``upper`` are the least and the greatest weight, or the percentiles."""
    start, offsets, present = tile(rows, columns, TILE)
    x = load(input, start, offsets, present, 1.0)
    low, high = tl.load(lower).to(tl.float32), tl.load(upper).to(tl.float32)
    if SYMMETRIC:
        high = greatest(tl.abs(low), tl.abs(high)) + 1e-8
        low = -high
        y = tl.div_rn(round_half_even(tl.div_rn(x * levels, high)) * high, levels)
    else:
        y, _ = quantize_ddtb(x, low, high, levels)
    store(output, start, offsets, present, y)
    first = tl.program_id(0) == 0
    tl.store(bounds, low, mask=first)
    tl.store(bounds + 1, high, mask=first)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(grad_output, input, bounds, grad_input, rows, columns, size, TILE: tl.constexpr):
    start, offsets, present = tile(rows, columns, TILE)
    g = load(grad_output, start, offsets, present, 0.0)
    x = load(input, start, offsets, present, 1.0)
    grad, _, _ = differentiate_ddtb(g, x, tl.load(bounds), tl.load(bounds + 1), 3.0, "half")
    store(grad_input, start, offsets, present, grad)


def weight_fake_quantize_forward(weight: Tensor, bits: int, mode: str, percentile: float) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::weight_fake_quantize_forward`` for float16, bfloat16 and float32."""
    if weight.device.type == "cpu":  # in the interpreter; on a GPU it would wait for the values
        _check_values(weight, mode, percentile)
    plan, output = one_value_each(weight), torch.empty_like(weight)
    weight = laid_out_like(output, weight)
    bounds = torch.empty(2, dtype=torch.float32, device=weight.device)
    lower, upper = percentile_bounds(weight, percentile) if mode == "percentile" else torch.aminmax(weight)
    symmetric = mode == "symmetric"
    levels = float(2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)
    launch(_forward_kernel, plan, [weight, output, bounds], [lower, upper], [levels], {"SYMMETRIC": symmetric})
    return output, bounds


def weight_fake_quantize_backward(grad_output: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    """The operator ``tersor::weight_fake_quantize_backward`` for float16, bfloat16 and float32."""
    if bounds.shape != (2,) or bounds.dtype != torch.float32:
        raise ValueError(
            f"weight_fake_quantize: bounds must be torch.float32 of shape (2,), "
            f"got {bounds.dtype} of shape {tuple(bounds.shape)}"
        )
    plan, grad_weight = one_value_each(weight), torch.empty_like(weight)
    sources = [laid_out_like(grad_weight, t) for t in (grad_output, weight)]
    launch(_backward_kernel, plan, [*sources, bounds.contiguous(), grad_weight], [], [], {})
    return grad_weight


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    variants = {"symmetric": {"SYMMETRIC": True}, "bounds": {"SYMMETRIC": False}}
    yield from cases([_forward_kernel], variants, ["levels"])
    yield from cases([_backward_kernel], {"": {}})
