"""ReCU's weight on GPUs: a program a filter, and one that adds up what the filters leave; nothing waits for the GPU.

A program reads its filter once from memory, and again from the caches for the deviation, and for the signs together
with the sum of absolute standardised weights. Those are known before the layer's bound is, which changes them only
where it is 0 or NaN: the one program of the second launch then writes zeros over them. Backward, a program reads its
filter and the gradient twice, for two sums and for the result.

With u bytes of weight the launches move 2u forward and 3u backward.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.binary.recu_weight import EPS, SCALE
from tersor.triton_kernels.binary._power import log
from tersor.triton_kernels.binary.binary_sign import sign
from tersor.triton_kernels.quantization._fake_quantize import ELEMENTS, OPTIONS, SUMS, Case

BLOCK = 1024  # of what the last program reads at once

_EPS = tl.constexpr(EPS)
_SCALE = tl.constexpr(SCALE)


@triton.jit
def _load(filter, begin, size, BLOCK: tl.constexpr):
    """A block of a filter in float32, and which of its weights exist."""
    place = begin + tl.arange(0, BLOCK)
    return tl.load(filter + place, mask=place < size, other=0.0).to(tl.float32), place < size


@triton.jit(do_not_specialize=["size"])
def _filter_kernel(weight, output, statistics, sums, size, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Signs, mean and reciprocal deviation of a filter, and its sum of absolute standardised weights."""
    own = tl.program_id(0).to(tl.int64)
    size = size * VECTOR
    count = size.to(tl.float32)
    filter, signs = weight + own * size, output + own * size
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        total += _load(filter, begin, size, BLOCK)[0]
    mean = tl.div_rn(tl.sum(total, axis=0), count)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        w, present = _load(filter, begin, size, BLOCK)
        centred = tl.where(present, w - mean, 0.0)
        total += centred * centred
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, axis=0), count - 1.0) + _EPS))
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        w, present = _load(filter, begin, size, BLOCK)
        centred = tl.where(present, w - mean, 0.0)
        total += tl.abs(centred * _SCALE * rstd)
        place = begin + tl.arange(0, BLOCK)
        tl.store(signs + place, sign(centred).to(output.dtype.element_ty), mask=present)
    tl.store(statistics + own * 2, mean)
    tl.store(statistics + own * 2 + 1, rstd)
    tl.store(sums + own, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["filters", "size"])
def _bound_kernel(
    sums, tau, bound, output, filters, size, count, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The layer's bound, by one program; zeros for all of the ``size`` signs where there is none above 0."""
    filters = filters * VECTOR
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, filters, BLOCK):
        own = begin + tl.arange(0, BLOCK)
        total += tl.load(sums + own, mask=own < filters, other=0.0)
    average = tl.div_rn(tl.sum(total, axis=0), count)
    quantile = tl.load(tau)
    result = tl.where(quantile < 1.0, -average * log(2.0 - 2.0 * quantile), float("inf"))
    result = tl.where(tl.abs(average) < float("inf"), result, average)
    tl.store(bound, result)
    if not (result > 0.0):
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(output + place, tl.zeros([BLOCK], output.dtype.element_ty), mask=place < size)


@triton.jit
def _passed(grad_output, filter, mean, rstd, limit, begin, size, BLOCK: tl.constexpr):
    """The gradient of weights within the bound, and the centred weights."""
    w, present = _load(filter, begin, size, BLOCK)
    grad, _ = _load(grad_output, begin, size, BLOCK)
    centred = tl.where(present, w - mean, 0.0)
    return tl.where(tl.abs(centred * _SCALE * rstd) <= limit, grad, 0.0), centred


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    grad_output, weight, statistics, bound, grad_weight, size, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A filter's gradient: what passes, less its part along the centred weights, less the mean of that."""
    own = tl.program_id(0).to(tl.int64)
    size = size * VECTOR
    count = size.to(tl.float32)
    first = own * size
    mean, rstd = tl.load(statistics + own * 2), tl.load(statistics + own * 2 + 1)
    limit = tl.load(bound)
    products = tl.zeros([BLOCK], tl.float32)
    grads = tl.zeros([BLOCK], tl.float32)
    rests = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        grad, centred = _passed(grad_output + first, weight + first, mean, rstd, limit, begin, size, BLOCK)
        products += grad * centred
        grads += grad
        rests += centred  # what the mean's rounding leaves
    along = tl.div_rn(tl.sum(products, axis=0) * (rstd * rstd), count - 1.0)
    shift = tl.div_rn(tl.sum(grads, axis=0) - along * tl.sum(rests, axis=0), count)
    for begin in range(0, size, BLOCK):
        grad, centred = _passed(grad_output + first, weight + first, mean, rstd, limit, begin, size, BLOCK)
        result = (rstd * _SCALE) * ((grad - centred * along) - shift)
        place = begin + tl.arange(0, BLOCK)
        tl.store(grad_weight + first + place, result.to(grad_weight.dtype.element_ty), mask=place < size)


