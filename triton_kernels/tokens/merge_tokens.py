"""Tokens merged into their weighted mean on GPUs: one launch in each direction.

Forward, a program owns some places, finds the tokens that go there in the image's index, adds up their sizes and then
their rows in ascending order: no atomics. Backward, one owns some tokens and reads the row of each one's place.
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

# Of float32 rows the compiler would rather spill 8 bytes than take more than 64 registers.
FORWARD = OPTIONS | {"maxnreg": 96}

_STRIDES = ["input_b", "input_n", "grad_b", "grad_n", "index_b", "index_n", "sizes_b", "sizes_n"]
_SIZES = ["totals_b", "totals_n", "length", "places", "blocks"]


@triton.jit
def _size(sizes, image, token, sizes_b, sizes_n, present):
    """What tokens weigh: 0 where there is none."""
    if sizes is None:
        size = present.to(tl.float32)
    else:
        size = tl.load(sizes + image * sizes_b + token.to(tl.int64) * sizes_n, mask=present, other=0.0)
    return size


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _forward_kernel(
    input, index, sizes, output, output_sizes,
    input_b, input_n, index_b, index_n, sizes_b, sizes_n, length, places, blocks,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the places of an image, and a block of channels."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    entries = index + image * index_b + tl.arange(0, 1)
    every = tl.arange(0, 1) == 0
    inside = (c < CHANNELS)[None, :]
    wanted = place.to(tl.int64)
    first, members = find(entries, index_n, wanted, place * 0 - 1, every, length, BLOCK_N)
    most = tl.max(tl.where(place < places, members, 0), axis=0)

    token = first
    total = _size(sizes, image, token, sizes_b, sizes_n, token < length)
    for _ in range(1, most):
        token, _rest = find(entries, index_n, wanted, token, every, length, BLOCK_N)
        total += _size(sizes, image, token, sizes_b, sizes_n, token < length)
    if tl.program_id(1) == 0:
        tl.store(output_sizes + image * places + place, total, mask=place < places)

    token = first
    mean = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for member in range(most):
        mask = ((place < places) & (token < length))[:, None] & inside
        share = tl.div_rn(_size(sizes, image, token, sizes_b, sizes_n, token < length), total)
        value = tl.load(rows(input, image, token, input_b, input_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)
        mean += tl.where(mask, share[:, None] * value, 0.0)
        if member + 1 < most:
            token, _rest = find(entries, index_n, wanted, token, every, length, BLOCK_N)
    target = rows(output, image * places, place, CHANNELS, CHANNELS, c, 1)
    tl.store(target, mean.to(output.dtype.element_ty), mask=(place < places)[:, None] & inside)


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _backward_kernel(
    grad_output, index, sizes, totals, grad_input,
    grad_b, grad_n, index_b, index_n, sizes_b, sizes_n, totals_b, totals_n, length, places, blocks,
    CHANNELS: tl.constexpr, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of the tokens of an image, and a block of channels; ``totals`` are the places' sizes."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c < CHANNELS)[None, :]
    place = tl.load(index + image * index_b + token.to(tl.int64) * index_n, mask=token < length, other=-1)
    valid = (place >= 0) & (place < places)
    total = tl.load(totals + image * totals_b + place * totals_n, mask=valid, other=1.0)
    share = tl.div_rn(_size(sizes, image, token, sizes_b, sizes_n, token < length), total)
    mask = valid[:, None] & inside
    grad = tl.load(rows(grad_output, image, place, grad_b, grad_n, c, VECTOR), mask=mask, other=0.0).to(tl.float32)
    grad = tl.where(mask, share[:, None] * grad, 0.0)
    target = rows(grad_input, image * length, token, CHANNELS, CHANNELS, c, 1)
    tl.store(target, grad.to(grad_input.dtype.element_ty), mask=(token < length)[:, None] & inside)


def merge_tokens_forward(input: Tensor, index: Tensor, sizes: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::merge_tokens_forward`` for float16, bfloat16 and float32; no atomics."""
    batch, tokens, channels = _check(input, index, sizes)
    if index.shape[1] != tokens or length < 0:
        raise ValueError(f"merge_tokens: index must have {tokens} columns, got {index.shape[1]}, for {length} places")
    output = input.new_empty((batch, length, channels))
    output_sizes = torch.empty((batch, length), dtype=torch.float32, device=input.device)
    (source,), strides, vector = plan(input.element_size(), input)
    constants = _constants(channels, vector) | {"BLOCK_N": BLOCK_N}
    blocks = triton.cdiv(length, constants["BLOCK_T"])
    grid = (batch * blocks, max(1, triton.cdiv(channels, constants["BLOCK_C"])))  # sizes there are in any case
    numbers = (*strides, *index.stride(), *_strides(sizes), tokens, length, blocks)
    launch(_forward_kernel, grid, constants, FORWARD, source, index, sizes, output, output_sizes, *numbers)
    return output, output_sizes


