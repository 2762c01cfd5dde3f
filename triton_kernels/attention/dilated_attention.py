"""Dilated attention on GPUs: one launch forward, two backward (in gather form), each for all heads and dilations.

A program owns a tile of neighbouring positions of one head and walks over the window's taps; the neighbours' rows
come from L1 and L2. Programs of the same tile and different heads follow each other, as their rows share cache lines.

Bytes that must move, with u = B * H * W * heads * head_dim elements and s = B * heads * H * W float32 statistics:

=========  ============================================  ==============================================  ========
launch     reads                                         writes                                          moves
=========  ============================================  ==============================================  ========
forward    query, key, value (3u)                        output (u), logsumexp (s)                       4u + s
backward   query, key, value, grad_output, output (5u),  grad_qkv (3u)                                   8u + s
           logsumexp (s)
=========  ============================================  ==============================================  ========

The forward moves just these. The backward is two launches, since the gradients of key and value need the statistic
<grad_output, output> of their neighbours: 12u + 4s, of which the second reading of query, key, value and grad_output
is 4u. The neighbours' tiles (a halo of dilation * (kernel_size - 1) / 2) are read again, from L2 as a rule.
"""

# A jitted function annotates its constants only, and a tuple grows in it.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of one tensor in a tile: two 16-byte loads per thread, 8 x 16 positions at head_dim 24 in float16. The three
# kernels then take 120, 104 and 128 registers on sm_90; with twice as much, float32 spills.
TILE_BYTES = 8192
# Fused multiply-add is asked for by name, since Triton 3.10 turns its default off.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Sizes and strides are never specialised, so that other image sizes do not compile anew; what the loads must know of
# the strides' alignment is VECTOR.
_SIZES = ["height", "width", "heads"]
_STRIDES = [f"{tensor}_{axis}" for tensor in ("query", "key", "value", "grad") for axis in "byxh"]

