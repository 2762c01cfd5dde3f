"""What the kernels of window attention share: tokens by index arithmetic, the bias and its gradient by table index.

Logits are in units of log2(e), since exp2 is a single instruction. Divisions are 32-bit: the GPU has none for 64 bits.
The helpers take ``sizes = (height, width, heads)``, ``shift = (y, x)`` and ``masks = (mask, its four strides, value)``.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

# Sizes and strides are never specialised, so that other map sizes do not compile anew; what the loads must know of the
# strides' alignment is VECTOR. mask_3 is: as a rule it is 1, which makes the rows of a mask of pairs contiguous.
STRIDES = [f"{tensor}_{axis}" for tensor in ("query", "key", "value", "grad") for axis in "byxh"]
SIZES = ["table_r", "table_h", "mask_b", "mask_1", "mask_2", "height", "width", "heads", "shift_y", "shift_x"]
COUNTS = ["windows", "each", "vectors"]

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
FOLDED = tl.constexpr(64)  # rows of the table whose gradients are summed at a time: 32 registers a thread of 128


@triton.jit
def tokens(
    window, local, sizes, shift, masks,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Image, rows, columns and flags of the tokens at the places ``local`` of a window.

    Offsets within an image follow the type of row and column, 64 bits if WIDE: where 32 do, they save 30 registers.

    A flag holds 2 for a token that came round the map's upper or lower edge, 1 for left or right, and 4 if masked.
    """
    across = sizes[1] // WINDOW_W
    down = sizes[0] // WINDOW_H
    image = (window // (down * across)).to(tl.int64)
    y = window // across % down * WINDOW_H + local // WINDOW_W
    x = window % across * WINDOW_W + local % WINDOW_W
    flags = tl.zeros_like(local)
    if SHIFTED:
        y += shift[0]
        x += shift[1]
        flags = 2 * ((y < 0) | (y >= sizes[0])).to(tl.int32) + ((x < 0) | (x >= sizes[1])).to(tl.int32)
        y = tl.where(y < 0, y + sizes[0], tl.where(y >= sizes[0], y - sizes[0], y))
        x = tl.where(x < 0, x + sizes[1], tl.where(x >= sizes[1], x - sizes[1], x))
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    if MASK == "tokens":
        outside = masks[0] + image * masks[1] + (y * masks[2] + x * masks[3])
        flags += 4 * (tl.load(outside, mask=local < WINDOW_H * WINDOW_W, other=0) != 0).to(tl.int32)
    if SHIFTED or MASK == "tokens":
        # Through shared memory: else each thread computes them anew for all pairs it holds, in 50 registers more.
        flags = tl.gather(flags, tl.arange(0, local.shape[0]), 0)
    return image, y, x, flags


@triton.jit
def rows(base, image, head, y, x, stride_b, stride_y, stride_x, stride_h, d, VECTOR: tl.constexpr):
    """Pointers to the vectors of the tokens, ``[TOKENS, BLOCK_D]``; the strides count VECTOR elements each."""
    first = image * stride_b + head.to(tl.int64) * stride_h
    return base + first * VECTOR + ((y * stride_y + x * stride_x) * VECTOR)[:, None] + d[None, :]


@triton.jit
def dense_rows(base, image, head, y, x, sizes, vectors, d, PLACE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers into a contiguous result: PLACE says how many tensors of ``vectors`` lie before, which part it is of how
    many that a token has side by side."""
    step = PLACE[2] * sizes[2]
    first = image * sizes[0] * sizes[1] * step + tl.cast(vectors, tl.int64) * PLACE[0] + PLACE[1] * sizes[2] + head
    return base + first * HEAD_DIM + ((y * sizes[1] + x) * step * HEAD_DIM)[:, None] + d[None, :]


@triton.jit
def statistics(base, image, head, y, x, sizes):
    """Pointers into ``(B, heads, H, W)``."""
    return base + (image * sizes[2] + head) * sizes[0] * sizes[1] + (y * sizes[1] + x)


@triton.jit
def load(pointers, present, d, HEAD_DIM: tl.constexpr):
    """Vectors; zeros where there is no token."""
    return tl.load(pointers, mask=present[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store(pointers, vectors, present, d, HEAD_DIM: tl.constexpr):
    tl.store(pointers, vectors.to(pointers.dtype.element_ty), mask=present[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def slice_start(query_start, key_start, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, KEYS: tl.constexpr):
    """The table's first row that a block of queries and a block of keys can meet."""
    last = tl.minimum(key_start + KEYS, WINDOW_H * WINDOW_W) - 1
    return (query_start // WINDOW_W - last // WINDOW_W + WINDOW_H - 1) * (2 * WINDOW_W - 1)


@triton.jit
def bias(
    table, table_r, table_h, head, query, key, first,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """The bias of all pairs; -inf where there is no key. ``query`` and ``key`` lie along different axes.

    A slice of the table, from its row ``first`` on, is read once, and the pairs find theirs in shared memory: from
    global memory they would be as many scalar loads as there are pairs.
    """
    # A row of the window is WINDOW_W - 1 further in the table than in the window.
    index = query + query // WINDOW_W * (WINDOW_W - 1) - (key + key // WINDOW_W * (WINDOW_W - 1))
    index += (WINDOW_H - 1) * (2 * WINDOW_W - 1) + WINDOW_W - 1 - first
    pairs = tl.zeros(index.shape, tl.float32)
    if table is not None:
        r = first + tl.arange(0, SLICE)
        entries = table + head.to(tl.int64) * table_h + r.to(tl.int64) * table_r
        entry = tl.load(entries, mask=r < (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1), other=0.0).to(tl.float32) * LOG2E
        index = tl.minimum(tl.maximum(index, 0), SLICE - 1)  # of pairs that there are not
        pairs = tl.reshape(tl.gather(entry, tl.reshape(index, [index.shape[0] * index.shape[1]]), 0), index.shape)
    return tl.where(key < WINDOW_H * WINDOW_W, pairs, float("-inf"))


@triton.jit
def logits(
    left, right, scale, pairs, image, window, query, key, left_flags, right_flags, sizes, masks,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Those of ``left`` (queries or keys) and ``right`` (the others); ``query`` and ``key`` are their places."""
    result = tl.dot(left, tl.trans(right), input_precision="ieee") * (scale * LOG2E) + pairs
    value = tl.cast(masks[5], tl.float32) * LOG2E  # for a cut and for a mask, each
    if SHIFTED:
        result += tl.where(((left_flags[:, None] ^ right_flags[None, :]) & 3) != 0, value, 0.0)
    if MASK == "tokens":
        result += tl.where((left_flags[:, None] & right_flags[None, :]) >= 4, value, 0.0)
    if MASK == "pairs":
        within = window % (sizes[0] // WINDOW_H * (sizes[1] // WINDOW_W))
        first = masks[0] + image * masks[1] + within.to(tl.int64) * masks[2]
        present = (query < WINDOW_H * WINDOW_W) & (key < WINDOW_H * WINDOW_W)
        if WIDE:
            query = query.to(tl.int64)
            key = key.to(tl.int64)
        place = query * masks[3] + key * masks[4]
        result += tl.where(tl.load(first + place, mask=present, other=0) != 0, value, 0.0)
    return result


@triton.jit
def fold_pairs(
    total, partials, query_start, key_start, first,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Writes the table's gradient from row ``first`` on, SLICE rows, from that of the logits, ``[KEYS, QUERIES]``."""
    key = key_start + tl.arange(0, total.shape[0])[:, None]
    STEP: tl.constexpr = min(SLICE, FOLDED)
    for start in range(0, SLICE, STEP):
        place = start + tl.arange(0, STEP)
        r = first + place[None, :]
        y = key // WINDOW_W + r // (2 * WINDOW_W - 1) - (WINDOW_H - 1)
        x = key % WINDOW_W + r % (2 * WINDOW_W - 1) - (WINDOW_W - 1)
        query = y * WINDOW_W + x - query_start
        # The least of all distances to a limit: LLVM has put the comparisons' results together on the stack.
        least = tl.minimum(tl.minimum(y, WINDOW_H - 1 - y), tl.minimum(x, WINDOW_W - 1 - x))
        least = tl.minimum(tl.minimum(query, total.shape[1] - 1 - query), least)
        met = tl.minimum(WINDOW_H * WINDOW_W - 1 - key, least) >= 0
        found = tl.gather(total, tl.where(met, query, 0), 1)
        tl.store(partials + place, tl.sum(tl.where(met, found, 0.0), axis=0))


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
