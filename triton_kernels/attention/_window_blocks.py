"""Window attention where a window does not fit a block: a program owns a block of it and loops over its other places.

Forward with a running maximum. Backward in three launches: the query's gradient, which needs two rounds over the keys,
the first for the sum of the weights' gradients; those of key and value; that of the bias. Each reads query, key, value
and grad_output, what other blocks have read from L2 as a rule: 15u move of the 7u that must. The bias of all pairs is
looked up in every step, whose 64 x 32 pairs leave the registers for that.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from tersor.triton_kernels.attention._window import (
    COUNTS,
    LN2,
    LOG2E,
    SIZES,
    STRIDES,
    bias,
    dense_rows,
    fold_pairs,
    load,
    logits,
    rows,
    slice_start,
    statistics,
    store,
    tokens,
)


@triton.jit(do_not_specialize=STRIDES[:12] + SIZES)
def forward_kernel(
    query, key, value, table, mask, output, logsumexp,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    head = tl.program_id(0) % heads
    start = tl.program_id(0) // heads % BLOCKS * BLOCK
    window = tl.program_id(0) // heads // BLOCKS
    d = tl.arange(0, BLOCK_D)
    a = start + tl.arange(0, BLOCK)
    image, y, x, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
    q = load(rows(query, image, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR), a < TOKENS, d, HEAD_DIM)

    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(0, TOKENS, STEP):
        b = begin + tl.arange(0, STEP)
        _, v, u, others = tokens(window, b, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        key_rows = rows(key, image, head, v, u, key_b, key_y, key_x, key_h, d, VECTOR)
        value_rows = rows(value, image, head, v, u, value_b, value_y, value_x, value_h, d, VECTOR)
        k, v = load(key_rows, b < TOKENS, d, HEAD_DIM), load(value_rows, b < TOKENS, d, HEAD_DIM)
        first = slice_start(start, begin, WINDOW_H, WINDOW_W, STEP)
        pairs = bias(table, table_r, table_h, head, a[:, None], b[None, :], first, WINDOW_H, WINDOW_W, SLICE)
        scores = logits(
            q, k, scale, pairs, image, window, a[:, None], b[None, :], flags, others, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        # NaN may leave the maximum alone: it comes back in the total.
        largest = tl.maximum(maximum, tl.max(scores, axis=1))
        known = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        shrink = tl.exp2(maximum - known)
        weights = tl.exp2(scores - known[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mean = mean * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = largest
    store(
        dense_rows(output, image, head, y, x, sizes, 0, d, (0, 0, 1), HEAD_DIM),
        mean * (1.0 / total)[:, None], a < TOKENS, d, HEAD_DIM,
    )  # fmt: skip
    lse = tl.where(total == 0.0, float("nan"), (maximum + tl.log2(total)) * LN2)  # all are -inf: torch's is NaN
    tl.store(statistics(logsumexp, image, head, y, x, sizes), lse, mask=a < TOKENS)


@triton.jit(do_not_specialize=STRIDES + SIZES + COUNTS[2:])
def grad_query_kernel(
    grad_output, query, key, value, table, mask, logsumexp, delta, grad_qkv,
    grad_b, grad_y, grad_x, grad_h,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    vectors, QUERY: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Also writes ``delta``, each query's sum of weights times their gradients."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    STEPS: tl.constexpr = (TOKENS + STEP - 1) // STEP
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    head = tl.program_id(0) % heads
    start = tl.program_id(0) // heads % BLOCKS * BLOCK
    window = tl.program_id(0) // heads // BLOCKS
    d = tl.arange(0, BLOCK_D)
    a = start + tl.arange(0, BLOCK)
    image, y, x, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
    q = load(rows(query, image, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR), a < TOKENS, d, HEAD_DIM)
    g = load(rows(grad_output, image, head, y, x, grad_b, grad_y, grad_x, grad_h, d, VECTOR), a < TOKENS, d, HEAD_DIM)
    lse = tl.load(statistics(logsumexp, image, head, y, x, sizes), mask=a < TOKENS, other=0.0) * LOG2E

    total = tl.zeros([BLOCK], tl.float32)
    grad_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for step in range(2 * STEPS):
        begin = step % STEPS * STEP
        b = begin + tl.arange(0, STEP)
        _, v, u, others = tokens(window, b, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        key_rows = rows(key, image, head, v, u, key_b, key_y, key_x, key_h, d, VECTOR)
        value_rows = rows(value, image, head, v, u, value_b, value_y, value_x, value_h, d, VECTOR)
        k, v = load(key_rows, b < TOKENS, d, HEAD_DIM), load(value_rows, b < TOKENS, d, HEAD_DIM)
        first = slice_start(start, begin, WINDOW_H, WINDOW_W, STEP)
        pairs = bias(table, table_r, table_h, head, a[:, None], b[None, :], first, WINDOW_H, WINDOW_W, SLICE)
        scores = logits(
            q, k, scale, pairs, image, window, a[:, None], b[None, :], flags, others, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        grad_weights = tl.dot(g, tl.trans(v), input_precision="ieee")
        if step < STEPS:
            total += tl.sum(weights * grad_weights, axis=1)
        else:
            grad_logits = weights * (grad_weights - total[:, None])
            grad_q += tl.dot(grad_logits.to(k.dtype), k, input_precision="ieee")
    tl.store(statistics(delta, image, head, y, x, sizes), total, mask=a < TOKENS)
    pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, QUERY, HEAD_DIM)
    store(pointers, grad_q * scale, a < TOKENS, d, HEAD_DIM)


@triton.jit
def _pairs_of(
    q, k, v, g, lse, delta, scale, pairs, image, window, a, b, flags, others, sizes, masks,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights and gradients of logits, ``[KEYS, QUERIES]``, of the queries ``a`` and the keys ``b``.

    There are no queries beyond the window: what a NaN or infinity makes of their zeros must not count.
    """
    scores = logits(
        k, q, scale, pairs, image, window, a[None, :], b[:, None], others, flags, sizes, masks,
        WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
    )  # fmt: skip
    present = (a < WINDOW_H * WINDOW_W)[None, :]
    weights = tl.where(present, tl.exp2(scores - lse[None, :]), 0.0)
    grad_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
    return weights, tl.where(present, weights * (grad_weights - delta[None, :]), 0.0)


