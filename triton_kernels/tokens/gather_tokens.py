"""Tokens by index on GPUs: one launch in each direction.

Forward, a program copies some rows. Backward, one owns some of the tokens that rows were taken from, finds their copies
in the image's index, and adds these up in ascending order: no atomics, and zeros are stored by the same launch.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    find,
    launch,
    plan,
    rows,
    signature_of,
)

ELEMENTS, CHANNELS = 2048, 512  # of a tile, 16 of a thread; a token of more channels has several programs

_SIZES = ["input_b", "input_n", "grad_b", "grad_n", "index_b", "index_n", "length", "count", "blocks"]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    input, index, output, input_b, input_n, index_b, index_n, length, count, blocks,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the ``count`` rows that are taken of an image, and a block of channels."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(index + image * index_b + row.to(tl.int64) * index_n, mask=row < count, other=0)
    valid = (token >= 0) & (token < length)
    inside = (c < CHANNELS)[None, :]
    source = rows(input, image, token, input_b, input_n, c, VECTOR)
    value = tl.load(source, mask=((row < count) & valid)[:, None] & inside, other=float("nan"))
    target = rows(output, image * count, row, CHANNELS, CHANNELS, c, 1)
    tl.store(target, value, mask=(row < count)[:, None] & inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_output, index, grad_input, grad_b, grad_n, index_b, index_n, length, count, blocks,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the ``length`` tokens of an image, and a block of channels."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entries = index + image * index_b + tl.arange(0, 1)
    every = tl.arange(0, 1) == 0
    inside = (c < CHANNELS)[None, :]
    wanted = token.to(tl.int64)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    row, copies = find(entries, index_n, wanted, token * 0 - 1, every, count, BLOCK_N)
    most = tl.max(tl.where(token < length, copies, 0), axis=0)
    for copy in range(most):
        mask = ((token < length) & (row < count))[:, None] & inside
        total += tl.load(rows(grad_output, image, row, grad_b, grad_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)
        if copy + 1 < most:
            row, _rest = find(entries, index_n, wanted, row, every, count, BLOCK_N)
    target = rows(grad_input, image * length, token, CHANNELS, CHANNELS, c, 1)
    tl.store(target, total.to(grad_input.dtype.element_ty), mask=(token < length)[:, None] & inside)


def gather_tokens_forward(input: Tensor, index: Tensor) -> Tensor:
    """The operator ``tersor::gather_tokens_forward`` for float16, bfloat16 and float32."""
    batch, length, channels, count = _check(input, index)
    output = input.new_empty((batch, count, channels))
    (source,), strides, vector = plan(input.element_size(), input)
    constants = _constants(channels, vector)
    blocks = triton.cdiv(count, constants["BLOCK_T"])
    grid = (batch * blocks, triton.cdiv(channels, constants["BLOCK_C"]))
    numbers = (*strides, *index.stride(), length, count, blocks)
    launch(_forward_kernel, grid, constants, OPTIONS, source, index, output, *numbers)
    return output


def gather_tokens_backward(grad_output: Tensor, index: Tensor, length: int) -> Tensor:
    """The operator ``tersor::gather_tokens_backward`` for float16, bfloat16 and float32; no atomics."""
    batch, count, channels, _ = _check(grad_output, index)
    if count != index.shape[1]:
        raise ValueError(f"gather_tokens: grad_output must have {index.shape[1]} rows, got {count}")
    grad_input = grad_output.new_empty((batch, length, channels))
    (source,), strides, vector = plan(grad_output.element_size(), grad_output)
    constants = _constants(channels, vector)
    blocks = triton.cdiv(length, constants["BLOCK_T"])
    grid = (batch * blocks, triton.cdiv(channels, constants["BLOCK_C"]))
    numbers = (*strides, *index.stride(), length, count, blocks)
    constants |= {"BLOCK_N": BLOCK_N}
    launch(_backward_kernel, grid, constants, OPTIONS, source, index, grad_input, *numbers)
    return grad_input


def _check(tensor: Tensor, index: Tensor) -> tuple[int, int, int, int]:
    if tensor.dim() != 3 or index.dim() != 2:
        raise ValueError(
            f"gather_tokens: tokens must be (B, n, C) and index (B, m), "
            f"got shapes {tuple(tensor.shape)} and {tuple(index.shape)}"
        )
    check("gather_tokens", tensor)
    check_index("gather_tokens", (tensor.shape[0], index.shape[1]), index=index)
    return (*tensor.shape, index.shape[1])


def _constants(channels: int, vector: int) -> dict[str, Any]:
    block = block_of(channels, CHANNELS)
    return {"CHANNELS": channels, "VECTOR": vector, "BLOCK_T": ELEMENTS // block, "BLOCK_C": block}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    for name in ("fp16", "fp32"):
        kinds = dict.fromkeys(("input", "output", "grad_output", "grad_input"), f"*{name}:16") | {"index": "*i64:16"}
        for kernel in (_forward_kernel, _backward_kernel):
            own = _constants(384, 16 // ITEMSIZES[name]) | ({"BLOCK_N": BLOCK_N} if kernel is _backward_kernel else {})
            yield kernel, f"{name} 384 channels", signature_of(kernel, own, kinds), own, OPTIONS
