"""Token Merging's choice on GPUs: two launches.

In the first a program owns some tokens of a and finds the most similar one of b to each, a block of b at a time: heads
are added up on the way in, and a product of two blocks gives the cosines when it is divided by both lengths. In the
second a program owns an image: it counts ranks, and numbers the tokens that are left as it goes.
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

from tersor.tokens.match_tokens import _reference
from tersor.triton_kernels.tokens._rank import (
    ITEMSIZES,
    MOST,
    OPTIONS,
    Case,
    block_of,
    check,
    count_ranks,
    launch,
    signature_of,
)

TOKENS = 32  # of a and of b whose similarities a program computes at a time
CHANNELS = 64  # of their keys
PAD = 16  # what the rows between the launches are padded to, so that they are read in vectors
RANKED, RIVALS = 32, 128  # tokens whose ranks are counted at a time, and how many they are compared with

_SIZES = ["keys_b", "keys_n", "keys_h", "length", "heads", "blocks", "pitch", "count", "first_a", "first_b"]


@triton.jit
def _add_heads(keys, token, keys_n, keys_h, present, heads, d, HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of some tokens' keys over the heads, ``[TOKENS, BLOCK_D]``; the strides count VECTOR elements."""
    row = keys + (token.to(tl.int64) * keys_n * VECTOR)[:, None] + d[None, :]
    mask = present[:, None] & (d < HEAD_DIM)[None, :]
    total = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    for head in range(1, heads):
        total += tl.load(row + tl.cast(head, tl.int64) * keys_h * VECTOR, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=_SIZES)