@triton.jit(do_not_specialize=STRIDES + SIZES + COUNTS[2:])
def grad_key_value_kernel(
    grad_output, query, key, value, table, mask, logsumexp, delta, grad_qkv,
    grad_b, grad_y, grad_x, grad_h,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    vectors, KEY: tl.constexpr, VALUE: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    head = tl.program_id(0) % heads
    start = tl.program_id(0) // heads % BLOCKS * BLOCK
    window = tl.program_id(0) // heads // BLOCKS
    d = tl.arange(0, BLOCK_D)
    b = start + tl.arange(0, BLOCK)
    image, y, x, others = tokens(window, b, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
    k = load(rows(key, image, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR), b < TOKENS, d, HEAD_DIM)
    v = load(rows(value, image, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR), b < TOKENS, d, HEAD_DIM)

    grad_k = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(0, TOKENS, STEP):
        a = begin + tl.arange(0, STEP)
        _, w, u, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        query_rows = rows(query, image, head, w, u, query_b, query_y, query_x, query_h, d, VECTOR)
        grad_rows = rows(grad_output, image, head, w, u, grad_b, grad_y, grad_x, grad_h, d, VECTOR)
        q, g = load(query_rows, a < TOKENS, d, HEAD_DIM), load(grad_rows, a < TOKENS, d, HEAD_DIM)
        lse = tl.load(statistics(logsumexp, image, head, w, u, sizes), mask=a < TOKENS, other=0.0) * LOG2E
        dot = tl.load(statistics(delta, image, head, w, u, sizes), mask=a < TOKENS, other=0.0)
        first = slice_start(begin, start, WINDOW_H, WINDOW_W, BLOCK)
        pairs = bias(table, table_r, table_h, head, a[None, :], b[:, None], first, WINDOW_H, WINDOW_W, SLICE)
        weights, grad_logits = _pairs_of(
            q, k, v, g, lse, dot, scale, pairs, image, window, a, b, flags, others, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        grad_v += tl.dot(weights.to(g.dtype), g, input_precision="ieee")
        grad_k += tl.dot(grad_logits.to(q.dtype), q, input_precision="ieee")
    pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, KEY, HEAD_DIM)
    store(pointers, grad_k * scale, b < TOKENS, d, HEAD_DIM)
    pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, VALUE, HEAD_DIM)
    store(pointers, grad_v, b < TOKENS, d, HEAD_DIM)


@triton.jit(do_not_specialize=STRIDES + SIZES + COUNTS[:2])
def grad_bias_kernel(
    grad_output, query, key, value, table, mask, logsumexp, delta, partials,
    grad_b, grad_y, grad_x, grad_h,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    windows, each,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr,
    SHIFTED: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries and one of keys, in ``each`` windows."""
    TOKENS: tl.constexpr = WINDOW_H * WINDOW_W
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    chunks = tl.cdiv(windows, each)
    head = tl.program_id(0) % heads
    chunk = tl.program_id(0) // heads % chunks
    begin = tl.program_id(0) // heads // chunks // BLOCKS * STEP
    start = tl.program_id(0) // heads // chunks % BLOCKS * BLOCK
    d = tl.arange(0, BLOCK_D)
    a = begin + tl.arange(0, STEP)
    b = start + tl.arange(0, BLOCK)
    first = slice_start(begin, start, WINDOW_H, WINDOW_W, BLOCK)
    pairs = bias(table, table_r, table_h, head, a[None, :], b[:, None], first, WINDOW_H, WINDOW_W, SLICE)
    sums = tl.zeros([BLOCK, STEP], tl.float32)
    for window in range(chunk * each, tl.minimum(chunk * each + each, windows)):
        image, y, x, others = tokens(window, b, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        _, w, u, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        k = load(rows(key, image, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR), b < TOKENS, d, HEAD_DIM)
        v = load(rows(value, image, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR), b < TOKENS, d, HEAD_DIM)
        q = load(rows(query, image, head, w, u, query_b, query_y, query_x, query_h, d, VECTOR), a < TOKENS, d, HEAD_DIM)
        grad_rows = rows(grad_output, image, head, w, u, grad_b, grad_y, grad_x, grad_h, d, VECTOR)
        g = load(grad_rows, a < TOKENS, d, HEAD_DIM)
        # One load a thread and a lookup, where Triton would load what each of its pairs needs.
        lse = tl.load(statistics(logsumexp, image, head, w, u, sizes), mask=a < TOKENS, other=0.0) * LOG2E
        lse = tl.gather(lse, tl.arange(0, STEP), 0)
        dot = tl.load(statistics(delta, image, head, w, u, sizes), mask=a < TOKENS, other=0.0)
        dot = tl.gather(dot, tl.arange(0, STEP), 0)
        _, grad_logits = _pairs_of(
            q, k, v, g, lse, dot, scale, pairs, image, window, a, b, flags, others, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        sums += grad_logits
    own = partials + tl.program_id(0).to(tl.int64) * SLICE
    fold_pairs(sums, own, begin, start, first, WINDOW_H, WINDOW_W, SLICE)


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """None here: the launchers' module knows how they are launched."""
    return iter(())
