"""CF-ViT's coarse-to-fine step on GPUs: one launch in each direction, which reads and writes each row once.

Forward, a program owns some coarse tokens of an image. It counts their ranks and writes their rows where these say:
four of a token that is split, one of a token that is not. Per image it reads the 4k rows of fine patches that are
chosen, as many of the position table (from the cache, of which all images share it), k rows of reuse and N - k coarse
rows, and writes 1 + 3k + N: with k = 25 of N = 49 these are 274 rows, as the least there can be.

Backward, a program owns one coarse token and some channels, and goes through the batch a block of images at a time,
finding the token's rank in each: it writes all that the token receives, zeros too, and adds up the position table's
gradients in registers. An image's place in its block decides which sum it goes into; the sums are added up at the end.
No atomics. Where no sum over the batch is asked for, other programs have the rest of the batch. With a given order the
gradients of the fine patches and of reuse lie in the order of rank: a program writes those of one rank, besides, and
the rows that were split are read once more for the position table.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.tokens._rank import (
    BLOCK_N,
    ITEMSIZES,
    OPTIONS,
    Case,
    block_of,
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

TOKENS, CHANNELS = 8, 128  # of the forward's tile: ten 16-byte loads of a thread under way in half precision
IMAGES, GRAD_CHANNELS = 32, 32  # of the backward's, in half precision one 16-byte load a thread and row
ORDERS = 32  # entries of each image's ranking that are searched at a time: 64-bit numbers take registers
SPAN = 64  # images of a program of the backward, where it need not take all
# Three programs to a multiprocessor. The compiler would rather spill 8 or 16 bytes than take more than 128 registers.
GRAD_OPTIONS = OPTIONS | {"maxnreg": 168}

_STRIDES = [f"{t}_{axis}" for t in ("coarse", "fine", "reuse", "position", "cls", "grad") for axis in "bn"]
_SIZES = ["scores_b", "scores_n", "order_b", "order_n", "batch", "count", "chosen", "side", "each"]


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _forward_kernel(
    coarse, fine, reuse, position, cls, scores, order, tokens, ranked,
    coarse_b, coarse_n, fine_b, fine_n, reuse_b, reuse_n, position_b, position_n, cls_b, cls_n,
    scores_b, scores_n, order_b, order_n, count, chosen, side,
    CHANNELS: tl.constexpr, SELECTED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T coarse tokens of an image: those of their numbers, or, with ``order`` given, those of their ranks."""
    blocks = tl.cdiv(count, BLOCK_T)
    image = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    place = block * BLOCK_T + tl.arange(0, BLOCK_T)
    present = place < count
    wide = image.to(tl.int64)
    if order is None:
        token = place
        rank = count_ranks(scores + wide * scores_b, scores_n, token, count, BLOCK_N)
        tl.store(ranked + wide * count + rank, token.to(tl.int64), mask=present)
        valid = present
    else:
        rank = place
        entry = tl.load(order + wide * order_b + rank.to(tl.int64) * order_n, mask=present, other=0)
        valid = present & (entry >= 0) & (entry < count)
        token = tl.where(valid, entry, 0).to(tl.int32)
    split = present & (rank < chosen)
    length = 1 + 3 * chosen + count
    for begin in range(0, CHANNELS, BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        inside = (c < CHANNELS)[None, :]
        parent = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if reuse is not None:
            source = rows(reuse, wide, rank if SELECTED else token, reuse_b, reuse_n, c, VECTOR)
            parent = tl.load(source, mask=split[:, None] & inside, other=0.0).to(tl.float32)
        for corner in tl.static_range(4):
            f = 4 * token - 2 * (token % side) + (corner // 2) * 2 * side + corner % 2
            row = corner * chosen + rank
            source = rows(fine, wide, row if SELECTED else f, fine_b, fine_n, c, VECTOR)
            value = tl.load(source, mask=split[:, None] & inside, other=0.0).to(tl.float32)
            if reuse is not None:
                value += parent
            if position is not None:
                source = rows(position, wide, 1 + f, position_b, position_n, c, VECTOR)
                value += tl.load(source, mask=split[:, None] & inside, other=0.0).to(tl.float32)
            if not SELECTED or position is not None:
                value = tl.where(valid[:, None], value, float("nan"))
            target = rows(tokens, wide * length, 1 + row, CHANNELS, CHANNELS, c, 1)
            tl.store(target, value.to(tokens.dtype.element_ty), mask=split[:, None] & inside)
        stays = (present & (rank >= chosen))[:, None] & inside
        source = rows(coarse, wide, 1 + token, coarse_b, coarse_n, c, VECTOR)
        value = tl.load(source, mask=stays, other=0.0)
        value = tl.where(valid[:, None], value, float("nan"))
        target = rows(tokens, wide * length, 1 + 3 * chosen + rank, CHANNELS, CHANNELS, c, 1)
        tl.store(target, value.to(tokens.dtype.element_ty), mask=stays)
        if block == 0:
            first = tl.load(cls + wide * cls_b * VECTOR + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            if position is not None:
                first += tl.load(position + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            tl.store(tokens + wide * length * CHANNELS + c, first.to(tokens.dtype.element_ty), mask=c < CHANNELS)


@triton.jit
def _load_rows(grad_tokens, image, row, grad_b, grad_n, c, mask, VECTOR: tl.constexpr):
    return tl.load(rows(grad_tokens, image, row, grad_b, grad_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _received(grad_tokens, grad_coarse, image, rank, count, chosen, grad_b, grad_n, c, mask, VECTOR: tl.constexpr):
    """What a token of these ranks gets: its four children's gradients, or its own, which is 0 if it is not wanted."""
    split = mask & (rank < chosen)[:, None]
    fine0 = _load_rows(grad_tokens, image, 1 + rank, grad_b, grad_n, c, split, VECTOR)
    fine1 = _load_rows(grad_tokens, image, 1 + chosen + rank, grad_b, grad_n, c, split, VECTOR)
    fine2 = _load_rows(grad_tokens, image, 1 + 2 * chosen + rank, grad_b, grad_n, c, split, VECTOR)
    fine3 = _load_rows(grad_tokens, image, 1 + 3 * chosen + rank, grad_b, grad_n, c, split, VECTOR)
    left = tl.zeros_like(fine0)
    if grad_coarse is not None:
        stays = mask & ((rank >= chosen) & (rank < count))[:, None]
        left = _load_rows(grad_tokens, image, 1 + 3 * chosen + rank, grad_b, grad_n, c, stays, VECTOR)
    return fine0, fine1, fine2, fine3, left


@triton.jit
def _store(target, image, row, length, c, value, mask, CHANNELS: tl.constexpr):
    """Rows of a contiguous ``(B, length, CHANNELS)``."""
    pointers = rows(target, image.to(tl.int64) * length, row, CHANNELS, CHANNELS, c, 1)
    tl.store(pointers, value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _class_row(
    grad_tokens, grad_coarse, grad_position, grad_cls, grad_b, grad_n, first_image, last_image, length, c,
    CHANNELS: tl.constexpr, SHARED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the class token's row gives to ``cls`` and to the position table; of ``coarse`` it is not used."""
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for begin in range(first_image, last_image, BLOCK_B):
        image = begin + tl.arange(0, BLOCK_B)
        mask = (image < last_image)[:, None] & (c < CHANNELS)[None, :]
        zero = image * 0
        value = _load_rows(grad_tokens, image, zero, grad_b, grad_n, c, mask, VECTOR)
        total += value
        if grad_coarse is not None:
            _store(grad_coarse, image, zero, length, c, tl.zeros_like(value), mask, CHANNELS)
        if grad_cls is not None and not SHARED:
            _store(grad_cls, image, zero, 1, c, value, mask, CHANNELS)
    value = tl.sum(total, axis=0)
    if grad_position is not None:
        tl.store(grad_position + c, value.to(grad_position.dtype.element_ty), mask=c < CHANNELS)
    if grad_cls is not None and SHARED:
        tl.store(grad_cls + c, value.to(grad_cls.dtype.element_ty), mask=c < CHANNELS)


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _backward_kernel(
    grad_tokens, order, grad_coarse, grad_fine, grad_reuse, grad_position, grad_cls,
    grad_b, grad_n, order_b, order_n, batch, count, chosen, side, each,
    CHANNELS: tl.constexpr, SELECTED: tl.constexpr, SHARED: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All that one coarse token, or the class token, and some channels receive from ``each`` images."""
    token = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_image = tl.program_id(2) * each
    last_image = tl.minimum(first_image + each, batch)
    if token == count:
        _class_row(
            grad_tokens, grad_coarse, grad_position, grad_cls, grad_b, grad_n, first_image, last_image, 1 + count, c,
            CHANNELS, SHARED, VECTOR, BLOCK_B, BLOCK_C,
        )  # fmt: skip
    else:
        first = 4 * token - 2 * (token % side)
        parents = chosen if SELECTED else count
        total0 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        total1 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        total2 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        total3 = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
        for begin in range(first_image, last_image, BLOCK_B):
            image = begin + tl.arange(0, BLOCK_B)
            present = image < last_image
            mask = present[:, None] & (c < CHANNELS)[None, :]
            if SELECTED and (grad_fine is not None or grad_reuse is not None):
                own = mask & (image * 0 + token < chosen)[:, None]  # these two lie in the order of rank
                parent = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
                for corner in tl.static_range(4):
                    row = image * 0 + corner * chosen + token
                    value = _load_rows(grad_tokens, image, 1 + row, grad_b, grad_n, c, own, VECTOR)
                    parent += value
                    if grad_fine is not None:
                        _store(grad_fine, image, row, 4 * parents, c, value, own, CHANNELS)
                if grad_reuse is not None:
                    _store(grad_reuse, image, image * 0 + token, parents, c, parent, own, CHANNELS)
            if not SELECTED or grad_coarse is not None or grad_position is not None:
                entries = order + image.to(tl.int64) * order_b
                wanted = tl.zeros([1], tl.int64) + token
                rank, copies = find(entries, order_n, wanted, image * 0 - 1, present, count, BLOCK_N)
                fine0, fine1, fine2, fine3, left = _received(
                    grad_tokens, grad_coarse, image, rank, count, chosen, grad_b, grad_n, c, mask, VECTOR
                )
                parent = (fine0 + fine1 + fine2 + fine3).to(grad_tokens.dtype.element_ty).to(tl.float32)
                for _copy in range(1, tl.max(copies, axis=0)):  # none: a ranking has each token once
                    rank, _rest = find(entries, order_n, wanted, rank, present, count, BLOCK_N)
                    more0, more1, more2, more3, more_left = _received(
                        grad_tokens, grad_coarse, image, rank, count, chosen, grad_b, grad_n, c, mask, VECTOR
                    )
                    parent += (more0 + more1 + more2 + more3).to(grad_tokens.dtype.element_ty).to(tl.float32)
                    fine0 += more0
                    fine1 += more1
                    fine2 += more2
                    fine3 += more3
                    left += more_left
                row = image * 0 + first
                if grad_coarse is not None:
                    _store(grad_coarse, image, image * 0 + 1 + token, 1 + count, c, left, mask, CHANNELS)
                if not SELECTED and grad_reuse is not None:
                    _store(grad_reuse, image, image * 0 + token, count, c, parent, mask, CHANNELS)
                if not SELECTED and grad_fine is not None:
                    _store(grad_fine, image, row, 4 * count, c, fine0, mask, CHANNELS)
                    _store(grad_fine, image, row + 1, 4 * count, c, fine1, mask, CHANNELS)
                    _store(grad_fine, image, row + 2 * side, 4 * count, c, fine2, mask, CHANNELS)
                    _store(grad_fine, image, row + 2 * side + 1, 4 * count, c, fine3, mask, CHANNELS)
                total0 += fine0
                total1 += fine1
                total2 += fine2
                total3 += fine3
        if grad_position is not None:
            kind = grad_position.dtype.element_ty
            own = grad_position + (1 + first).to(tl.int64) * CHANNELS + c
            below = own + 2 * side.to(tl.int64) * CHANNELS
            tl.store(own, tl.sum(total0, axis=0).to(kind), mask=c < CHANNELS)
            tl.store(own + CHANNELS, tl.sum(total1, axis=0).to(kind), mask=c < CHANNELS)
            tl.store(below, tl.sum(total2, axis=0).to(kind), mask=c < CHANNELS)
            tl.store(below + CHANNELS, tl.sum(total3, axis=0).to(kind), mask=c < CHANNELS)


def resplit_tokens_forward(
    coarse: Tensor,
    fine_patches: Tensor,
    reuse: Tensor | None,
    position: Tensor | None,
    cls: Tensor,
    scores: Tensor | None,
    order: Tensor | None,
    chosen: int,
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::resplit_tokens_forward`` for float16, bfloat16 and float32.

    Of more than 4096 coarse tokens, and of float64 scores, torch sorts the ranking.
    """
    selected = scores is None
    batch, count, channels = _check(coarse, fine_patches, reuse, position, cls, scores, order, chosen)
    ranked = torch.empty((0,) if selected else (batch, count), dtype=torch.int64, device=coarse.device)
    if scores is not None and sorted_by_torch(scores):
        ranked = order = torch.argsort(scores, dim=1, descending=True, stable=True)
    tokens = coarse.new_empty((batch, 1 + 3 * chosen + count, channels))
    inputs, strides, vector = plan(coarse.element_size(), coarse, fine_patches, reuse, position, cls)
    strides += [0, 0] if scores is None else scores.stride()
    strides += [0, 0] if order is None else order.stride()
    constants = _forward_constants(channels, selected, vector)
    grid = (batch * triton.cdiv(count, TOKENS),)
    given = None if order is not None else scores
    side = math.isqrt(count)
    arguments = (*inputs, given, order, tokens, ranked, *strides, count, chosen, side)
    launch(_forward_kernel, grid, constants, OPTIONS, *arguments)
    return tokens, ranked


def resplit_tokens_backward(
    grad_tokens: Tensor,
    order: Tensor,
    chosen: int,
    selected: bool,
    need_coarse: bool,
    need_fine: bool,
    need_reuse: bool,
    need_position: bool,
    cls_rows: int,
) -> tuple[Tensor, ...]:
    """The operator ``tersor::resplit_tokens_backward`` for float16, bfloat16 and float32; no atomics."""
    if order.dim() != 2 or grad_tokens.dim() != 3:
        raise ValueError("resplit_tokens: order must be (B, N) and grad_tokens (B, 1 + 3k + N, C)")
    (batch, count), channels = order.shape, grad_tokens.shape[2]
    check("resplit_tokens", grad_tokens, grad_tokens=(grad_tokens, (batch, 1 + 3 * chosen + count, channels)))
    check_index("resplit_tokens", (batch, count), order=order)
    side = _check_counts(count, chosen)
    if cls_rows not in (0, 1, batch):
        raise ValueError(f"resplit_tokens: cls_rows must be 0, 1 or {batch}, got {cls_rows}")
    parents = chosen if selected else count
    shapes: list[Any] = [
        (batch, 1 + count, channels) if need_coarse else None,
        (batch, 4 * parents, channels) if need_fine else None,
        (batch, parents, channels) if need_reuse else None,
        (1, 1 + 4 * count, channels) if need_position else None,
        (cls_rows, 1, channels) if cls_rows else None,
    ]
    results = [None if shape is None else grad_tokens.new_empty(shape) for shape in shapes]
    shared = cls_rows != batch
    summed = need_position or (cls_rows > 0 and shared)
    each = batch if summed else SPAN
    inputs, strides, vector = plan(grad_tokens.element_size(), grad_tokens)
    constants = _backward_constants(channels, selected, shared, vector)
    chunks = 1 if summed else triton.cdiv(batch, SPAN)
    grid = (count + 1, triton.cdiv(channels, constants["BLOCK_C"]), chunks)
    numbers = (*strides, *order.stride(), batch, count, chosen, side, each)
    if any(shape is not None for shape in shapes):
        launch(_backward_kernel, grid, constants, GRAD_OPTIONS, *inputs, order, *results, *numbers)
    return tuple(grad_tokens.new_empty(0) if t is None else t for t in results)


def _check(
    coarse: Tensor,
    fine_patches: Tensor,
    reuse: Tensor | None,
    position: Tensor | None,
    cls: Tensor,
    scores: Tensor | None,
    order: Tensor | None,
    chosen: int,
) -> tuple[int, int, int]:
    name = "resplit_tokens"
    if coarse.dim() != 3 or (scores is None) == (order is None):
        raise ValueError(f"{name}: coarse must be (B, 1 + N, C), and one of scores and order given")
    batch, count, channels = coarse.shape[0], coarse.shape[1] - 1, coarse.shape[2]
    _check_counts(count, chosen)
    parents = chosen if scores is None else count
    check(
        name,
        coarse,
        fine_patches=(fine_patches, (batch, 4 * parents, channels)),
        reuse=(reuse, (batch, parents, channels)),
        position=(position, (1, 1 + 4 * count, channels)),
        cls=(cls, (batch if cls.shape[0] == batch else 1, 1, channels)),
    )
    if scores is not None:
        check_scores(name, scores, (batch, count))
    if order is not None:
        check_index(name, (batch, count), order=order)
    return batch, count, channels


def _check_counts(count: int, chosen: int) -> int:
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count or not 0 <= chosen <= count:
        raise ValueError(f"resplit_tokens: N must be a square and k at most N, got N = {count} and k = {chosen}")
    return side


def _forward_constants(channels: int, selected: bool, vector: int) -> dict[str, Any]:
    block = block_of(channels, CHANNELS)
    return {
        "CHANNELS": channels, "SELECTED": selected, "VECTOR": vector,
        "BLOCK_N": BLOCK_N, "BLOCK_T": TOKENS, "BLOCK_C": block,
    }  # fmt: skip


def _backward_constants(channels: int, selected: bool, shared: bool, vector: int) -> dict[str, Any]:
    return {
        "CHANNELS": channels, "SELECTED": selected, "SHARED": shared, "VECTOR": vector,
        "BLOCK_N": ORDERS, "BLOCK_B": IMAGES, "BLOCK_C": block_of(channels, GRAD_CHANNELS),
    }  # fmt: skip


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: kernel, label, signature, constants and options, as a launch chooses them.

    The signature is in the notation of Triton's own compiler driver: ``"*fp16:16"`` is a pointer to 16 aligned bytes.
    """
    data = ("coarse", "fine", "reuse", "position", "cls", "tokens", "grad_tokens")
    gradients = ("grad_coarse", "grad_fine", "grad_reuse", "grad_position", "grad_cls")
    for name, selected in (("fp16", False), ("bf16", False), ("fp32", False), ("fp16", True)):
        kinds = dict.fromkeys((*data, *gradients), f"*{name}:16")
        kinds |= {"scores": "*fp32:16", "order": "*i64:16", "ranked": "*i64:16"}
        vector = 16 // ITEMSIZES[name]
        label = f"{name} {'selected' if selected else 'scores'} 384 channels"
        own = _forward_constants(384, selected, vector) | ({"scores": None} if selected else {"order": None})
        yield _forward_kernel, label, signature_of(_forward_kernel, own, kinds), own, OPTIONS
        own = _backward_constants(384, selected, True, vector)
        yield _backward_kernel, label, signature_of(_backward_kernel, own, kinds), own, GRAD_OPTIONS