def merge_tokens_backward(grad_output: Tensor, index: Tensor, sizes: Tensor | None, output_sizes: Tensor) -> Tensor:
    """The operator ``tersor::merge_tokens_backward`` for float16, bfloat16 and float32."""
    batch, length, channels = _check(grad_output, index, sizes)
    if output_sizes.shape != (batch, length) or output_sizes.dtype != torch.float32:
        raise ValueError(
            f"merge_tokens: output_sizes must be float32 of shape {(batch, length)}, "
            f"got {output_sizes.dtype} of shape {tuple(output_sizes.shape)}"
        )
    tokens = index.shape[1]
    grad_input = grad_output.new_empty((batch, tokens, channels))
    (source,), strides, vector = plan(grad_output.element_size(), grad_output)
    constants = _constants(channels, vector)
    blocks = triton.cdiv(tokens, constants["BLOCK_T"])
    grid = (batch * blocks, triton.cdiv(channels, constants["BLOCK_C"]))
    numbers = (*strides, *index.stride(), *_strides(sizes), *output_sizes.stride(), tokens, length, blocks)
    launch(_backward_kernel, grid, constants, OPTIONS, source, index, sizes, output_sizes, grad_input, *numbers)
    return grad_input


def _check(tensor: Tensor, index: Tensor, sizes: Tensor | None) -> tuple[int, int, int]:
    if tensor.dim() != 3 or index.dim() != 2:
        raise ValueError(
            f"merge_tokens: tokens must be (B, n, C) and index (B, n), "
            f"got shapes {tuple(tensor.shape)} and {tuple(index.shape)}"
        )
    check("merge_tokens", tensor)
    check_index("merge_tokens", (tensor.shape[0], index.shape[1]), index=index)
    if sizes is not None and (sizes.shape != index.shape or sizes.dtype != torch.float32):
        raise ValueError(
            f"merge_tokens: sizes must be float32 of shape {tuple(index.shape)}, "
            f"got {sizes.dtype} of shape {tuple(sizes.shape)}"
        )
    batch, length, channels = tensor.shape
    return batch, length, channels


def _strides(sizes: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if sizes is None else sizes.stride()


def _constants(channels: int, vector: int) -> dict[str, Any]:
    block = block_of(channels, CHANNELS)
    return {"CHANNELS": channels, "VECTOR": vector, "BLOCK_T": ELEMENTS // block, "BLOCK_C": block}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    for name, sized in (("fp16", True), ("bf16", True), ("fp32", True), ("fp16", False)):
        kinds = dict.fromkeys(("input", "output", "grad_output", "grad_input"), f"*{name}:16")
        kinds |= {"index": "*i64:16"} | dict.fromkeys(("sizes", "output_sizes", "totals"), "*fp32:16")
        label = f"{name} 384 channels" + ("" if sized else ", sizes of 1")
        own = _constants(384, 16 // ITEMSIZES[name]) | ({} if sized else {"sizes": None})
        yield _backward_kernel, label, signature_of(_backward_kernel, own, kinds), own, OPTIONS
        own = own | {"BLOCK_N": BLOCK_N}
        yield _forward_kernel, label, signature_of(_forward_kernel, own, kinds), own, FORWARD
