"""Residual sum, choice of tokens and layer norm on GPUs: one launch forward, one backward and one that adds up sums.

Forward, a program owns some tokens of an image, counts their ranks, and of those that are kept reads both summands,
normalises, and writes two rows where the rank says. A token that is dropped is not read: with m of n rows kept, 2m are
read and 2m written.

Backward, a program owns some tokens and finds their places in the index: it reads three rows of each that was kept and
writes both gradients of all, zeros too. What its rows give to weight and bias it sums in registers, and the last launch
adds up the programs' sums in their order: no atomics.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.tokens.prune_tokens import _reference, _reference_backward
from tersor.triton_kernels.tokens._rank import (
    BLOCK_N,
    ITEMSIZES,
    LONGEST_ROW,
    OPTIONS,
    Case,
    check,
    check_index,
    check_scores,
    count_ranks,
    find,
    launch,
    plan,
    rows,
    signature_of,
    sorted_by_torch,
)

ELEMENTS = 2048  # of a tile: 16 of a thread forward, 8 backward, where more tensors share the registers
SPAN = 64  # tokens whose sums a program of the backward adds up: two float32 rows for them
PARTIALS, COLUMNS = 128, 16  # of a step of the last launch

_STRIDES = [f"{t}_{axis}" for t in ("input", "branch", "grad", "outer", "tokens") for axis in "bn"]
_SIZES = ["scores_b", "scores_n", "order_b", "index_b", "index_n", "length", "count", "kept", "programs"]


@triton.jit
def _normalize(value, inside, eps, CHANNELS: tl.constexpr):
    """Standardised rows, and the reciprocal of their deviation."""
    centred = tl.where(inside, value - (tl.sum(value, axis=1) / CHANNELS)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _forward_kernel(
    input, branch, weight, bias, scores, order, tokens, normalized, index,
    input_b, input_n, branch_b, branch_n, scores_b, scores_n, order_b, length, count, scale, eps,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of an image: those of their numbers, or, with ``order`` given, those of their ranks."""
    blocks = tl.cdiv(length if order is None else 1 + count, BLOCK_T)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    if order is None:
        token = place
        rank = count_ranks(scores + image * scores_b, scores_n, token - 1, length - 1, BLOCK_N)
        row = tl.where(token == 0, 0, 1 + rank)  # the class token comes first
        kept = (token < length) & (row <= count)
    else:
        row = place
        kept = row <= count
        other = tl.load(order + image * order_b + row - 1, mask=kept & (row > 0), other=-1)
        token = 1 + other.to(tl.int32)
    tl.store(index + image * (1 + count) + row, token.to(tl.int64), mask=kept)
    c = tl.arange(0, BLOCK_C)
    inside = (c < CHANNELS)[None, :]
    mask = kept[:, None] & inside
    value = tl.load(rows(branch, image, token, branch_b, branch_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)
    first = tl.load(rows(input, image, token, input_b, input_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)
    value = first + scale * value
    target = rows(tokens, image * (1 + count), row, CHANNELS, CHANNELS, c, 1)
    tl.store(target, value.to(tokens.dtype.element_ty), mask=mask)
    standard, _rstd = _normalize(value, inside, eps, CHANNELS)
    factor = tl.load(weight + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    term = tl.load(bias + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    target = rows(normalized, image * (1 + count), row, CHANNELS, CHANNELS, c, 1)
    tl.store(target, (standard * factor[None, :] + term[None, :]).to(normalized.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _backward_kernel(
    grad_tokens, grad_normalized, tokens, weight, index, grad_input, grad_branch, sums,
    outer_b, outer_n, grad_b, grad_n, tokens_b, tokens_n, index_b, index_n, length, kept, scale, eps,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """SPAN tokens of an image; ``sums`` is ``(programs, 2, CHANNELS)``."""
    spans = tl.cdiv(length, SPAN)
    image = (tl.program_id(0) // spans).to(tl.int64)
    start = tl.program_id(0) % spans * SPAN
    c = tl.arange(0, BLOCK_C)
    inside = (c < CHANNELS)[None, :]
    factor = tl.load(weight + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    weight_total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    bias_total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    entries = index + image * index_b + tl.arange(0, 1)
    for begin in range(start, tl.minimum(length, start + SPAN), BLOCK_T):
        token = begin + tl.arange(0, BLOCK_T)
        present = (token < length)[:, None] & inside
        every = tl.arange(0, 1) == 0
        row, _copies = find(entries, index_n, token.to(tl.int64), token * 0 - 1, every, kept, BLOCK_N)
        mask = present & (row < kept)[:, None]
        value = tl.load(rows(tokens, image, row, tokens_b, tokens_n, c, VECTOR), mask=mask, other=0.0)
        grad = tl.load(rows(grad_normalized, image, row, grad_b, grad_n, c, VECTOR), mask=mask, other=0.0)
        outer = tl.load(rows(grad_tokens, image, row, outer_b, outer_n, c, VECTOR), mask=mask, other=0.0)
        grad = grad.to(tl.float32)
        standard, rstd = _normalize(value.to(tl.float32), inside, eps, CHANNELS)
        weight_total += grad * standard
        bias_total += grad
        scaled = grad * factor[None, :]
        mean = tl.sum(scaled, axis=1) / CHANNELS
        slope = tl.sum(scaled * standard, axis=1) / CHANNELS
        total = outer.to(tl.float32) + (scaled - mean[:, None] - standard * slope[:, None]) * rstd[:, None]
        total = tl.where(mask, total, 0.0)  # of a weight that is not finite a dropped token knows nothing
        target = rows(grad_input, image * length, token, CHANNELS, CHANNELS, c, 1)
        tl.store(target, total.to(grad_input.dtype.element_ty), mask=present)
        if grad_branch is not None:
            scaled = tl.where(mask, total * scale, 0.0)
            target = rows(grad_branch, image * length, token, CHANNELS, CHANNELS, c, 1)
            tl.store(target, scaled.to(grad_branch.dtype.element_ty), mask=present)
    if sums is not None:
        own = sums + tl.program_id(0).to(tl.int64) * 2 * CHANNELS + c
        tl.store(own, tl.sum(weight_total, axis=0), mask=c < CHANNELS)
        tl.store(own + CHANNELS, tl.sum(bias_total, axis=0), mask=c < CHANNELS)


@triton.jit(do_not_specialize=["programs"])
def _fold_kernel(
    sums, grad_weight, grad_bias, programs, CHANNELS: tl.constexpr, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The programs' sums of COLUMNS channels of the weight or the bias, added up."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    total = tl.zeros([PARTIALS, COLUMNS], tl.float32)
    for begin in range(0, programs, PARTIALS):
        part = begin + tl.arange(0, PARTIALS)
        own = sums + (part.to(tl.int64) * 2 + which)[:, None] * CHANNELS + c[None, :]
        total += tl.load(own, mask=(part < programs)[:, None] & (c < CHANNELS)[None, :], other=0.0)
    value = tl.sum(total, axis=0).to(grad_weight.dtype.element_ty)
    if which == 0:
        tl.store(grad_weight + c, value, mask=c < CHANNELS)
    else:
        tl.store(grad_bias + c, value, mask=c < CHANNELS)


def prune_tokens_forward(
    input: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scores: Tensor, count: int, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::prune_tokens_forward`` for float16, bfloat16 and float32.

    More than 8192 channels go to the reference. Of more than 4096 tokens, and of float64 scores, torch sorts the
    ranking.
    """
    name = "prune_tokens"
    if input.dim() != 3:
        raise ValueError(f"{name}: input must be (B, n, C), got shape {tuple(input.shape)}")
    batch, length, channels = input.shape
    vector = (channels,)
    check(name, input, branch=(branch, input.shape), weight=(weight, vector), bias=(bias, vector))
    check_scores(name, scores, (batch, length - 1))
    if not 0 <= count < length:
        raise ValueError(f"{name}: count must be less than {length}, got {count}")
    if not 0 < channels <= LONGEST_ROW:
        return _reference(input, branch, weight, bias, scores, count, scale, eps)
    order = None
    if sorted_by_torch(scores):
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
    tokens, normalized = (input.new_empty((batch, 1 + count, channels)) for _ in range(2))
    index = torch.empty((batch, 1 + count), dtype=torch.int64, device=input.device)
    inputs, strides, wide = plan(input.element_size(), input, branch)
    constants, options = _plan(channels, wide, 16)
    given = (weight.contiguous(), bias.contiguous(), None if order is not None else scores, order)
    strides += [*scores.stride(), length - 1]
    programs = batch * triton.cdiv(length if order is None else 1 + count, constants["BLOCK_T"])
    arguments = (*inputs, *given, tokens, normalized, index, *strides, length, count, scale, eps)
    launch(_forward_kernel, (programs,), constants, options, *arguments)
    return tokens, normalized, index


def prune_tokens_backward(
    grad_tokens: Tensor,
    grad_normalized: Tensor,
    tokens: Tensor,
    weight: Tensor,
    index: Tensor,
    length: int,
    scale: float,
    eps: float,
    need_branch: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``tersor::prune_tokens_backward`` for float16, bfloat16 and float32; no atomics.

    ``index`` is as the forward made it: a token is kept once. More than 8192 channels go to the reference.
    """
    name = "prune_tokens"
    if tokens.dim() != 3:
        raise ValueError(f"{name}: tokens must be (B, 1 + m, C), got shape {tuple(tokens.shape)}")
    batch, kept, channels = tokens.shape
    shape = tokens.shape
    given = {"grad_tokens": (grad_tokens, shape), "grad_normalized": (grad_normalized, shape)}
    check(name, tokens, **given, weight=(weight, (channels,)))
    check_index(name, (batch, kept), index=index)
    if not 0 < channels <= LONGEST_ROW:
        options = (length, scale, eps, need_branch, need_parameters)
        return _reference_backward(grad_tokens, grad_normalized, tokens, weight, index, *options)
    grad_input = tokens.new_empty((batch, length, channels))
    grad_branch = torch.empty_like(grad_input) if need_branch else None
    inputs, strides, wide = plan(tokens.element_size(), grad_tokens, grad_normalized, tokens)
    constants, options = _plan(channels, wide, 8)
    programs = batch * triton.cdiv(length, SPAN)
    sums = None
    if need_parameters:
        sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=tokens.device)
    arguments = (*inputs, weight.contiguous(), index, grad_input, grad_branch, sums, *strides, *index.stride())
    constants |= {"SPAN": SPAN}
    launch(_backward_kernel, (programs,), constants, options, *arguments, length, kept, scale, eps)
    grad_weight, grad_bias = (tokens.new_empty(channels if need_parameters else 0) for _ in range(2))
    if sums is not None:
        folding = {"CHANNELS": channels, "PARTIALS": PARTIALS, "COLUMNS": COLUMNS}
        grid = (triton.cdiv(channels, COLUMNS), 2)
        launch(_fold_kernel, grid, folding, OPTIONS, sums, grad_weight, grad_bias, programs)
    return grad_input, tokens.new_empty(0) if grad_branch is None else grad_branch, grad_weight, grad_bias


def _plan(channels: int, vector: int, each: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options of a kernel that holds rows in one piece, ``each`` elements to a thread."""
    block = max(16, triton.next_power_of_2(channels))
    tokens = max(1, min(ELEMENTS // block, SPAN))
    constants = {"CHANNELS": channels, "VECTOR": vector, "BLOCK_N": BLOCK_N, "BLOCK_T": tokens, "BLOCK_C": block}
    return constants, OPTIONS | {"num_warps": min(tokens * block // each // 32, 32)}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    data = ("input", "branch", "weight", "bias", "tokens", "normalized")
    gradients = ("grad_tokens", "grad_normalized", "grad_input", "grad_branch")
    for name, channels in (("fp16", 384), ("bf16", 384), ("fp32", 384), ("fp32", LONGEST_ROW)):
        kinds = dict.fromkeys((*data, *gradients), f"*{name}:16") | {"scale": "fp32", "eps": "fp32"}
        kinds |= {"scores": "*fp32:16", "index": "*i64:16", "sums": "*fp32:16"}
        vector, label = 16 // ITEMSIZES[name], f"{name} {channels} channels"
        own, options = _plan(channels, vector, 16)
        own |= {"order": None}
        yield _forward_kernel, label, signature_of(_forward_kernel, own, kinds), own, options
        own, options = _plan(channels, vector, 8)
        own |= {"SPAN": SPAN}
        yield _backward_kernel, label, signature_of(_backward_kernel, own, kinds), own, options
    own = {"CHANNELS": 384, "PARTIALS": PARTIALS, "COLUMNS": COLUMNS}
    kinds = {"sums": "*fp32:16", "grad_weight": "*fp16:16", "grad_bias": "*fp16:16"}
    yield _fold_kernel, "fp16 384 channels", signature_of(_fold_kernel, own, kinds), own, OPTIONS