def _best_kernel(
    keys, best, partner, keys_b, keys_n, keys_h, length, heads, blocks, pitch, first_a, first_b,
    HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of an image's a. What cannot be merged, and what is behind the last, has -inf; NaN becomes -2."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    a = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    there = (a >= first_a) & (2 * a < length)
    source = keys + image * keys_b * VECTOR
    greatest = tl.full([TOKENS], float("-inf"), tl.float32)
    where = tl.zeros([TOKENS], tl.int32) + first_b
    for begin in range(0, length // 2, TOKENS):
        b = begin + tl.arange(0, TOKENS)
        present = 2 * b + 1 < length
        product = tl.zeros([TOKENS, TOKENS], tl.float32)
        square_a = tl.zeros([TOKENS], tl.float32)
        square_b = tl.zeros([TOKENS], tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            one = _add_heads(source, 2 * a, keys_n, keys_h, there, heads, d, HEAD_DIM, VECTOR)
            other = _add_heads(source, 2 * b + 1, keys_n, keys_h, present, heads, d, HEAD_DIM, VECTOR)
            product = tl.dot(one, tl.trans(other), product, input_precision="ieee")
            square_a += tl.sum(one * one, axis=1)
            square_b += tl.sum(other * other, axis=1)
        cosine = tl.div_rn(tl.div_rn(product, tl.sqrt_rn(square_a)[:, None]), tl.sqrt_rn(square_b)[None, :])
        allowed = (present & (b >= first_b))[None, :] & (cosine == cosine)
        cosine = tl.where(allowed, cosine, float("-inf"))
        most = tl.max(cosine, axis=1)
        place = tl.min(tl.where(cosine == most[:, None], b[None, :], length), axis=1)
        where = tl.where(most > greatest, place, where)
        greatest = tl.maximum(greatest, most)
    greatest = tl.where(there, tl.maximum(greatest, -2.0), float("-inf"))
    target = image * pitch * PAD + a
    tl.store(best + target, greatest, mask=a < pitch * PAD)
    tl.store(partner + target, where, mask=a < pitch * PAD)


@triton.jit(do_not_specialize=_SIZES)
def _place_kernel(
    best, partner, index, length, pitch, count, first_b,
    RANKED: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """One image; ``pitch`` counts PAD tokens of a."""
    image = tl.program_id(0).to(tl.int64)
    padded = pitch * PAD
    left = (length + 1) // 2 - count
    before = count * 0
    for begin in range(0, padded, RANKED):
        token = begin + tl.arange(0, RANKED)
        present = 2 * token < length
        rank = count_ranks(best + image * padded, 1, token, padded, BLOCK_N)
        kept = present & (rank >= count)
        so_far = before + tl.cumsum(kept.to(tl.int32), axis=0)  # this token included
        place = tl.where(so_far > 1, so_far - 1 + first_b, 0)  # the distillation token comes second
        other = tl.load(partner + image * padded + token, mask=token < padded, other=0)
        place = tl.where(kept, place, tl.where(other < first_b, 1, left + other))
        own = tl.where(token < first_b, 1, left + token)
        target = index + image * length + 2 * token
        tl.store(target, place.to(tl.int64), mask=present)
        tl.store(target + 1, own.to(tl.int64), mask=2 * token + 1 < length)
        before += tl.sum(kept.to(tl.int32), axis=0)


def match_tokens(keys: Tensor, count: int, protected: int) -> Tensor:
    """The operator ``tersor::match_tokens`` for float16, bfloat16 and float32.

    More than 8192 tokens go to the reference, where torch sorts.
    """
    name = "match_tokens"
    if keys.dim() != 4 or min(keys.shape[2:]) < 1:
        raise ValueError(f"{name}: keys must be (B, n, heads, head_dim), got shape {tuple(keys.shape)}")
    check(name, keys)
    batch, length, heads, head_dim = keys.shape
    if protected not in (0, 1, 2) or not 1 <= count <= (length - protected) // 2:
        raise ValueError(f"{name}: count must be from 1 to {(length - protected) // 2}, got {count}")
    if length > 2 * MOST:
        return _reference(keys, count, protected)
    if head_dim > 1 and keys.stride(3) != 1:
        keys = keys.contiguous()
    strides = [0 if n == 1 else s for n, s in zip(keys.shape[:3], keys.stride()[:3], strict=True)]
    pitch = triton.cdiv((length + 1) // 2, PAD)
    best = torch.empty((batch, pitch * PAD), dtype=torch.float32, device=keys.device)
    partner = torch.empty((batch, pitch * PAD), dtype=torch.int32, device=keys.device)
    index = torch.empty((batch, length), dtype=torch.int64, device=keys.device)
    first_a, first_b = int(protected > 0), int(protected > 1)  # those before them are protected
    constants = _constants(head_dim, math.gcd(16 // keys.element_size(), *strides))
    blocks = triton.cdiv(pitch * PAD, TOKENS)
    numbers = (*(s // constants["VECTOR"] for s in strides), length, heads, blocks, pitch, first_a, first_b)
    launch(_best_kernel, (batch * blocks,), constants, OPTIONS, keys, best, partner, *numbers)
    placing = {"RANKED": RANKED, "BLOCK_N": RIVALS, "PAD": PAD}
    launch(_place_kernel, (batch,), placing, OPTIONS, best, partner, index, length, pitch, count, first_b)
    return index


def _constants(head_dim: int, vector: int) -> dict[str, Any]:
    block = block_of(head_dim, CHANNELS)
    return {"HEAD_DIM": head_dim, "VECTOR": vector, "TOKENS": TOKENS, "BLOCK_D": block, "PAD": PAD}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    between = {"best": "*fp32:16", "partner": "*i32:16", "index": "*i64:16"}
    for name, head_dim in (("fp16", 64), ("bf16", 64), ("fp32", 64), ("fp16", 192)):
        own = _constants(head_dim, 16 // ITEMSIZES[name])
        kinds = between | {"keys": f"*{name}:16"}
        label = f"{name} {head_dim} channels"
        yield _best_kernel, label, signature_of(_best_kernel, own, kinds), own, OPTIONS
    own = {"RANKED": RANKED, "BLOCK_N": RIVALS, "PAD": PAD}
    yield _place_kernel, "all", signature_of(_place_kernel, own, between), own, OPTIONS
