"""Batched early exit on GPUs: one launch where one program reads the logits in the time a launch takes, else two.

A program reads rows of logits and marks the images that are sure. One program then counts the others and writes both
kinds in order; up to 65536 logits it has marked them all by itself, and beyond a launch before it has.
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

ALONE = 1 << 16  # logits that the last program reads by itself: 64 images of 1000 classes
CLASSES = 1024  # of a tile
ELEMENTS = 8192  # 32 of a thread
IMAGES = 2048  # marks that are read at a time, 8 of a thread
WORD = 16  # marks are stored for whole words, so that they can be read by 8 bytes
WARPS = OPTIONS | {"num_warps": 8}

_SIZES = ["logits_b", "batch", "words"]


@triton.jit
def _mark(
    logits, marks, logits_b, batch, words, begin, threshold,
    LENGTH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Marks BLOCK_B images that are sure, and places behind the last image too."""
    image = begin + tl.arange(0, BLOCK_B)
    row = logits + (image.to(tl.int64) * logits_b * VECTOR)[:, None]
    maximum = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, LENGTH, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        there = (image < batch)[:, None] & (c < LENGTH)[None, :]
        value = tl.load(row + c[None, :], mask=there, other=float("-inf")).to(tl.float32)
        greatest = tl.maximum(maximum, tl.max(value, axis=1))
        base = tl.where(greatest == float("-inf"), 0.0, greatest)  # of nothing but -inf so far
        # NaN and inf make the sum NaN, and the image unsure, as with torch's softmax.
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(value - base[:, None]), axis=1)
        maximum = greatest
    sure = (tl.div_rn(1.0, total) >= threshold) & (maximum > float("-inf"))
    tl.store(marks + image, (sure | (image >= batch)).to(tl.uint8), mask=image < words * WORD)


@triton.jit(do_not_specialize=_SIZES)
def _mark_kernel(
    logits, marks, logits_b, batch, words, threshold,
    LENGTH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * BLOCK_B
    _mark(logits, marks, logits_b, batch, words, begin, threshold, LENGTH, VECTOR, BLOCK_B, BLOCK_C, WORD)


@triton.jit(do_not_specialize=_SIZES)
def _compact_kernel(
    logits, marks, index, count, logits_b, batch, words, threshold,
    LENGTH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, WORD: tl.constexpr,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """One program; without ``logits`` the images are marked already."""
    padded = words * WORD
    if logits is not None:
        for begin in range(0, padded, BLOCK_B):
            _mark(logits, marks, logits_b, batch, words, begin, threshold, LENGTH, VECTOR, BLOCK_B, BLOCK_C, WORD)
        tl.debug_barrier()  # other threads than have written the marks read them
    unsure = tl.zeros([IMAGES], tl.int32)
    for begin in range(0, padded, IMAGES):
        image = begin + tl.arange(0, IMAGES)
        unsure += (tl.load(marks + image, mask=image < padded, other=1) == 0).to(tl.int32)
    total = tl.sum(unsure, axis=0)
    tl.store(count, total.to(tl.int64))
    before = total * 0
    for begin in range(0, padded, IMAGES):
        image = begin + tl.arange(0, IMAGES)
        unsure = (tl.load(marks + image, mask=image < padded, other=1) == 0).to(tl.int32)
        so_far = before + tl.cumsum(unsure, axis=0)  # this image included
        place = tl.where(unsure != 0, so_far - 1, total + image - so_far)
        tl.store(index + place, image.to(tl.int64), mask=image < batch)
        before += tl.sum(unsure, axis=0)


def compact_unsure(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::compact_unsure`` for float16, bfloat16 and float32."""
    check("compact_unsure", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"compact_unsure: logits must be (B, classes), got shape {tuple(logits.shape)}")
    batch, classes = logits.shape
    logits = logits if classes == 1 or logits.stride(1) == 1 else logits.contiguous()
    index, count = (torch.empty(n, dtype=torch.int64, device=logits.device) for n in (batch, 1))
    words = triton.cdiv(batch, WORD)
    marks = torch.empty(words * WORD, dtype=torch.uint8, device=logits.device)
    stride = 0 if batch == 1 else logits.stride(0)
    vector = math.gcd(16 // logits.element_size(), stride)
    constants = _constants(classes, vector)
    numbers = (stride // vector, batch, words, threshold)
    alone = logits.numel() <= ALONE
    if not alone:
        grid = (triton.cdiv(words * WORD, constants["BLOCK_B"]),)
        launch(_mark_kernel, grid, constants, WARPS, logits, marks, *numbers)
    arguments = (logits if alone else None, marks, index, count, *numbers)
    launch(_compact_kernel, (1,), constants | {"IMAGES": IMAGES}, WARPS, *arguments)
    return index, count


def _constants(classes: int, vector: int) -> dict[str, Any]:
    block = block_of(classes, CLASSES)
    return {
        "LENGTH": classes, "VECTOR": vector, "BLOCK_B": min(ELEMENTS // block, 64), "BLOCK_C": block, "WORD": WORD,
    }  # fmt: skip


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    for name in ("fp16", "fp32"):
        own = _constants(1000, 16 // ITEMSIZES[name])
        kinds = {"logits": f"*{name}:16", "marks": "*u8:16", "threshold": "fp32"}
        kinds |= {"index": "*i64:16", "count": "*i64:16"}
        yield _mark_kernel, f"{name} 1000 classes", signature_of(_mark_kernel, own, kinds), own, WARPS
        own = own | {"IMAGES": IMAGES} | ({"logits": None} if name == "fp32" else {})
        label = "marked already" if name == "fp32" else f"{name} 1000 classes"
        yield _compact_kernel, label, signature_of(_compact_kernel, own, kinds), own, WARPS