def recu_weight_forward(weight: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::recu_weight_forward`` for float16, bfloat16 and float32."""
    _check(weight)
    if tau.numel() != 1:
        raise ValueError(f"recu_weight: tau must have one element, got shape {tuple(tau.shape)}")
    weight, filters = weight.contiguous(), weight.shape[0]
    output = torch.empty_like(weight)
    statistics = weight.new_empty((filters, 2), dtype=torch.float32)
    bound = statistics.new_empty(())
    sums = statistics.new_empty(filters)
    tau = tau.to(weight.device, torch.float32)
    constants = _constants(weight)
    with torch.cuda.device_of(weight):
        if filters:
            _filter_kernel[(filters,)](
                weight, output, statistics, sums, weight[0].numel() // constants["VECTOR"], **constants, **OPTIONS
            )  # fmt: skip
        vector = math.gcd(filters, 4) or 1
        numbers = (filters // vector, weight.numel(), float(weight.numel()))
        _bound_kernel[(1,)](sums, tau, bound, output, *numbers, vector, BLOCK, **OPTIONS)
    return output, statistics, bound


def recu_weight_backward(grad_output: Tensor, weight: Tensor, statistics: Tensor, bound: Tensor) -> Tensor:
    """The operator ``tersor::recu_weight_backward`` for float16, bfloat16 and float32."""
    _check(weight)
    if grad_output.shape != weight.shape:
        raise ValueError(
            f"recu_weight: grad_output must have shape {tuple(weight.shape)}, got {tuple(grad_output.shape)}"
        )
    for what, tensor, shape in (("statistics", statistics, (weight.shape[0], 2)), ("bound", bound, ())):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"recu_weight: {what} must be torch.float32 of shape {shape}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    tensors = [t.contiguous() for t in (grad_output, weight, statistics)]
    grad_weight = torch.empty_like(tensors[1])
    if weight.numel():
        constants = _constants(weight)
        with torch.cuda.device_of(weight):
            _backward_kernel[(weight.shape[0],)](
                *tensors, bound, grad_weight, weight[0].numel() // constants["VECTOR"], **constants, **OPTIONS
            )  # fmt: skip
    return grad_weight


def _constants(weight: Tensor) -> dict[str, Any]:
    """16 elements a thread, fewer where a filter has fewer."""
    size = weight[0].numel() if weight.shape[0] else 0
    return {"VECTOR": math.gcd(size, 8) or 1, "BLOCK": min(max(triton.next_power_of_2(size), 128), ELEMENTS)}


def _check(weight: Tensor) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    if weight.dtype not in SUMS:
        raise TypeError(f"recu_weight: the Triton kernels take float16, bfloat16 and float32, got {weight.dtype}")
    if weight.dim() < 1:
        raise ValueError("recu_weight: weight must be (O, I, KH, KW) or (O, I), got shape ()")


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: the layers of ResNet-18 with the least and the most weights a filter."""
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        kinds = dict.fromkeys(("weight", "output", "grad_output", "grad_weight"), f"*{name}:16")
        kinds |= dict.fromkeys(("sums", "tau", "bound", "statistics"), "*fp32:16")
        kinds |= {"size": "i32", "filters": "i32", "count": "fp32"}
        for channels in (64, 512):
            constants = _constants(torch.empty((channels, channels, 3, 3), dtype=dtype, device="meta"))
            for kernel in (_filter_kernel, _backward_kernel):
                signature = {a: kinds[a] for a in kernel.arg_names if a not in constants}
                yield kernel, f"{name} {channels} channels", signature, constants, OPTIONS
        constants = {"VECTOR": 4, "BLOCK": BLOCK}
        signature = {a: kinds[a] for a in _bound_kernel.arg_names if a not in constants}
        yield _bound_kernel, name, signature, constants, OPTIONS
