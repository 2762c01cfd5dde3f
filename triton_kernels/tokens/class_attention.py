"""The class token's attention to the other tokens on GPUs: one launch.

A program owns an image and takes the heads in ascending order, which decides equality of scores: the class token's
logits, their softmax, and the sum over the heads, all in registers. It reads the keys once and of the queries one row;
no attention matrix is stored. Of more tokens than a tile holds it reads the keys twice, the second time from L2: first
for each head's greatest logit and sum, then for the scores.
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

from tersor.triton_kernels.tokens._rank import ITEMSIZES, OPTIONS, Case, block_of, check, launch, signature_of

LONGEST = 256  # tokens of a tile of keys
BLOCK_D, EACH = (64, 16), (64, 16)  # its width, and elements to a thread: of whole vectors, and where each is a load

_STRIDES = ["query_b", "query_h", "key_b", "key_n", "key_h", "average_b", "average_n"]
_SIZES = ["length", "heads"]


@triton.jit
def _logits(
    query, key, image, head, n, query_b, query_h, key_b, key_n, key_h, length, scale,
    HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Those of the class token and the keys ``n``; -inf where there is no key. The strides count VECTOR elements."""
    q_row = query + (image * query_b + head.to(tl.int64) * query_h) * VECTOR
    k_row = key + (image * key_b + head.to(tl.int64) * key_h) * VECTOR
    total = tl.zeros(n.shape, tl.float32)
    for begin in range(0, HEAD_DIM, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        q = tl.load(q_row + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32) * scale
        place = (n.to(tl.int64) * key_n * VECTOR)[:, None] + d[None, :]
        k = tl.load(k_row + place, mask=(n < length)[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(q[None, :] * k, axis=1)
    return tl.where(n < length, total, float("-inf"))


@triton.jit
def _store(output, average, image, n, total, average_b, average_n, length, heads, decay, rest):
    """The heads' mean, without the class token's own column, and averaged with what came before."""
    present = (n > 0) & (n < length)
    value = rest * tl.div_rn(total, tl.cast(heads, tl.float32))
    if average is not None:
        place = image * average_b + (n - 1).to(tl.int64) * average_n
        value = decay * tl.load(average + place, mask=present, other=0.0) + value
    tl.store(output + image * (length - 1) + n - 1, value, mask=present)


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _whole_kernel(
    query, key, average, output, query_b, query_h, key_b, key_n, key_h, average_b, average_n, length, heads,
    scale, decay, rest,
    HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """An image of at most BLOCK_N tokens."""
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for h in range(heads):
        head = tl.cast(h, tl.int32)
        logit = _logits(
            query, key, image, head, n, query_b, query_h, key_b, key_n, key_h, length, scale, HEAD_DIM, VECTOR, BLOCK_D
        )
        weight = tl.exp(logit - tl.max(logit, axis=0))  # NaN and inf need no care: any of them makes the sum NaN
        total += tl.div_rn(weight, tl.sum(weight, axis=0))
    _store(output, average, image, n, total, average_b, average_n, length, heads, decay, rest)


@triton.jit(do_not_specialize=_STRIDES + _SIZES)
def _blocks_kernel(
    query, key, average, output, query_b, query_h, key_b, key_n, key_h, average_b, average_n, length, heads,
    scale, decay, rest,
    HEAD_DIM: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """An image, BLOCK_N tokens at a time; BLOCK_H is at least the number of heads."""
    image = tl.program_id(0).to(tl.int64)
    which = tl.arange(0, BLOCK_H)
    maxima = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_H], tl.float32)
    for h in range(heads):
        head = tl.cast(h, tl.int32)
        maximum = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for begin in range(0, length, BLOCK_N):
            n = begin + tl.arange(0, BLOCK_N)
            logit = _logits(
                query, key, image, head, n, query_b, query_h, key_b, key_n, key_h, length, scale,
                HEAD_DIM, VECTOR, BLOCK_D,
            )  # fmt: skip
            greatest = tl.maximum(maximum, tl.max(logit, axis=0))
            base = tl.where(greatest == float("-inf"), 0.0, greatest)  # of nothing but -inf so far
            total = total * tl.exp(maximum - base) + tl.sum(tl.exp(logit - base), axis=0)
            maximum = greatest
        maxima = tl.where(which == head, maximum, maxima)
        sums = tl.where(which == head, total, sums)
    for begin in range(0, length, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        result = tl.zeros([BLOCK_N], tl.float32)
        for h in range(heads):
            head = tl.cast(h, tl.int32)
            logit = _logits(
                query, key, image, head, n, query_b, query_h, key_b, key_n, key_h, length, scale,
                HEAD_DIM, VECTOR, BLOCK_D,
            )  # fmt: skip
            maximum = tl.sum(tl.where(which == head, maxima, 0.0), axis=0)
            total = tl.sum(tl.where(which == head, sums, 0.0), axis=0)
            result += tl.div_rn(tl.exp(logit - maximum), total)
        _store(output, average, image, n, result, average_b, average_n, length, heads, decay, rest)


def class_scores(query: Tensor, key: Tensor, average: Tensor | None, scale: float, decay: float) -> Tensor:
    """The operator ``tersor::class_scores`` for float16, bfloat16 and float32."""
    name = "class_scores"
    if key.dim() != 4 or min(key.shape[1:3]) < 1:
        raise ValueError(f"{name}: key must be (B, n, heads, head_dim), got shape {tuple(key.shape)}")
    batch, length, heads, head_dim = key.shape
    check(name, key, query=(query, (batch, heads, head_dim)))
    if average is not None and (average.shape != (batch, length - 1) or average.dtype != torch.float32):
        raise ValueError(
            f"{name}: average must be float32 of shape {(batch, length - 1)}, "
            f"got {average.dtype} of shape {tuple(average.shape)}"
        )
    output = torch.empty((batch, length - 1), dtype=torch.float32, device=key.device)
    query, key = (t if head_dim == 1 or t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    strides = [0 if n == 1 else s for t in (query, key) for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    vector = math.gcd(16 // key.element_size(), *strides)
    kernel, constants, options = _plan(length, heads, head_dim, vector)
    numbers = [s // vector for s in strides] + ([0, 0] if average is None else [*average.stride()])
    arguments = (query, key, average, output, *numbers, length, heads, scale, decay, 1 - decay)
    if output.numel():
        launch(kernel, (batch,), constants, options, *arguments)
    return output


def _plan(length: int, heads: int, head_dim: int, vector: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel for these sizes, its constants and options."""
    alone = vector < 4
    block_n, block_d = block_of(length, LONGEST), block_of(head_dim, BLOCK_D[alone])
    constants = {"HEAD_DIM": head_dim, "VECTOR": vector, "BLOCK_N": block_n, "BLOCK_D": block_d}
    options = OPTIONS | {"num_warps": max(1, block_n * block_d // EACH[alone] // 32)}
    if length <= LONGEST:
        return _whole_kernel, constants, options
    # The compiler would rather spill 8 bytes than take more than 64 registers.
    return _blocks_kernel, constants | {"BLOCK_H": triton.next_power_of_2(heads)}, options | {"maxnreg": 144}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    for name, length in (("fp16", 197), ("fp16", 50), ("bf16", 197), ("fp32", 197), ("fp16", 577)):
        kernel, constants, options = _plan(length, 6, 64, 16 // ITEMSIZES[name])
        kinds = dict.fromkeys(("query", "key"), f"*{name}:16") | dict.fromkeys(("average", "output"), "*fp32:16")
        kinds |= dict.fromkeys(("scale", "decay", "rest"), "fp32")
        yield kernel, f"{name} {length} tokens", signature_of(kernel, constants, kinds), constants, options
