"""Shifted-window attention on GPUs: one launch forward; backward one, and one more that adds up the bias's gradient.

A program owns some windows of one head. Tokens are found by index arithmetic, so nothing is rolled or partitioned, and
no mask is built; the bias of all pairs of a window's places stays in registers from one window to the next, while the
next one's vectors are on their way. Programs of the same windows and different heads follow each other, as their rows
share cache lines.

Bytes that must move, with u = B * H * W * heads * head_dim elements and s = B * heads * H * W float32 statistics:

=========  ======================================  ===========================  =======
launch     reads                                   writes                       moves
=========  ======================================  ===========================  =======
forward    query, key, value (3u)                  output (u), logsumexp (s)    4u + s
backward   query, key, value, grad_output (4u),    grad_qkv (3u)                7u + s
           logsumexp (s)
=========  ======================================  ===========================  =======

Both move just these, and a mask where there is one. With a bias each program of the backward writes the gradient of one
head's table and a last launch reads them: at 7 x 7 and head_dim 32 in half precision 2 KiB for the 21 KiB of a window,
shared by up to MOST windows where there are many. The backward reads a window's keys twice, from L2 the second time.

A window that does not fit a block goes through the kernels of ``_window_blocks.py``.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.attention.window_attention import (
    _check_bias,
    _check_mask,
    _reference,
    _reference_backward,
    check_window_options,
)
from tersor.triton_kernels.attention import _window_blocks
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

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 64  # tokens at most; 64 x 64 pairs are 32 registers a thread, and the backward holds four such
TILE_BYTES = 8192  # of one tensor's vectors: the backward's four, twice, and its pairs then fit 99 KiB
WIDEST = 1024  # bytes of a vector: BLOCK is 16 at least
PROGRAMS = 1056  # eight for each of 132 multiprocessors, before programs get more than one window
MOST = 16  # windows of a program

_PARTIALS, _ENTRIES = 64, 16  # of a step of the last launch: 4 KiB


@triton.jit(do_not_specialize=STRIDES[:12] + SIZES + COUNTS[:2])
def _forward_kernel(
    query, key, value, table, mask, output, logsumexp,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    windows, each,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``each`` windows of one head."""
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * each
    d = tl.arange(0, BLOCK_D)
    a = tl.arange(0, BLOCK)
    present = a < WINDOW_H * WINDOW_W
    pairs = bias(table, table_r, table_h, head, a[:, None], a[None, :], 0, WINDOW_H, WINDOW_W, SLICE)
    for window in range(first, tl.minimum(first + each, windows)):
        image, y, x, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        q = load(rows(query, image, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR), present, d, HEAD_DIM)
        k = load(rows(key, image, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR), present, d, HEAD_DIM)
        v = load(rows(value, image, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR), present, d, HEAD_DIM)
        scores = logits(
            q, k, scale, pairs, image, window, a[:, None], a[None, :], flags, flags, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        # NaN and inf need no care: any of them makes a total NaN, as it does torch's softmax.
        maximum = tl.max(scores, axis=1)
        weights = tl.exp2(scores - maximum[:, None])  # [QUERIES, KEYS]
        total = tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
        store(dense_rows(output, image, head, y, x, sizes, 0, d, (0, 0, 1), HEAD_DIM), mean, present, d, HEAD_DIM)
        lse = (maximum + tl.log2(total)) * LN2
        tl.store(statistics(logsumexp, image, head, y, x, sizes), lse, mask=present)


@triton.jit(do_not_specialize=STRIDES + SIZES + COUNTS)
def _backward_kernel(
    grad_output, query, key, value, table, mask, logsumexp, grad_qkv, partials,
    grad_b, grad_y, grad_x, grad_h,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    table_r, table_h, mask_b, mask_1, mask_2, mask_3, mask_value, height, width, heads, shift_y, shift_x, scale,
    windows, each, vectors,
    QUERY: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, VECTOR: tl.constexpr, SHIFTED: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """``each`` windows of one head, their pairs as ``[KEYS, QUERIES]``.

    That way the gradients of key and value are products of the pairs as they are, and the query's, transposed, is one
    whose right side they are. Triton has compiled products of transposed pairs wrongly for sm_90 (its issue 6124, and
    640 and 984 of flash-linear-attention), hence none here.
    """
    sizes = (height, width, heads)
    shift = (shift_y, shift_x)
    masks = (mask, mask_b, mask_1, mask_2, mask_3, mask_value)
    scale = tl.cast(scale, tl.float32)
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * each
    d = tl.arange(0, BLOCK_D)
    a = tl.arange(0, BLOCK)
    present = a < WINDOW_H * WINDOW_W
    pairs = bias(table, table_r, table_h, head, a[None, :], a[:, None], 0, WINDOW_H, WINDOW_W, SLICE)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window in range(first, tl.minimum(first + each, windows)):
        image, y, x, flags = tokens(window, a, sizes, shift, masks, WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE)
        q = load(rows(query, image, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR), present, d, HEAD_DIM)
        k = load(rows(key, image, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR), present, d, HEAD_DIM)
        v = load(rows(value, image, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR), present, d, HEAD_DIM)
        g = load(rows(grad_output, image, head, y, x, grad_b, grad_y, grad_x, grad_h, d, VECTOR), present, d, HEAD_DIM)
        lse = tl.load(statistics(logsumexp, image, head, y, x, sizes), mask=present, other=0.0) * LOG2E
        scores = logits(
            k, q, scale, pairs, image, window, a[None, :], a[:, None], flags, flags, sizes, masks,
            WINDOW_H, WINDOW_W, SHIFTED, MASK, WIDE,
        )  # fmt: skip
        # There are no queries beyond the window: what a NaN or infinity makes of their zeros must not count.
        weights = tl.where(present[None, :], tl.exp2(scores - lse[None, :]), 0.0)
        grad_v = tl.dot(weights.to(g.dtype), g, input_precision="ieee")
        pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, VALUE, HEAD_DIM)
        store(pointers, grad_v, present, d, HEAD_DIM)
        grad_weights = tl.dot(v, tl.trans(g), input_precision="ieee")
        delta = tl.sum(weights * grad_weights, axis=0)
        grad_logits = tl.where(present[None, :], weights * (grad_weights - delta[None, :]), 0.0)
        if partials is not None:
            sums += grad_logits
        rounded = grad_logits.to(q.dtype)
        grad_k = tl.dot(rounded, q, input_precision="ieee") * scale
        pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, KEY, HEAD_DIM)
        store(pointers, grad_k, present, d, HEAD_DIM)
        if q.dtype == tl.float32:
            k = tl.trans(k)
        else:  # read again from L2, as ``k`` would be 32 registers throughout the loop
            across = rows(key, image, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR)
            k = tl.load(tl.trans(across), mask=(d < HEAD_DIM)[:, None] & present[None, :], other=0.0)
        grad_q = tl.dot(k, rounded, input_precision="ieee") * scale  # [BLOCK_D, QUERIES]
        pointers = dense_rows(grad_qkv, image, head, y, x, sizes, vectors, d, QUERY, HEAD_DIM)
        store(pointers, tl.trans(grad_q), present, d, HEAD_DIM)
    if partials is not None:
        own = partials + tl.program_id(0).to(tl.int64) * SLICE
        fold_pairs(sums, own, 0, 0, 0, WINDOW_H, WINDOW_W, SLICE)


