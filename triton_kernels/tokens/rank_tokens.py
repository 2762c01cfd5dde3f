"""Stable ranking of few tokens on GPUs: one launch, by counting."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.tokens._rank import (
    OPTIONS,
    Case,
    check_scores,
    count_ranks,
    launch,
    signature_of,
    sorted_by_torch,
)

TOKENS, RIVALS = 16, 128  # whose ranks a program counts, and how many it compares them with at a time
# One warp: four scores to a thread in one load.
WARP = OPTIONS | {"num_warps": 1}


@triton.jit(do_not_specialize=["scores_b", "count"])
def _rank_kernel(
    scores, order, scores_b, scores_n, count, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """BLOCK_T tokens of an image; ``scores_b`` counts VECTOR scores, which divides ``count`` too."""
    count = count // VECTOR * VECTOR
    blocks = tl.cdiv(count, BLOCK_T)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = count_ranks(scores + image * scores_b * VECTOR, scores_n, token, count, BLOCK_N)
    tl.store(order + image * count + rank, token.to(tl.int64), mask=token < count)


def rank_tokens(scores: Tensor) -> Tensor:
    """The operator ``tersor::rank_tokens``; more than 4096 tokens are sorted by torch."""
    if scores.dim() != 2:
        raise ValueError(f"rank_tokens: scores must be (B, N), got shape {tuple(scores.shape)}")
    check_scores("rank_tokens", scores, scores.shape)
    if sorted_by_torch(scores):
        return torch.argsort(scores, dim=1, descending=True, stable=True)
    batch, count = scores.shape
    order = torch.empty((batch, count), dtype=torch.int64, device=scores.device)
    constants = _constants(count, scores.stride(0))
    numbers = (scores.stride(0) // constants["VECTOR"], scores.stride(1), count)
    launch(_rank_kernel, (batch * triton.cdiv(count, TOKENS),), constants, WARP, scores, order, *numbers)
    return order


def _constants(*multiples: int) -> dict[str, Any]:
    return {"VECTOR": math.gcd(4, *multiples), "BLOCK_T": TOKENS, "BLOCK_N": RIVALS}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``: rows of whole vectors, as of 14 x 14 tokens."""
    for name in ("fp16", "fp32"):
        own = _constants(196, 196) | {"scores_n": 1}
        kinds = {"scores": f"*{name}:16", "order": "*i64:16"}
        yield _rank_kernel, f"{name} 196 tokens", signature_of(_rank_kernel, own, kinds), own, WARP
