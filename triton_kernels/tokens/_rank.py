"""What the kernels over few tokens share: stable ranks by counting, places in an index, and rows of any stride.

A program owns some tokens and counts how many come before each of them: an image costs its tokens' square in
comparisons, whatever the number of programs, and no program waits for another. The tokens' rows then go where their
ranks say; the scores, read once by each program, come from the cache.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Case = tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
MOST = 4096  # tokens that are ranked by counting: 16 million comparisons an image; torch sorts more
BLOCK_N = 64  # scores or indices that are compared at a time
LONGEST_ROW = 8192  # channels that a program holds in one piece: 8 of each of 1024 threads, the most there are
# Contraction to fused multiply-add would move what is compared with the reference bit by bit.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_NAN = tl.constexpr(0x7FFFFFFF)  # the key above that of infinity


@triton.jit
def _sort_keys(scores, place):
    """Whole numbers in the order of rank, the first one greatest, of which no two are equal.

    NaN is above all, -0.0 equal to 0.0, and of equal scores the lower place comes first.
    """
    value = scores.to(tl.float32)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = tl.where(value == value, tl.where(bits < 0, bits ^ _NAN, bits), _NAN)
    return (key.to(tl.int64) << 32) - place


@triton.jit
def count_ranks(scores, stride, token, count, BLOCK_N: tl.constexpr):
    """How many of a row of ``count`` scores come before those of ``token``."""
    stride = tl.cast(stride, tl.int64)
    own = _sort_keys(tl.load(scores + token * stride, mask=(token >= 0) & (token < count), other=0.0), token)
    total = tl.zeros(token.shape, tl.int32)
    for begin in range(0, count, BLOCK_N):
        rival = begin + tl.arange(0, BLOCK_N)
        keys = _sort_keys(tl.load(scores + rival * stride, mask=rival < count, other=float("-inf")), rival)
        # Counted in float32: of whole numbers LLVM makes bytes, and puts them on the stack.
        total += tl.sum((keys[None, :] > own[:, None]).to(tl.float32), axis=1).to(tl.int32)
    return total


@triton.jit
def find(index, stride, wanted, after, present, count, BLOCK_N: tl.constexpr):
    """The first place behind ``after`` where a row of ``count`` indices holds ``wanted``, and at how many it does.

    Where it does at none, the place is ``count``. Of ``index``, pointers to rows, and ``wanted`` one has length 1.
    """
    stride = tl.cast(stride, tl.int64)
    first = after * 0 + count
    copies = after * 0
    for begin in range(0, count, BLOCK_N):
        place = begin + tl.arange(0, BLOCK_N)
        there = present[:, None] & (place < count)[None, :]
        entry = tl.load(index[:, None] + (place * stride)[None, :], mask=there, other=-1)
        match = (entry == wanted[:, None]) & (place[None, :] > after[:, None])
        first = tl.minimum(first, tl.min(tl.where(match, place[None, :], count), axis=1))
        copies += tl.sum(match.to(tl.int32), axis=1)
    return first, copies


@triton.jit
def rows(base, image, row, stride_b, stride_n, c, VECTOR: tl.constexpr):
    """Pointers to channels ``c`` of rows, ``[ROWS, BLOCK_C]``; the strides count VECTOR elements each."""
    place = (image.to(tl.int64) * stride_b + row.to(tl.int64) * stride_n) * VECTOR
    return base + place[:, None] + c[None, :]


def plan(itemsize: int, *tensors: Tensor | None) -> tuple[list[Any], list[int], int]:
    """``(B, n, C)`` tensors with each row in one piece, the strides of their images and rows, and VECTOR.

    The strides count VECTOR elements, which tells the compiler how wide it may load; 16 bytes are the widest.
    """
    inputs = [None if t is None else t if t.shape[2] == 1 or t.stride(2) == 1 else t.contiguous() for t in tensors]
    strides = [0 if t is None or t.shape[axis] == 1 else t.stride(axis) for t in inputs for axis in (0, 1)]
    vector = math.gcd(16 // itemsize, *strides)
    return inputs, [s // vector for s in strides], vector


def check(name: str, first: Tensor, **tensors: tuple[Tensor | None, Sequence[int]]) -> None:
    """Refuses what a kernel would answer with a read outside a tensor: each is given with the shape it must have."""
    if first.dtype not in DTYPES:
        raise TypeError(f"{name}: the Triton kernels take float16, bfloat16 and float32, got {first.dtype}")
    for argument, (tensor, shape) in tensors.items():
        if tensor is not None and (tensor.shape != tuple(shape) or tensor.dtype != first.dtype):
            raise ValueError(
                f"{name}: {argument} must be {first.dtype} of shape {tuple(shape)}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )


def check_index(name: str, shape: Sequence[int], **index: Tensor) -> None:
    ((argument, tensor),) = index.items()
    if tensor.shape != tuple(shape) or tensor.dtype != torch.int64:
        raise ValueError(
            f"{name}: {argument} must be int64 of shape {tuple(shape)}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )


def check_scores(name: str, scores: Tensor, shape: Sequence[int]) -> None:
    if scores.shape != tuple(shape) or not scores.is_floating_point():
        raise ValueError(
            f"{name}: scores must be floating-point of shape {tuple(shape)}, "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )


def sorted_by_torch(scores: Tensor) -> bool:
    """Whether there are too many scores to count, or they are float64, which the kernels would round."""
    return scores.shape[1] > MOST or scores.dtype == torch.float64


def block_of(channels: int, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(channels)))


def launch(kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], options: Any, *arguments: Any) -> None:
    if math.prod(grid):
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[grid](*arguments, **constants, **options)


def signature_of(kernel: Any, constants: dict[str, Any], kinds: dict[str, str]) -> dict[str, str]:
    """The types of a case's arguments; what is in neither is a 32-bit number."""
    return {a: kinds.get(a, "i32") for a in kernel.arg_names if a not in constants}


def ahead_of_time_cases() -> Iterator[Case]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
