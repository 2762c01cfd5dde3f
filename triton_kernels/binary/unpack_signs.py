"""From bits back to a map, on GPUs: one launch reads each word once and writes the map in the order asked for."""

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

from tersor.triton_kernels.binary._words import WORD, check_words
from tersor.triton_kernels.binary.pack_signs import OPTIONS, positions, tile
from tersor.triton_kernels.quantization._fake_quantize import Case

KINDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@triton.jit(do_not_specialize=["images", "size", "inputs", "groups", "words"])
def _unpack_kernel(
    signs, output, images, size, inputs, groups, words, LAST: tl.constexpr,
    VECTOR_P: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WORD: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """BLOCK_P positions and one word's channels, neighbours in memory where LAST; sizes as for packing."""
    size = size * VECTOR_P
    inputs = inputs * VECTOR_C
    columns = groups * words
    first, image, place, present = positions(images, size, BLOCK_P, columns)
    column = tl.program_id(0) % columns
    source = signs + (first + tl.arange(0, BLOCK_P)) * columns + column
    positive = tl.load(source, mask=present, other=0)
    nonzero = tl.load(source + images.to(tl.int64) * size * columns, mask=present, other=0)
    channels = (groups * inputs).to(tl.int64)
    for half in tl.static_range(WORD // HALF):
        lane = tl.arange(0, BLOCK_C)
        c = column % words * WORD + half * HALF + lane
        channel = column // words * inputs + c
        above = ((positive >> (half * HALF)).to(tl.int32)[:, None] >> lane[None, :]) & 1
        there = ((nonzero >> (half * HALF)).to(tl.int32)[:, None] >> lane[None, :]) & 1
        sign = ((above * 2 - 1) * there).to(tl.float32).to(output.dtype.element_ty)  # [BLOCK_P, BLOCK_C]
        if LAST:
            target = ((image * size + place) * channels)[:, None] + channel[None, :]
        else:
            target = (image * channels * size + place)[:, None] + (channel.to(tl.int64) * size)[None, :]
        tl.store(output + target, sign, mask=present[:, None] & (c < inputs)[None, :])


def unpack_signs(signs: Tensor, channels: int, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """The operator ``tersor::unpack_signs``; float64 holds the signs as well as the others do."""
    check_words("unpack_signs", signs)
    _, batch, height, width, groups, words = signs.shape
    if not groups or channels < 1 or channels % groups or triton.cdiv(channels // groups, WORD) != words:
        raise ValueError(f"unpack_signs: signs must be of {channels} channels, got shape {tuple(signs.shape)}")
    if dtype not in KINDS:
        raise TypeError(f"unpack_signs: dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, channels, height, width)
    output = torch.empty(shape, dtype=dtype, device=signs.device, memory_format=format)
    if output.numel():
        size, inputs = height * width, channels // groups
        constants = _constants(batch * size, size, inputs, dtype, channels_last)
        blocks = triton.cdiv(batch * size, constants["BLOCK_P"])
        sizes = (batch, size // constants["VECTOR_P"], inputs // constants["VECTOR_C"], groups, words)
        with torch.cuda.device_of(signs):
            _unpack_kernel[(blocks * groups * words,)](signs.contiguous(), output, *sizes, **constants, **OPTIONS)
    return output


def _constants(positions: int, size: int, inputs: int, dtype: torch.dtype, last: bool) -> dict[str, Any]:
    most = 16 // dtype.itemsize
    vectors = {"VECTOR_P": 1 if last else math.gcd(most, size), "VECTOR_C": math.gcd(most, inputs) if last else 1}
    return {"LAST": last} | vectors | tile(positions, inputs)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: the maps of ResNet-18's first and third stages."""
    for dtype in (torch.float16, torch.float32):
        name = KINDS[dtype]
        for channels, size in ((64, 56 * 56), (256, 14 * 14)):
            for last in (False, True):
                fixed = _constants(8 * size, size, channels, dtype, last)
                kinds = {"signs": "*i64:16", "output": f"*{name}:16"}
                signature = {a: kinds.get(a, "i32") for a in _unpack_kernel.arg_names if a not in fixed}
                yield _unpack_kernel, f"{name} {channels} {'last' if last else 'first'}", signature, fixed, OPTIONS
