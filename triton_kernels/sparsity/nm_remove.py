"""Removal of the lowest scores of every group, on GPUs, in place, and the mask of what is left: one pass.

Scores are compared as whole numbers in the same order. Of up to 16 combinations each counts those before it. Of more,
the k-th smallest is found bit by bit, from the sign down: 32 times the group counts how many of its scores are below.
At C = 70 that is less than half the comparisons. Up to 128 scores of a group stay in registers meanwhile; the rest are
read anew each time. A tile in which nothing changes, as is usual within an epoch, is not written.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.sparsity.nm_pattern import check_pattern
from tersor.sparsity.nm_remove import DEAD, _check_numbers
from tersor.triton_kernels.freezing._octets import in_place
from tersor.triton_kernels.quantization._fake_quantize import OPTIONS, Case
from tersor.triton_kernels.sparsity._groups import (
    ELEMENTS,
    check_triton_scores,
    first_group,
    kept_by,
    patterns,
    store_words,
    stored_counts,
)

FEW = tl.constexpr(16)  # combinations that are ranked by comparing all with all
HELD = 128  # combinations that a program has in registers: 8 a thread
_DEAD = tl.constexpr(DEAD)


@triton.jit
def _load(scores, first, groups, begin, COUNT: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr):
    """Of CHUNK combinations: their places, which exist, the scores, and those with exact zeros marked."""
    group = tl.arange(0, GROUPS)[:, None]
    column = begin + tl.arange(0, CHUNK)[None, :]
    place = scores + first * COUNT + (group * COUNT + column)
    present = (first + group < groups) & (column < COUNT)
    score = tl.load(place, mask=present, other=float("inf"))
    return place, present, score, tl.where(score == 0.0, _DEAD, score)


@triton.jit
def _keys(scores):
    """Whole numbers in the order of the scores; NaN is last."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _remove(place, present, score, marked, removed, pattern):
    """Writes the chunk, and returns the words of what it keeps."""
    new = tl.where(removed, 0.0, marked)
    changed = present & (new.to(tl.int32, bitcast=True) != score.to(tl.int32, bitcast=True))
    if tl.max(tl.max(changed.to(tl.int32), axis=1), axis=0) != 0:
        tl.store(place, new, mask=present)
    return tl.reduce_or(tl.where(present & (new != 0.0), pattern, 0), axis=1)


@triton.jit
def _below(keys, candidate):
    return tl.sum((keys < candidate[:, None]).to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["groups", "k"])
def _kernel(
    scores, numbers, patterns, mask, groups, k,
    COUNT: tl.constexpr, CHUNK: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    first = first_group(GROUPS)
    place, present, score, marked = _load(scores, first, groups, 0, COUNT, CHUNK, GROUPS)
    keys = _keys(marked)
    column = tl.arange(0, CHUNK)
    if COUNT <= FEW:
        rank = tl.zeros([GROUPS, CHUNK], tl.int32)
        for i in tl.static_range(COUNT):
            other = tl.sum(tl.where(column[None, :] == i, keys, 0), axis=1)[:, None]
            rank += ((other < keys) | ((other == keys) & (column[None, :] > i))).to(tl.int32)
        pattern = kept_by(numbers, patterns, first, column, present, COUNT, GROUPS)
        words = _remove(place, present, score, marked, rank < k, pattern)
    else:
        # The largest number below which there are fewer than k scores is the k-th smallest.
        kth = tl.full([GROUPS], -2147483648, tl.int32)
        less = tl.zeros([GROUPS], tl.int32)
        for i in range(32):
            candidate = kth ^ (tl.full([GROUPS], 1, tl.int32) << (31 - i))
            below = _below(keys, candidate)
            for begin in range(CHUNK, COUNT, CHUNK):
                _, _, _, more = _load(scores, first, groups, begin, COUNT, CHUNK, GROUPS)
                below += _below(_keys(more), candidate)
            kth = tl.where(below < k, candidate, kth)
            less = tl.where(below < k, below, less)
        words = tl.zeros([GROUPS], tl.int32)
        equal = less  # and those equal to the k-th so far, up to which index they go
        for begin in range(0, COUNT, CHUNK):
            place, present, score, marked = _load(scores, first, groups, begin, COUNT, CHUNK, GROUPS)
            keys = _keys(marked)
            same = (keys == kth[:, None]).to(tl.int32)
            removed = (keys < kth[:, None]) | ((same != 0) & (equal[:, None] + tl.cumsum(same, axis=1) <= k))
            equal += tl.sum(same, axis=1)
            pattern = kept_by(numbers, patterns, first, begin + column, present, COUNT, GROUPS)
            words |= _remove(place, present, score, marked, removed, pattern)
    store_words(mask, words, first, groups * M, M, WIDTH, GROUPS)


def nm_remove(scores: Tensor, k: int, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    """The operator ``tersor::nm_remove`` for float32; on a GPU a NaN counts as the largest."""
    check_pattern("nm_remove_", n, m)
    check_triton_scores("nm_remove_", scores, "G", n, m, combinations)
    if scores.device.type == "cpu":  # in the interpreter; on a GPU it would wait for the values
        _check_numbers(scores)
    groups, tile = len(scores), _tile(scores.shape[1], m)
    numbers = None if combinations is None else combinations.contiguous()
    mask = scores.new_empty(((groups * m + 7) // 8,), dtype=torch.uint8)
    if groups:
        with in_place(scores) as (own,), torch.cuda.device_of(scores):
            programs = triton.cdiv(groups, tile["GROUPS"])
            _kernel[(programs,)](own, numbers, patterns(n, m, scores.device), mask, groups, k, **tile, **OPTIONS)
    return mask


def _tile(count: int, m: int) -> dict[str, int]:
    chunk = min(triton.next_power_of_2(count), HELD)
    width = triton.next_power_of_2(m)
    return {"COUNT": count, "CHUNK": chunk, "M": m, "WIDTH": width, "GROUPS": ELEMENTS // max(chunk, width)}


def ahead_of_time_cases(compact: bool = False) -> Iterator[Case]:
    """What the ahead-of-time test compiles; compact scores look their positions up, which are single loads."""
    signature = {"scores": "*fp32:16", "patterns": "*i32:16", "mask": "*u8:16", "groups": "i32", "k": "i32"}
    for n, m in ((2, 4), (1, 4), (2, 8), (4, 8), (1, 16), (4, 16)):
        numbers = "*u8:16" if math.comb(m, n) <= 256 else "*i16:16"
        for count in stored_counts(n, m, compact):
            if compact:
                yield _kernel, f"{n}:{m} {count} stored", signature | {"numbers": numbers}, _tile(count, m), OPTIONS
            else:
                yield _kernel, f"{n}:{m}", signature, {"numbers": None, **_tile(count, m)}, OPTIONS