@triton.jit(do_not_specialize=["chunks", "heads"])
def _fold_kernel(
    partials, grad_table, chunks, heads,
    WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, SLICE: tl.constexpr,
    PARTIALS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES rows of the table for one head; all STEP queries met all BLOCK keys in ``chunks`` programs each."""
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    BLOCKS: tl.constexpr = (WINDOW_H * WINDOW_W + BLOCK - 1) // BLOCK
    PAIRS: tl.constexpr = BLOCKS * ((WINDOW_H * WINDOW_W + STEP - 1) // STEP)
    head = tl.program_id(0) % heads
    r = tl.program_id(0) // heads * ENTRIES + tl.arange(0, ENTRIES)
    total = tl.zeros([PARTIALS, ENTRIES], tl.float32)
    for begin in range(0, PAIRS * chunks, PARTIALS):
        part = begin + tl.arange(0, PARTIALS)
        if PAIRS == 1:
            entry = tl.zeros([PARTIALS, 1], tl.int32) + r[None, :]
        else:
            pair = part // chunks
            start = slice_start(pair // BLOCKS * STEP, pair % BLOCKS * BLOCK, WINDOW_H, WINDOW_W, BLOCK)
            entry = r[None, :] - start[:, None]
        own = partials + ((part.to(tl.int64) * heads + head) * SLICE)[:, None]
        there = (part < PAIRS * chunks)[:, None] & (entry >= 0) & (entry < SLICE)
        total += tl.load(own + entry, mask=there, other=0.0)
    place = grad_table + r.to(tl.int64) * heads + head
    tl.store(place, tl.sum(total, axis=0).to(grad_table.dtype.element_ty), mask=r < TABLE)


def window_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    mask: Tensor | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    mask_value: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::window_attention_forward`` for float16, bfloat16 and float32."""
    options = (window_size, shift, mask_value, scale)
    _check(query, position_bias, mask, window_size, shift, key=key, value=value)
    if _vector_bytes(query) > WIDEST:
        return _reference(query, key, value, position_bias, mask, *options)
    batch, height, width, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty((batch, heads, height, width), dtype=torch.float32, device=query.device)
    windows, numbers, constants, inputs, others = _plan((query, key, value), position_bias, mask, *options)
    arguments = (*inputs, *others, output, logsumexp, *numbers)
    blocks, _ = _blocks(constants)
    if blocks > 1:
        _launch(_window_blocks.forward_kernel, windows * blocks * heads, constants, *arguments)
    else:
        each, chunks = _share(windows, heads)
        _launch(_forward_kernel, chunks * heads, constants, *arguments, windows, each)
    return output, logsumexp


def window_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    mask: Tensor | None,
    logsumexp: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int],
    mask_value: float,
    scale: float,
    packs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::window_attention_backward`` for float16, bfloat16 and float32; no atomics."""
    options = (window_size, shift, mask_value, scale)
    _check(query, position_bias, mask, window_size, shift, key=key, value=value, grad_output=grad_output)
    batch, height, width, heads, _ = query.shape
    if logsumexp.shape != (batch, heads, height, width) or logsumexp.dtype != torch.float32:
        raise ValueError(
            f"window_attention: logsumexp must be float32 of shape {(batch, heads, height, width)}, "
            f"got {logsumexp.dtype} of shape {tuple(logsumexp.shape)}"
        )
    if sum(packs) != 3 or min(packs) < 1:
        raise ValueError(f"window_attention: packs must be counts that add up to 3, got {[*packs]}")
    if _vector_bytes(query) > WIDEST:
        return _reference_backward(grad_output, query, key, value, position_bias, mask, logsumexp, *options, packs)
    flat = torch.empty(3 * query.numel(), dtype=query.dtype, device=query.device)
    table = (
        query.new_empty(0)
        if position_bias is None
        else torch.empty_like(position_bias, memory_format=torch.contiguous_format)
    )
    windows, numbers, constants, inputs, others = _plan((grad_output, query, key, value), position_bias, mask, *options)
    if not windows:
        return flat, table.zero_()
    constants |= _places(packs)
    vectors = batch * height * width * heads
    logsumexp = logsumexp.contiguous()  # as the forward made it: no copy
    blocks, steps = _blocks(constants)
    each, chunks = _share(windows, heads * blocks * steps)
    partials = None
    if position_bias is not None:
        shape = (blocks * steps, chunks, heads, constants["SLICE"])
        partials = torch.empty(shape, dtype=torch.float32, device=query.device)
    sources = (*inputs, *others, logsumexp)
    if blocks > 1:
        delta = torch.empty_like(logsumexp)
        programs = windows * blocks * heads
        common = (*sources, delta, flat, *numbers)
        _launch(_window_blocks.grad_query_kernel, programs, constants, *common, vectors)
        _launch(_window_blocks.grad_key_value_kernel, programs, constants, *common, vectors)
        if partials is not None:
            programs = blocks * steps * chunks * heads
            arguments = (*sources, delta, partials, *numbers, windows, each)
            _launch(_window_blocks.grad_bias_kernel, programs, constants, *arguments)
    else:
        arguments = (*sources, flat, partials, *numbers, windows, each, vectors)
        _launch(_backward_kernel, chunks * heads, constants, *arguments)
    if partials is not None:
        programs = triton.cdiv(len(table), _ENTRIES) * heads
        folding = {name: constants[name] for name in ("WINDOW_H", "WINDOW_W", "BLOCK", "STEP", "SLICE")}
        folding |= {"PARTIALS": _PARTIALS, "ENTRIES": _ENTRIES}
        _launch(_fold_kernel, programs, folding, partials, table, chunks, heads)
    return flat, table


def _check(
    query: Tensor,
    position_bias: Tensor | None,
    mask: Tensor | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    **tensors: Tensor,
) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    name = "window_attention"
    if query.dtype not in DTYPES:
        raise TypeError(f"{name}: the Triton kernels take float16, bfloat16 and float32, got {query.dtype}")
    for argument, tensor in tensors.items():
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name}: {argument} must be {query.dtype} of shape {tuple(query.shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    if query.dim() != 5:
        raise ValueError(f"{name}: query must be (B, H, W, heads, head_dim), got shape {tuple(query.shape)}")
    window, _ = check_window_options(name, query.shape, window_size, shift)
    if position_bias is not None:
        _check_bias(name, position_bias, query.shape[3], query.device, window)
    if mask is not None:
        _check_mask(name, mask, query.shape, query.device, window)


def _vector_bytes(query: Tensor) -> int:
    return max(triton.next_power_of_2(query.shape[-1]), 16) * query.element_size()


def _constants(window: Sequence[int], head_dim: int, itemsize: int) -> dict[str, Any]:
    """The constants that sizes decide: the one place where blocks are chosen."""
    block_d = max(triton.next_power_of_2(head_dim), 16)
    height, width = window
    block = min(max(TILE_BYTES // (block_d * itemsize), 16), BLOCK, max(triton.next_power_of_2(height * width), 16))
    step = block if height * width <= block else max(block // 2, 16)  # of the loops over a window's other blocks
    spans = [min(height, (n + width - 2) // width + 1) for n in (block, step)]  # in rows of the window
    return {
        "WINDOW_H": height,
        "WINDOW_W": width,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK": block,
        "STEP": step,
        # Rows of the table that a block of queries and one of keys can meet; a power of two, and whole vectors.
        "SLICE": max(triton.next_power_of_2((sum(spans) - 1) * (2 * width - 1)), _ENTRIES),
    }


def _blocks(constants: dict[str, Any]) -> tuple[int, int]:
    """How many blocks and steps a window has."""
    count = constants["WINDOW_H"] * constants["WINDOW_W"]
    return triton.cdiv(count, constants["BLOCK"]), triton.cdiv(count, constants["STEP"])


def _options(kernel: Any, block: int, itemsize: int) -> dict[str, Any]:
    """Fused multiply-add is asked for by name, since Triton 3.10 turns its default off.

    A second stage, where the next window's vectors come while this one's are worked on, spills the float32 backward.
    """
    stages = 1 if itemsize == 4 and kernel is _backward_kernel else 2
    return {"num_warps": block // (16 if itemsize == 2 else 8), "num_stages": stages, "enable_fp_fusion": True}


def _share(windows: int, groups: int) -> tuple[int, int]:
    """Windows of each program, and how many programs those take; by sizes alone, so that sums are the same anywhere."""
    each = min(max(windows * groups // PROGRAMS, 1), MOST)
    return each, triton.cdiv(windows, each)


def _places(packs: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """Where the gradients of query, key and value lie: how many tensors before them, which part, of how many."""
    places, taken = [], 0
    for count in packs:
        places += [(taken, part, count) for part in range(count)]
        taken += count
    return dict(zip(("QUERY", "KEY", "VALUE"), places, strict=True))


def _plan(
    tensors: Sequence[Tensor],
    position_bias: Tensor | None,
    mask: Tensor | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    mask_value: float,
    scale: float,
) -> tuple[int, list[Any], dict[str, Any], list[Tensor], tuple[Tensor | None, Tensor | None]]:
    """How many windows, the kernels' numbers and constants; the tensors with their vectors in one piece; bias and mask.

    The strides count VECTOR elements each.
    """
    batch, height, width, heads, head_dim = tensors[0].shape
    itemsize = tensors[0].element_size()
    inputs = [t if t.stride(-1) == 1 or head_dim == 1 else t.contiguous() for t in tensors]
    strides = [0 if n == 1 else s for t in inputs for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    vector = math.gcd(16 // itemsize, *strides)  # 16 bytes are the widest load
    masked = [0, 0, 0, 1]
    if mask is not None:
        masked = [0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)]
        masked += [1] * (4 - mask.dim())
        mask = mask.view(torch.uint8)
    # The last place in an image, or a window's mask; where these fit 32 bits, so do all offsets within one.
    spans = [3 * heads * head_dim * height * width]
    spans += [(height - 1) * y + (width - 1) * x for y, x in zip(strides[1::4], strides[2::4], strict=True)]
    if mask is not None:
        inner = (1, 2) if mask.dim() == 3 else (2, 3)
        spans.append(sum((mask.shape[i] - 1) * masked[i] for i in inner))
    constants = _constants(window_size, head_dim, itemsize) | {
        "VECTOR": vector,
        "SHIFTED": any(shift),
        "MASK": "none" if mask is None else "tokens" if mask.dim() == 3 else "pairs",
        "WIDE": max(spans) >= 2**31,
    }
    windows = batch * (height // window_size[0]) * (width // window_size[1])
    numbers: list[float] = [s // vector for s in strides]
    numbers += [0, 0] if position_bias is None else position_bias.stride()
    numbers += [*masked, mask_value, height, width, heads, *shift, scale]
    return windows, numbers, constants, inputs, (position_bias, mask)


def _launch(kernel: Any, programs: int, constants: dict[str, Any], *arguments: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            own = {name: n for name, n in constants.items() if name in kernel.arg_names}
            kernel[(programs,)](*arguments, **own, **_options(kernel, constants["BLOCK"], arguments[0].element_size()))


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What the ahead-of-time test compiles: kernel, label, signature, constants and options, as a launch chooses them.

    The signature is in the notation of Triton's own compiler driver: ``"*fp16:16"`` is a pointer to 16 aligned bytes.
    """
    itemsizes = {"fp16": 2, "bf16": 2, "fp32": 4}
    kinds = dict.fromkeys(("table", "logsumexp", "delta", "partials", "grad_table"), "*fp32:16")
    kinds |= {"mask": "*u8:16", "mask_value": "fp32", "scale": "fp32"}
    data = ("query", "key", "value", "grad_output", "output", "grad_qkv")
    blocks = _window_blocks
    parts = (blocks.forward_kernel, blocks.grad_query_kernel, blocks.grad_key_value_kernel, blocks.grad_bias_kernel)
    for name, window, head_dim, masked in (
        ("fp16", (7, 7), 24, "none"),
        ("fp16", (8, 8), 32, "tokens"),
        ("bf16", (7, 7), 32, "none"),
        ("fp32", (7, 7), 32, "none"),
        ("bf16", (14, 14), 32, "none"),
        ("fp32", (14, 14), 32, "none"),
    ):
        itemsize = itemsizes[name]
        constants = _constants(window, head_dim, itemsize) | _places([3])
        constants |= {"VECTOR": 16 // itemsize, "SHIFTED": True, "MASK": masked, "WIDE": False}
        constants |= {"mask": None} if masked == "none" else {}
        types = kinds | dict.fromkeys(data, f"*{name}:16")
        for kernel in parts if _blocks(constants)[0] > 1 else (_forward_kernel, _backward_kernel):
            signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
            own = {a: constants[a] for a in kernel.arg_names if a in constants}
            label = f"{name} {window[0]}x{window[1]} head_dim {head_dim}"
            yield kernel, label, signature, own, _options(kernel, constants["BLOCK"], itemsize)
    own = {name: n for name, n in _constants((7, 7), 32, 2).items() if name in _fold_kernel.arg_names}
    own |= {"PARTIALS": _PARTIALS, "ENTRIES": _ENTRIES}
    signature = {a: kinds.get(a, "i32") for a in _fold_kernel.arg_names if a not in own}
    yield _fold_kernel, "7x7", signature, own, _options(_fold_kernel, own["BLOCK"], 2)
