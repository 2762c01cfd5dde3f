"""The weight that alive combinations keep, and the scores' gradient, on GPUs: one pass in each direction.

Bytes that move per group, for a weight of u bytes an element and C combinations:

========  =======================================================================
forward   2 u M + 4 C, with a mask given 2 u M + M / 8; the mask M / 8
backward  3 u M + 8 C + M / 8
========  =======================================================================

Of compact scores C is the number stored, each with 1 or 2 bytes of its number besides, wherever scores are read.

What a combination's gradient costs is C M multiplications and additions a group: 24 at 2:4, 560 at 4:8.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.quantization._fake_quantize import Case
from tersor.triton_kernels.sparsity._groups import (
    IN_ORDER,
    Groups,
    cases,
    chunks,
    first_group,
    kept_by,
    load_words,
    patterns,
    places,
    spread,
    store_words,
    stored_counts,
)


@triton.jit
def _alive_words(
    scores, numbers, patterns, first, groups, COUNT: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The words of the positions that an alive combination keeps, ``[GROUPS]``."""
    group = tl.arange(0, GROUPS)[:, None]
    words = tl.zeros([GROUPS], tl.int32)
    for begin in range(0, COUNT, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        there = (first + group < groups) & (j < COUNT)[None, :]
        score = tl.load(scores + first * COUNT + (group * COUNT + j[None, :]), mask=there, other=0.0)
        pattern = kept_by(numbers, patterns, first, j, there, COUNT, GROUPS)
        words |= tl.reduce_or(tl.where(score != 0.0, pattern, 0), axis=1)
    return words


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    weight, scores, numbers, given, patterns, output, mask, size,
    COUNT: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    first = first_group(GROUPS)
    if given is None:
        words = _alive_words(scores, numbers, patterns, first, size // M, COUNT, CHUNK, GROUPS)
    else:
        words = load_words(given, first, size, M, WIDTH, GROUPS)
    store_words(mask, words, first, size, M, WIDTH, GROUPS)
    start, offsets, present = places(first, size, M, WIDTH, GROUPS, INPUTS, TAPS)
    w = tl.load(weight + start + offsets, mask=present, other=0.0)
    tl.store(output + start + offsets, tl.where(spread(words, WIDTH), w, tl.zeros_like(w)), mask=present)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    grad_output, weight, scores, numbers, mask, patterns, grad_weight, grad_scores, size,
    COUNT: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    first = first_group(GROUPS)
    start, offsets, present = places(first, size, M, WIDTH, GROUPS, INPUTS, TAPS)
    words = load_words(mask, first, size, M, WIDTH, GROUPS)
    g = tl.load(grad_output + start + offsets, mask=present, other=0.0)
    w = tl.load(weight + start + offsets, mask=present, other=0.0)
    tl.store(grad_weight + start + offsets, tl.where(spread(words, WIDTH), g, tl.zeros_like(g)), mask=present)
    product = w.to(tl.float32) * g.to(tl.float32)
    position = tl.arange(0, WIDTH)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    for begin in range(0, COUNT, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        there = (first + group < size // M) & (j < COUNT)[None, :]
        own = group * COUNT + j[None, :]
        score = tl.load(scores + first * COUNT + own, mask=there, other=0.0)
        pattern = kept_by(numbers, patterns, first, j, there, COUNT, GROUPS)
        total = tl.zeros([GROUPS, CHUNK], tl.float32)
        for p in tl.static_range(M):
            column = tl.sum(tl.where(position == p, product, 0.0), axis=1)  # M of M additions, of C M below
            total += column[:, None] * ((pattern >> p) & 1).to(tl.float32)
        tl.store(grad_scores + first * COUNT + own, tl.where(score != 0.0, total, 0.0), mask=there)


def nm_sparsify_forward(
    weight: Tensor, scores: Tensor, mask: Tensor | None, n: int, m: int, combinations: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::nm_sparsify_forward`` for float16, bfloat16 and float32."""
    where = "nm_sparsify"
    groups = Groups(where, weight, n, m)
    given = None if mask is None else groups.mask(where, mask)
    output, kept = torch.empty_like(groups.weight), groups.empty_mask()
    scores, numbers = groups.scores(where, scores, n, combinations)
    inputs = groups.weight, scores, numbers, given, patterns(n, m, weight.device)
    groups.launch(_forward_kernel, *inputs, output, kept, **chunks(scores.shape[1]))
    return groups.returned(output), kept


def nm_sparsify_backward(
    grad_output: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    n: int,
    m: int,
    combinations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::nm_sparsify_backward`` for float16, bfloat16 and float32; no atomics."""
    where = "nm_sparsify"
    groups = Groups(where, weight, n, m)
    scores, numbers = groups.scores(where, scores, n, combinations)
    inputs = groups.like(where, grad_output), groups.weight, scores, numbers, groups.mask(where, mask)
    grad_weight, grad_scores = torch.empty_like(groups.weight), torch.empty_like(scores)
    constants = chunks(scores.shape[1])
    groups.launch(_backward_kernel, *inputs, patterns(n, m, weight.device), grad_weight, grad_scores, **constants)
    return groups.returned(grad_weight), grad_scores


def ahead_of_time_cases(layout: dict[str, int] = IN_ORDER, compact: bool = False) -> Iterator[Case]:
    """What the ahead-of-time test compiles: all scores, weights in the groups' order, unless told otherwise.

    Compact scores look their positions up, which are single loads.
    """
    kinds = dict.fromkeys(("scores", "grad_scores"), "*fp32:16") | {"patterns": "*i32:16", "given": "*u8:16"}
    kinds["numbers"] = "*u8:16"
    variants: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for n, m in ((2, 4), (1, 4), (2, 8), (4, 8), (1, 16)):
        for count in stored_counts(n, m, compact):
            label = f"{n}:{m} {count} stored" if compact else f"{n}:{m}"
            variants[label] = n, m, chunks(count) if compact else {"numbers": None, **chunks(count)}
    forward: dict[str, tuple[int, int, dict[str, Any]]] = {}
    for label, (n, m, own) in variants.items():
        forward[label], forward[f"{label} given"] = (n, m, {"given": None, **own}), (n, m, own)
    yield from cases(_forward_kernel, forward, kinds, ["weight", "output"], layout)
    yield from cases(_backward_kernel, variants, kinds, ["grad_output", "weight", "grad_weight"], layout)