_LOG2E = tl.constexpr(math.log2(math.e))  # exp2 and log2 are single instructions
_LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _tile(
    height, width, heads, DILATION: tl.constexpr, GROUPS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Image, head, dilation and positions of this program. Divisions are 32-bit: the GPU has none for 64 bits."""
    program = tl.program_id(0)
    tiles_x = (width + TILE_W - 1) // TILE_W
    tiles_y = (height + TILE_H - 1) // TILE_H
    head = program % heads
    tile = program // heads
    position = tl.arange(0, TILE_H * TILE_W)
    x = tile % tiles_x * TILE_W + position % TILE_W
    y = tile // tiles_x % tiles_y * TILE_H + position // TILE_W
    batch = tile // tiles_x // tiles_y
    dilation = tl.full([], DILATION[0], tl.int32)
    for group in tl.static_range(1, GROUPS):
        dilation = tl.where(head * GROUPS >= group * heads, DILATION[group], dilation)
    return batch.to(tl.int64), head.to(tl.int64), y, x, dilation


@triton.jit
def _rows(base, batch, head, y, x, stride_b, stride_y, stride_x, stride_h, d, VECTOR: tl.constexpr):
    """Pointers to the vectors of the positions, ``[POSITIONS, BLOCK_D]``; the strides count VECTOR elements each."""
    first = batch * stride_b + head * stride_h + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    return base + (first * VECTOR)[:, None] + d[None, :]


@triton.jit
def _step(dy, dx, stride_y, stride_x, VECTOR: tl.constexpr):
    """Elements from a position to its tap."""
    return (dy.to(tl.int64) * stride_y + dx.to(tl.int64) * stride_x) * VECTOR


@triton.jit
def _load(pointers, present, d, HEAD_DIM: tl.constexpr):
    """float32 vectors; zeros where the position is outside the image."""
    return tl.load(pointers, mask=present[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, vectors, present, d, HEAD_DIM: tl.constexpr):
    tl.store(pointers, vectors.to(pointers.dtype.element_ty), mask=present[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _inside(y, x, height, width):
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit(do_not_specialize=_SIZES + _STRIDES[:12])
def _forward_kernel(
    query, key, value, output, logsumexp,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    height, width, heads, scale,
    KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    batch, head, y, x, dilation = _tile(height, width, heads, DILATION, GROUPS, TILE_H, TILE_W)
    d = tl.arange(0, BLOCK_D)
    present = (y < height) & (x < width)
    query_rows = _rows(query, batch, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR)
    key_rows = _rows(key, batch, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR)
    value_rows = _rows(value, batch, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR)
    q = _load(query_rows, present, d, HEAD_DIM) * (tl.cast(scale, tl.float32) * _LOG2E)  # [POSITIONS, BLOCK_D]

    maximum = tl.full([TILE_H * TILE_W], float("-inf"), tl.float32)
    total = tl.zeros([TILE_H * TILE_W], tl.float32)
    mean = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    corner = dilation * (KERNEL_SIZE - 1) // 2
    # One rescaling of the running mean per run of taps: a row, or one tap where a row would not fit in registers.
    RUN: tl.constexpr = KERNEL_SIZE if KERNEL_SIZE <= 7 else 1
    UNROLL: tl.constexpr = KERNEL_SIZE if KERNEL_SIZE <= 3 else 1
    for run in tl.range(KERNEL_SIZE * KERNEL_SIZE // RUN, loop_unroll_factor=UNROLL):
        dy = run * RUN // KERNEL_SIZE * dilation - corner
        left = run * RUN % KERNEL_SIZE * dilation - corner
        scores = ()
        largest = maximum
        for tap in tl.static_range(RUN):
            dx = left + tap * dilation
            # A tap outside the image has a zero key, hence score 0, and takes part.
            k = _load(
                key_rows + _step(dy, dx, key_y, key_x, VECTOR), _inside(y + dy, x + dx, height, width), d, HEAD_DIM
            )
            score = tl.sum(q * k, axis=1)
            largest = tl.maximum(largest, score, propagate_nan=tl.PropagateNan.ALL)
            scores = scores + (score,)  # noqa: RUF005 (no unpacking in Triton)
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN
        shrink = tl.exp2(maximum - shift)
        maximum = largest
        total *= shrink
        mean *= shrink[:, None]
        for tap in tl.static_range(RUN):
            dx = left + tap * dilation
            v = _load(
                value_rows + _step(dy, dx, value_y, value_x, VECTOR),
                _inside(y + dy, x + dx, height, width),
                d,
                HEAD_DIM,
            )
            weight = tl.exp2(scores[tap] - shift)
            total += weight
            mean += weight[:, None] * v
    mean *= (1.0 / total)[:, None]
    lse = (maximum + tl.log2(total)) * _LN2

    place = (batch * height + y) * width + x
    rows = output + (place * heads + head)[:, None] * HEAD_DIM + d[None, :]
    _store(rows, mean, present, d, HEAD_DIM)
    tl.store(logsumexp + ((batch * heads + head) * height + y) * width + x, lse, mask=present)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _grad_query_kernel(
    grad_output, query, key, value, output, logsumexp, grad_dot_output, grad_qkv,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    grad_b, grad_y, grad_x, grad_h,
    height, width, heads, scale,
    KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The query's gradient from its own taps, and <grad_output, output> on the way."""
    batch, head, y, x, dilation = _tile(height, width, heads, DILATION, GROUPS, TILE_H, TILE_W)
    d = tl.arange(0, BLOCK_D)
    present = (y < height) & (x < width)
    place = (batch * height + y) * width + x
    statistic = ((batch * heads + head) * height + y) * width + x
    query_rows = _rows(query, batch, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR)
    key_rows = _rows(key, batch, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR)
    value_rows = _rows(value, batch, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR)
    grad_rows = _rows(grad_output, batch, head, y, x, grad_b, grad_y, grad_x, grad_h, d, VECTOR)
    output_rows = output + (place * heads + head)[:, None] * HEAD_DIM + d[None, :]
    scale = tl.cast(scale, tl.float32)
    q = _load(query_rows, present, d, HEAD_DIM) * (scale * _LOG2E)  # [POSITIONS, BLOCK_D]
    g = _load(grad_rows, present, d, HEAD_DIM)
    lse = tl.load(logsumexp + statistic, mask=present, other=0.0) * _LOG2E
    dot = tl.sum(g * _load(output_rows, present, d, HEAD_DIM), axis=1)
    tl.store(grad_dot_output + statistic, dot, mask=present)

    grad_q = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    corner = dilation * (KERNEL_SIZE - 1) // 2
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        dy = tap // KERNEL_SIZE * dilation - corner
        dx = tap % KERNEL_SIZE * dilation - corner
        inside = _inside(y + dy, x + dx, height, width)
        k = _load(key_rows + _step(dy, dx, key_y, key_x, VECTOR), inside, d, HEAD_DIM)
        v = _load(value_rows + _step(dy, dx, value_y, value_x, VECTOR), inside, d, HEAD_DIM)
        weight = tl.exp2(tl.sum(q * k, axis=1) - lse)
        grad_score = weight * (tl.sum(g * v, axis=1) - dot)
        grad_q += grad_score[:, None] * k
    rows = grad_qkv + (place * 3 * heads + head)[:, None] * HEAD_DIM + d[None, :]
    _store(rows, grad_q * scale, present, d, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _grad_key_value_kernel(
    grad_output, query, key, value, logsumexp, grad_dot_output, grad_qkv,
    query_b, query_y, query_x, query_h,
    key_b, key_y, key_x, key_h,
    value_b, value_y, value_x, value_h,
    grad_b, grad_y, grad_x, grad_h,
    height, width, heads, scale,
    KERNEL_SIZE: tl.constexpr, DILATION: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The gradients of a key and a value from the queries that they are taps of: the same offsets, mirrored."""
    batch, head, y, x, dilation = _tile(height, width, heads, DILATION, GROUPS, TILE_H, TILE_W)
    d = tl.arange(0, BLOCK_D)
    present = (y < height) & (x < width)
    statistic = ((batch * heads + head) * height + y) * width + x
    query_rows = _rows(query, batch, head, y, x, query_b, query_y, query_x, query_h, d, VECTOR)
    key_rows = _rows(key, batch, head, y, x, key_b, key_y, key_x, key_h, d, VECTOR)
    value_rows = _rows(value, batch, head, y, x, value_b, value_y, value_x, value_h, d, VECTOR)
    grad_rows = _rows(grad_output, batch, head, y, x, grad_b, grad_y, grad_x, grad_h, d, VECTOR)
    scale = tl.cast(scale, tl.float32)
    k = _load(key_rows, present, d, HEAD_DIM) * (scale * _LOG2E)  # [POSITIONS, BLOCK_D]
    v = _load(value_rows, present, d, HEAD_DIM)

    grad_k = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    grad_v = tl.zeros([TILE_H * TILE_W, BLOCK_D], tl.float32)
    corner = dilation * (KERNEL_SIZE - 1) // 2
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        dy = tap // KERNEL_SIZE * dilation - corner
        dx = tap % KERNEL_SIZE * dilation - corner
        inside = _inside(y + dy, x + dx, height, width)
        q = _load(query_rows + _step(dy, dx, query_y, query_x, VECTOR), inside, d, HEAD_DIM)
        g = _load(grad_rows + _step(dy, dx, grad_y, grad_x, VECTOR), inside, d, HEAD_DIM)
        neighbour = statistic + dy.to(tl.int64) * width + dx
        lse = tl.load(logsumexp + neighbour, mask=inside, other=0.0) * _LOG2E
        dot = tl.load(grad_dot_output + neighbour, mask=inside, other=0.0)
        # There is no query outside the image: what a NaN or infinity of this key makes of its zeros must not count.
        weight = tl.where(inside, tl.exp2(tl.sum(q * k, axis=1) - lse), 0.0)
        grad_score = tl.where(inside, weight * (tl.sum(g * v, axis=1) - dot), 0.0)
        grad_v += weight[:, None] * g
        grad_k += grad_score[:, None] * q
    rows = grad_qkv + (((batch * height + y) * width + x) * 3 * heads + head)[:, None] * HEAD_DIM + d[None, :]
    part = heads.to(tl.int64) * HEAD_DIM
    _store(rows + part, grad_k * scale, present, d, HEAD_DIM)
    _store(rows + 2 * part, grad_v, present, d, HEAD_DIM)


def dilated_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::dilated_attention_forward`` for float16, bfloat16 and float32."""
    _check(query.dtype, query.shape, key=key, value=value)
    batch, height, width, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    logsumexp = torch.empty((batch, heads, height, width), dtype=torch.float32, device=query.device)
    inputs, strides, vector = _strided(query, key, value)
    _launch(_forward_kernel, query, kernel_size, dilation, scale, vector, *inputs, output, logsumexp, *strides)
    return output, logsumexp


def dilated_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    kernel_size: int,
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    """The operator ``tersor::dilated_attention_backward`` for float16, bfloat16 and float32; no atomics."""
    _check(query.dtype, query.shape, key=key, value=value, grad_output=grad_output, output=output)
    batch, height, width, heads, head_dim = query.shape
    _check(torch.float32, (batch, heads, height, width), logsumexp=logsumexp)
    grad_qkv = torch.empty((batch, height, width, 3, heads, head_dim), dtype=query.dtype, device=query.device)
    (query, key, value, grad_output), strides, vector = _strided(query, key, value, grad_output)
    output, logsumexp = output.contiguous(), logsumexp.contiguous()  # as the forward made them: no copy
    dot = torch.empty_like(logsumexp)
    options = (query, kernel_size, dilation, scale, vector)
    inputs = (grad_output, query, key, value)
    _launch(_grad_query_kernel, *options, *inputs, output, logsumexp, dot, grad_qkv, *strides)
    _launch(_grad_key_value_kernel, *options, *inputs, logsumexp, dot, grad_qkv, *strides)
    return grad_qkv


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What the ahead-of-time test compiles: kernel, label, signature, constants and options, as a launch chooses them.

    The signature is in the notation of Triton's own compiler driver: ``"*fp16:16"`` is a pointer to 16 aligned bytes.
    """
    for head_dim in (24, 32):
        for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
            types = dict.fromkeys(("query", "key", "value", "grad_output", "output", "grad_qkv"), f"*{name}:16")
            types |= {"logsumexp": "*fp32:16", "grad_dot_output": "*fp32:16", "scale": "fp32"}
            constants = _constants(3, (1, 2, 3), head_dim, itemsize, 16 // itemsize)
            for kernel in (_forward_kernel, _grad_query_kernel, _grad_key_value_kernel):
                signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
                yield kernel, f"{name} head_dim {head_dim}", signature, constants, OPTIONS


def _check(dtype: torch.dtype, shape: Sequence[int], **tensors: Tensor) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    if dtype not in DTYPES:
        raise TypeError(f"dilated_attention: the Triton kernels take float16, bfloat16 and float32, got {dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"dilated_attention: {name} must be {dtype} of shape {tuple(shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def _constants(kernel_size: int, dilation: Sequence[int], head_dim: int, itemsize: int, vector: int) -> dict[str, Any]:
    """The kernels' constants: the one place where tiles are chosen."""
    block_d = triton.next_power_of_2(head_dim)
    positions = min(max(TILE_BYTES // itemsize // block_d, 8), 256)
    tile_h = 1 << (positions.bit_length() - 1) // 2  # square, or twice as wide as high
    return {
        "KERNEL_SIZE": kernel_size,
        "DILATION": tuple(dilation),
        "GROUPS": len(dilation),
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "TILE_H": tile_h,
        "TILE_W": positions // tile_h,
        "VECTOR": vector,
    }


def _strided(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """The tensors with their vectors in one piece, their other strides in units of VECTOR elements, and VECTOR."""
    inputs = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]
    strides = [0 if n == 1 else s for t in inputs for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    vector = math.gcd(16 // inputs[0].element_size(), *strides)  # 16 bytes are the widest load
    return inputs, [s // vector for s in strides], vector


def _launch(
    kernel: Any, query: Tensor, kernel_size: int, dilation: Sequence[int], scale: float, vector: int, *arguments: Any
) -> None:
    """Launches the kernel over all tiles of all heads, with the sizes as its last arguments; none, no launch."""
    batch, height, width, heads, head_dim = query.shape
    # A larger dilation leaves the image at every tap but the centre, as this one does, and could overflow 32 bits.
    dilation = [min(d, 2 * max(height, width)) for d in dilation]
    constants = _constants(kernel_size, dilation, head_dim, query.element_size(), vector)
    tiles = triton.cdiv(height, constants["TILE_H"]) * triton.cdiv(width, constants["TILE_W"])
    if programs := batch * tiles * heads:
        with torch.cuda.device_of(query):
            kernel[(programs,)](*arguments, height, width, heads, scale, **constants, **OPTIONS)
