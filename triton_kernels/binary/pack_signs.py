"""Signs of a map as bits, on GPUs: one launch reads the input where it lies and writes both planes of words.

A program owns BLOCK_P positions and one word of each plane, of up to 64 channels, which it reads in halves of 32. A
wide load runs along the channels where these are neighbours, along the positions where those are, and where neither
are it is one of single elements. With e bytes an element, 8 e bytes and 2 bits a sign move.
"""

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

from tersor.triton_kernels.binary._words import HALF, MOST, WORD, pack_bits
from tersor.triton_kernels.quantization._fake_quantize import SUMS, Case

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
ELEMENTS = 4096  # of half a tile: 32 a thread

_SIZES = ["images", "size", "width", "inputs", "groups", "words"]


@triton.jit
def positions(images, size, BLOCK_P: tl.constexpr, columns):
    """Of this program's positions: the first, the image and the place in it of each, and which exist.

    ``columns`` programs have the same positions. An image has at most ``MOST`` positions.
    """
    first = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_P
    place = (first % size).to(tl.int32) + tl.arange(0, BLOCK_P)
    image = first // size + place // size
    present = first + tl.arange(0, BLOCK_P) < images.to(tl.int64) * size
    return first, image, place % size, present


@triton.jit(do_not_specialize=_SIZES)
def _pack_kernel(
    input, shift, output, images, size, width, inputs, groups, words, input_n, input_c, input_h, input_w,
    ROWS: tl.constexpr, VECTOR_P: tl.constexpr, VECTOR_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    WORD: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Sizes and strides count VECTOR_P elements where positions are neighbours, VECTOR_C where channels are.

    Without ROWS an image is one row.
    """
    size = size * VECTOR_P
    width = width * VECTOR_P
    inputs = inputs * VECTOR_C
    columns = groups * words
    first, image, place, present = positions(images, size, BLOCK_P, columns)
    column = tl.program_id(0) % columns
    source = input + image * input_n * (VECTOR_P * VECTOR_C)  # [BLOCK_P]
    if ROWS:
        source += (place // width).to(tl.int64) * input_h * (VECTOR_P * VECTOR_C)
        place = place % width
    source += place.to(tl.int64) * input_w * VECTOR_C
    positive = tl.zeros([BLOCK_P], tl.int64)
    nonzero = tl.zeros([BLOCK_P], tl.int64)
    for half in tl.static_range(WORD // HALF):
        lane = tl.arange(0, BLOCK_C)
        c = column % words * WORD + half * HALF + lane
        channel = (column // words * inputs + c).to(tl.int64)
        there = present[:, None] & (c < inputs)[None, :]
        x = tl.load(source[:, None] + (channel * input_c * VECTOR_P)[None, :], mask=there, other=0.0).to(tl.float32)
        if shift is not None:
            x += tl.load(shift + channel, mask=c < inputs, other=0.0).to(tl.float32)[None, :]
            x = tl.where(there, x, 0.0)
        # Sums of such numbers have the sign that the input's own dtype gives them, even where it rounds.
        positive |= (pack_bits(x > 0.0, lane).to(tl.int64) & 0xFFFFFFFF) << (half * HALF)
        nonzero |= (pack_bits((x > 0.0) | (x < 0.0), lane).to(tl.int64) & 0xFFFFFFFF) << (half * HALF)
    target = output + (first + tl.arange(0, BLOCK_P)) * columns + column
    tl.store(target, positive, mask=present)
    tl.store(target + images.to(tl.int64) * size * columns, nonzero, mask=present)


def pack_signs(input: Tensor, shift: Tensor | None, groups: int) -> Tensor:
    """The operator ``tersor::pack_signs`` for float16, bfloat16 and float32."""
    _check(input, shift, groups)
    batch, channels, height, width = input.shape
    inputs = channels // groups
    words = triton.cdiv(inputs, WORD)
    output = input.new_empty((2, batch, height, width, groups, words), dtype=torch.int64)
    if output.numel():
        sizes, strides, constants = _plan(input, inputs)
        blocks = triton.cdiv(batch * height * width, constants["BLOCK_P"])
        shift = None if shift is None else shift.contiguous()
        with torch.cuda.device_of(input):
            _pack_kernel[(blocks * groups * words,)](
                input, shift, output, batch, *sizes, groups, words, *strides, **constants, **OPTIONS
            )  # fmt: skip
    return output


def _plan(input: Tensor, inputs: int) -> tuple[list[int], list[int], dict[str, Any]]:
    """Size, width and channels of a group, the four strides, and the constants."""
    batch, channels, height, width = input.shape
    n, c, h, w = (0 if size == 1 else stride for size, stride in zip(input.shape, input.stride(), strict=True))
    if height == 1 or width == 1 or h == width * w:  # one row of positions
        step = h if width == 1 else w
        height, width, h, w = 1, height * width, 0, step
    size, most = height * width, 16 // input.element_size()
    vector_p = vector_c = 1
    if channels > 1 and c == 1:
        vector_c = math.gcd(most, inputs, n, h, w)
    elif size > 1 and w == 1:
        vector_p = math.gcd(most, width, n, c, h)
    both = vector_p * vector_c
    sizes = [size // vector_p, width // vector_p, inputs // vector_c]
    strides = [n // both, c // vector_p, h // both, w // vector_c]
    constants = {"ROWS": height > 1, "VECTOR_P": vector_p, "VECTOR_C": vector_c}
    return sizes, strides, constants | tile(batch * size, inputs)


def tile(positions: int, inputs: int) -> dict[str, int]:
    """Of half a word's channels, or fewer, and of no more positions than there are."""
    block = min(triton.next_power_of_2(inputs), HALF)
    rows = min(ELEMENTS // block, 1024, triton.next_power_of_2(positions))
    return {"BLOCK_P": max(rows, 16), "BLOCK_C": block, "WORD": WORD if inputs > HALF else HALF, "HALF": HALF}


def _check(input: Tensor, shift: Tensor | None, groups: int) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    if input.dtype not in SUMS:
        raise TypeError(f"pack_signs: the Triton kernels take float16, bfloat16 and float32, got {input.dtype}")
    if input.dim() != 4 or groups < 1 or input.shape[1] < 1 or input.shape[1] % groups:
        raise ValueError(
            f"pack_signs: input must be (N, C, H, W) with C a multiple of {groups}, got shape {tuple(input.shape)}"
        )
    if input.shape[2] * input.shape[3] > MOST:
        raise ValueError(f"pack_signs: input must have at most {MOST} positions an image, got {tuple(input.shape)}")
    if shift is not None and (shift.dtype != input.dtype or tuple(shift.shape) != (input.shape[1],)):
        raise ValueError(
            f"pack_signs: shift must be {input.dtype} of shape ({input.shape[1]},), got {shift.dtype} of shape "
            f"{tuple(shift.shape)}"
        )


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: the maps of ResNet-18's first and third stages."""
    maps = {"56 x 56": (8, 64, 56, 56), "14 x 14": (8, 256, 14, 14)}
    for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32)):
        for label, shape in maps.items():
            for last in (False, True):
                format = torch.channels_last if last else torch.contiguous_format
                input = torch.empty(shape, dtype=dtype, device="meta", memory_format=format)
                _, strides, constants = _plan(input, shape[1])
                kinds = {"input": f"*{name}:16", "shift": f"*{name}:16", "output": "*i64:16"}
                fixed = constants | ({} if last else {"shift": None})
                named = zip(("input_n", "input_c", "input_h", "input_w"), strides, strict=True)
                fixed |= {a: 1 for a, stride in named if stride == 1}
                signature = {a: kinds.get(a, "i32") for a in _pack_kernel.arg_names if a not in fixed}
                yield _pack_kernel, f"{name} {label} {'last' if last else 'first'}", signature, fixed, OPTIONS
