"""The weight gradient of a convolution in the listed tiles, on GPUs: a matrix product per tile and tap of the window.

A program owns up to 64 output and 64 input channels of a tile, and one tap, and walks over the output pixels; a pixel
whose tap lies outside the image gives 0. Channels have to be neighbours in memory: tensors that are not channels-last
are copied, as the libraries of convolutions do it too. Where there are too few tiles to fill a GPU, several programs
share the pixels, and one more launch adds up their float32 sums in a fixed order: no atomics, at most 17 MiB.

With e = bytes of an element, a program reads 128 e bytes per pixel, from the second level's cache as a rule, for 8192
operations. A linear layer is a 1 x 1 convolution of one image of one row, and runs the same kernels.
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

from tersor.freezing.mask import check_mask
from tersor.triton_kernels.freezing.zero_frozen import zero_in_place
from tersor.triton_kernels.quantization._fake_quantize import SUMS, Case

PROGRAMS = 528  # wanted at the same time: four for each of an H200's multiprocessors
STEPS = 8  # of BLOCK_P pixels, at least, in a program that shares the pixels with others
BLOCK = 64  # channels; 64 x 64 sums are 32 registers a thread
# Nothing is exact here, so multiplications and additions are contracted.
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}

# Never specialised, so that other sizes do not compile anew; what the loads must know of alignment is in VECTOR.
_TILE = ["outputs", "inputs", "taps", "tile_rows", "tile_columns"]
_WINDOW = ["height", "width", "out_pixels", "out_width", "kernel_w", "stride_h", "stride_w"]
_WINDOW += ["padding_h", "padding_w", "dilation_h", "dilation_w"]


@triton.jit
def _own(tiles, outputs, inputs, taps, tile_rows, tile_columns, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The program's tap, output channels and input channels, and which of these are the tile's and the weight's."""
    program = tl.program_id(0)
    tap = program % taps
    program = program // taps
    tile_rows = tile_rows // VECTOR[0] * VECTOR[0]  # which tells the compiler what divides them
    tile_columns = tile_columns // VECTOR[1] * VECTOR[1]
    across = tl.cdiv(tile_columns, BLOCK[1])
    own_column = program % across * BLOCK[1] + tl.arange(0, BLOCK[1])
    program = program // across
    down = tl.cdiv(tile_rows, BLOCK[0])
    own_row = program % down * BLOCK[0] + tl.arange(0, BLOCK[0])
    tile = tl.load(tiles + program // down)  # the row in the lower half, the column in the upper
    row, column = (tile & 0xFFFFFFFF) * tile_rows + own_row, (tile >> 32) * tile_columns + own_column
    has_row = (own_row < tile_rows) & (row < outputs // VECTOR[0] * VECTOR[0])
    has_column = (own_column < tile_columns) & (column >= 0) & (column < inputs // VECTOR[1] * VECTOR[1])
    return tap, row, has_row, column, has_column


@triton.jit
def _store(grad_weight, sums, tap, row, has_row, column, has_column, inputs, taps):
    place = (row[:, None] * inputs + column[None, :]) * taps + tap
    tl.store(grad_weight + place, sums.to(grad_weight.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _partial(partials, part, BLOCK: tl.constexpr):
    """Where this program's sums of a part of the pixels lie, ``[BLOCK[0], BLOCK[1]]``."""
    first = (tl.cast(part, tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (BLOCK[0] * BLOCK[1])
    return partials + first + tl.arange(0, BLOCK[0])[:, None] * BLOCK[1] + tl.arange(0, BLOCK[1])[None, :]


@triton.jit(do_not_specialize=[*_TILE, *_WINDOW, "pixels", "chunk"])
def _product_kernel(
    grad_output, input, tiles, target,
    outputs, inputs, taps, tile_rows, tile_columns, pixels, chunk,
    height, width, out_pixels, out_width, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    WINDOW: tl.constexpr, PARTIAL: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``target`` is the gradient, or for PARTIAL sums ``(parts, programs, *BLOCK)``. Without WINDOW, a linear layer."""
    tap, row, has_row, column, has_column = _own(tiles, outputs, inputs, taps, tile_rows, tile_columns, VECTOR, BLOCK)
    outputs = outputs.to(tl.int64) // VECTOR[0] * VECTOR[0]
    inputs = inputs.to(tl.int64) // VECTOR[1] * VECTOR[1]
    if WINDOW:
        down = tap // kernel_w * dilation_h - padding_h
        right = tap % kernel_w * dilation_w - padding_w
    sums = tl.zeros([BLOCK[0], BLOCK[1]], tl.float32)
    begin = tl.program_id(1).to(pixels.dtype) * chunk
    end = tl.minimum(begin + chunk, pixels)
    for first in range(begin, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        inside = pixel < end
        place = pixel.to(tl.int64)
        g = tl.load(
            grad_output + place[None, :] * outputs + row[:, None], mask=inside[None, :] & has_row[:, None], other=0.0
        )
        if WINDOW:
            y = pixel % out_pixels // out_width * stride_h + down
            x = pixel % out_width * stride_w + right
            inside = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            place = ((pixel // out_pixels).to(tl.int64) * height + y) * width + x
        v = tl.load(
            input + place[:, None] * inputs + column[None, :], mask=inside[:, None] & has_column[None, :], other=0.0
        )
        sums = tl.dot(g, v, acc=sums, input_precision="ieee")
    if PARTIAL:
        tl.store(_partial(target, tl.program_id(1), BLOCK), sums)
    else:
        _store(target, sums, tap, row, has_row, column, has_column, inputs, taps)


@triton.jit(do_not_specialize=[*_TILE, "parts"])
def _sum_kernel(
    partials, tiles, grad_weight, parts, outputs, inputs, taps, tile_rows, tile_columns,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tap, row, has_row, column, has_column = _own(tiles, outputs, inputs, taps, tile_rows, tile_columns, VECTOR, BLOCK)
    sums = tl.zeros([BLOCK[0], BLOCK[1]], tl.float32)
    for part in range(parts):
        sums += tl.load(_partial(partials, part, BLOCK))
    _store(grad_weight, sums, tap, row, has_row, column, has_column, inputs, taps)


def frozen_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    frozen: Tensor | None,
    tiles: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile_rows: int,
    tile_columns: int,
) -> Tensor:
    """The operator ``tersor::frozen_conv2d_backward`` for float16, bfloat16 and float32."""
    name = "frozen_conv2d"
    if grad_output.dim() != 4 or input.dim() != 4:
        given = f"shapes {tuple(grad_output.shape)} and {tuple(input.shape)}"
        raise ValueError(f"{name}: grad_output and input must be (N, O, H', W') and (N, C, H, W), got {given}")
    height, width = input.shape[2:]
    batch, outputs, *out = grad_output.shape
    windows = zip((height, width), kernel_size, stride, padding, dilation, strict=True)
    expected = [input.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows)]
    if [batch, *out] != expected:
        raise ValueError(f"{name}: grad_output must have N, H' and W' {expected}, got {[batch, *out]}")
    shape = outputs, input.shape[1], *kernel_size
    grad_weight = torch.zeros(shape, dtype=input.dtype, device=input.device)
    window = height, width, out[0] * out[1], out[1], kernel_size[1], *stride, *padding, *dilation
    g, x = (t.permute(0, 2, 3, 1).contiguous().view(-1, t.shape[1]) for t in (grad_output, input))
    compute(name, g, x, frozen, tiles, (tile_rows, tile_columns), grad_weight, window)
    return grad_weight


def compute(
    where: str,
    grad_output: Tensor,
    input: Tensor,
    frozen: Tensor | None,
    tiles: Tensor,
    tile: tuple[int, int],
    grad_weight: Tensor,
    window: Sequence[int] | None = None,
) -> None:
    """Writes the listed tiles of ``grad_weight``, which is all zeros.

    Args:
        where: the operator, for messages.
        grad_output: contiguous ``(output pixels, O)``.
        input: contiguous ``(input pixels, C)``.
        grad_weight: contiguous ``(O, C, ...)``.
        window: values of the arguments in ``_WINDOW``; None for a linear layer, whose pixels are the tokens.
    """
    outputs, inputs = grad_weight.shape[:2]
    if input.dtype not in SUMS:
        raise TypeError(f"{where}: the Triton kernels take float16, bfloat16 and float32, got {input.dtype}")
    if tiles.dim() != 2 or tiles.shape[1] != 2 or min(tile) < 1:
        given = f"shape {tuple(tiles.shape)} and {tile}"
        raise ValueError(f"{where}: tiles must be (count, 2) of sizes of at least 1, got {given}")
    if frozen is not None:
        check_mask(where, frozen, grad_weight.shape, grad_weight.device)
    if not (grad_output.numel() and input.numel() and grad_weight.numel() and len(tiles)):
        return
    if grad_output.dtype != input.dtype:
        grad_output, input = grad_output.float(), input.float()
    pixels, taps = len(grad_output), grad_weight.numel() // (outputs * inputs)
    tile = min(tile[0], outputs), min(tile[1], inputs)
    constants, block_p = _constants(outputs, inputs, tile, input.element_size())
    block = constants["BLOCK"]
    programs = len(tiles) * triton.cdiv(tile[0], block[0]) * triton.cdiv(tile[1], block[1]) * taps
    steps = triton.cdiv(pixels, block_p)
    chunk = triton.cdiv(steps, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(steps, STEPS))) * block_p
    parts = triton.cdiv(pixels, chunk)
    sizes = outputs, inputs, taps, *tile
    pairs = tiles.to(torch.int32).reshape(-1).contiguous()
    pairs = (pairs.clone() if pairs.storage_offset() % 2 else pairs).view(torch.int64)
    target = grad_weight
    if parts > 1:
        target = torch.empty((parts, programs, *block), dtype=torch.float32, device=input.device)
    own = {"WINDOW": window is not None, "PARTIAL": parts > 1, "BLOCK_P": block_p}
    rest = [0] * len(_WINDOW) if window is None else window
    with torch.cuda.device_of(input):
        _product_kernel[(programs, parts)](
            grad_output, input, pairs, target, *sizes, pixels, chunk, *rest, **own, **constants, **OPTIONS
        )
        if parts > 1:
            _sum_kernel[(programs,)](target, pairs, grad_weight, parts, *sizes, **constants, **OPTIONS)
    if frozen is not None:
        zero_in_place(grad_weight, frozen)


def _constants(outputs: int, inputs: int, tile: tuple[int, int], itemsize: int) -> tuple[dict[str, Any], int]:
    """The kernels' constants, and the pixels of a step: 64 of half precision, fewer where addresses spill registers."""
    block = [min(max(triton.next_power_of_2(size), 16), BLOCK) for size in tile]
    vector = [math.gcd(16 // itemsize, *sizes) for sizes in zip((outputs, inputs), tile, strict=True)]
    narrow = min(vector)
    block_p = 16 * min(narrow, 4) if itemsize == 2 else 16 if narrow == 4 else 8
    return {"VECTOR": tuple(vector), "BLOCK": tuple(block)}, block_p


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        kinds = dict.fromkeys(("grad_output", "input", "grad_weight"), f"*{name}:16")
        kinds |= {"tiles": "*i64:16", "partials": "*fp32:16"}
        labels = {"window": (True, False), "linear": (False, False), "window in parts": (True, True)}
        for size, label in ((16, "window"), *((64, label) for label in labels)):
            constants, block_p = _constants(512, 512, (size, size), itemsize)
            window, partial = labels[label]
            fixed = constants | {"WINDOW": window, "PARTIAL": partial, "BLOCK_P": block_p}
            own = kinds | {"target": "*fp32:16" if partial else f"*{name}:16"}
            signature = {a: own.get(a, "i32") for a in _product_kernel.arg_names if a not in fixed}
            yield _product_kernel, f"{label} {size} {name}", signature, fixed, OPTIONS
        signature = {a: kinds.get(a, "i32") for a in _sum_kernel.arg_names if a not in constants}
        yield _sum_kernel, name, signature, constants, OPTIONS
