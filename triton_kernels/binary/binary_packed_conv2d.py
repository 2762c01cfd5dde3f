"""Convolution of signs with signs on GPUs: exclusive or, and counting of bits.

A program owns BLOCK_P output positions, of one image or of several, and BLOCK_O output channels of a group, and walks
over the taps of the window and the words of the channels. With s the signs' positive bits and m the bits where neither
factor is zero, 64 products sum to bits(m) - 2 bits((s xor s') and m); a tap outside the image has no such bits, and
with a weight without zeros the first term is one for all output channels. Sums are whole numbers, so that no order
matters; what follows is in float32, in the order of the reference, and rounded after every operation as there.

For signs, a program owns half a word of the output, hence 32 channels of a group of the next convolution, which may lie
in several groups of this one: it then walks over these too. No program writes into another one's half.

By calculation (no GPU has measured it): counting is the limit. A multiprocessor counts 16 times 32 bits a clock, which
is 115 * 10^12 products a second on 132 of them at 1.7 GHz, and half of that where the weight has zeros.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor._window import output_sizes
from tersor.binary.binary_packed_conv2d import ACTIVATIONS, BLOCK, DTYPES, ROWS, _reference
from tersor.triton_kernels.binary._words import HALF, WORD, check_words, count_bits, pack_bits, use_assembly
from tersor.triton_kernels.binary.pack_signs import positions
from tersor.triton_kernels.quantization._fake_quantize import Case, clamp, relu

# What follows the sums is the reference's bit by bit: no contraction to fused multiply-add.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
ELEMENTS = 2048  # of a tile
PROGRAMS = 264  # wanted at the same time: two for each of an H200's multiprocessors

_SIZES = ["images", "size", "out_width", "height", "width", "groups", "words", "blocks"]
_WINDOW = ["kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]


@triton.jit
def _sums(
    signs, weight, origin, image, top, left, present, group, o,
    images, height, width, groups, words, blocks, kernel_h, kernel_w, dilation_h, dilation_w,
    PLANES: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """The whole numbers ``[BLOCK_P, BLOCK_O]`` of the output channels ``o`` of a group; others are to be ignored."""
    taps = kernel_h * kernel_w
    pixel = groups * words
    plane = images.to(tl.int64) * height * width * pixel
    weight_plane = (groups * blocks).to(tl.int64) * taps * words * 8
    known = (o >= 0) & (o // 8 < blocks)
    rows = weight + ((group * blocks + o // 8).to(tl.int64) * taps * words * 8 + o % 8)
    sums = tl.zeros([BLOCK_P, BLOCK_O], tl.int32)
    bits = tl.zeros([BLOCK_P], tl.int32)  # where no weight is zero
    image = ((image - origin).to(OFFSET) * height + top) * width + left  # [BLOCK_P], which tap 0 reads
    own = signs + (origin * height * width * pixel + group * words)
    row, column, word = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    # One loop over taps and words: of two, the inner one is unrolled by the assembler until registers spill.
    for step in range(taps * words):
        y, x = top + row * dilation_h, left + column * dilation_w
        inside = present & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = (image + (row * dilation_h * width + column * dilation_w)) * pixel
        a = tl.load(own + word + place, mask=inside, other=0)  # [BLOCK_P]
        m = tl.load(own + plane + word + place, mask=inside, other=0)
        b = tl.load(rows + step * 8, mask=known, other=0)  # [BLOCK_O]
        if PLANES == 2:
            n = tl.load(rows + weight_plane + step * 8, mask=known, other=0)
            both = m[:, None] & n[None, :]
            sums += count_bits(both, ASSEMBLY)
        else:
            both = m[:, None]
            bits += count_bits(m, ASSEMBLY)
        sums -= 2 * count_bits((a[:, None] ^ b[None, :]) & both, ASSEMBLY)
        word += 1
        column += (word == words).to(tl.int32)
        word = tl.where(word == words, 0, word)
        row += (column == kernel_w).to(tl.int32)
        column = tl.where(column == kernel_w, 0, column)
    return sums + bits[:, None]


@triton.jit
def _corner(place, out_width, stride_h, stride_w, padding_h, padding_w):
    """Where the windows of output positions begin."""
    return place // out_width * stride_h - padding_h, place % out_width * stride_w - padding_w


@triton.jit(do_not_specialize=_SIZES + _WINDOW)
def _convolve_kernel(
    signs, weight, rows, residual, output,
    images, size, out_width, height, width, groups, words, blocks, outputs,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    output_n, output_c, output_p, residual_n, residual_c, residual_h, residual_w,
    RELU: tl.constexpr, ACTIVATION: tl.constexpr, PLANES: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """``outputs`` are a group's; without ``rows`` the sums are the output."""
    tiles = (outputs + BLOCK_O - 1) // BLOCK_O
    columns = tiles * groups
    first, image, place, present = positions(images, size, BLOCK_P, columns)
    group = tl.program_id(0) % columns // tiles
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    top, left = _corner(place, out_width, stride_h, stride_w, padding_h, padding_w)
    sums = _sums(
        signs, weight, first // size, image, top, left, present, group, o,
        images, height, width, groups, words, blocks, kernel_h, kernel_w, dilation_h, dilation_w,
        PLANES, OFFSET, ASSEMBLY, BLOCK_P, BLOCK_O,
    )  # fmt: skip
    y = sums.to(tl.float32)
    real = o < outputs
    channel = group * outputs + o
    there = present[:, None] & real[None, :]
    if rows is not None:
        row = outputs * groups
        own = rows + channel
        y = tl.load(own, mask=real, other=0.0)[None, :] * y + tl.load(own + row, mask=real, other=0.0)[None, :]
        if RELU:
            y = relu(y)
        gain = tl.load(own + 2 * row, mask=real, other=0.0)[None, :]
        added = tl.load(own + 3 * row, mask=real, other=0.0)[None, :]
        if ASSEMBLY:  # one rounding, as torch's norms have
            y = tl.fma(y, tl.broadcast_to(gain, y.shape), tl.broadcast_to(added, y.shape))
        else:  # the interpreter's own rounds twice
            y = (y.to(tl.float64) * gain.to(tl.float64) + added.to(tl.float64)).to(tl.float32)
        if residual is not None:
            source = residual + image * residual_n + (place // out_width).to(tl.int64) * residual_h
            source += (place % out_width).to(tl.int64) * residual_w
            offset = channel.to(tl.int64) * residual_c
            y += tl.load(source[:, None] + offset[None, :], mask=there, other=0.0).to(tl.float32)
        if ACTIVATION == "hardtanh":
            y = clamp(y, -1.0, 1.0)
        elif ACTIVATION == "prelu":
            z = y + tl.load(own + 4 * row, mask=real, other=0.0)[None, :]
            slope = tl.load(own + 5 * row, mask=real, other=0.0)[None, :]
            y = tl.where(z > 0.0, z, slope * z) + tl.load(own + 6 * row, mask=real, other=0.0)[None, :]
    target = output + image * output_n + place.to(tl.int64) * output_p
    offset = channel.to(tl.int64) * output_c
    tl.store(target[:, None] + offset[None, :], y.to(output.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*_SIZES, *_WINDOW, "outputs", "next_outputs", "next_words", "columns"])
def _signs_kernel(
    signs, weight, thresholds, output,
    images, size, out_width, height, width, groups, words, blocks, outputs,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    next_outputs, next_words, columns,
    PLANES: tl.constexpr, OFFSET: tl.constexpr, ASSEMBLY: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """``next_outputs`` are the output channels of a group of ``next_words`` half words, ``columns`` all half words."""
    first, image, place, present = positions(images, size, BLOCK_P, columns)
    column = tl.program_id(0) % columns
    top, left = _corner(place, out_width, stride_h, stride_w, padding_h, padding_w)
    begin = column % next_words * BLOCK_O
    count = tl.minimum(next_outputs - begin, BLOCK_O)  # none in the second half of a word that has channels in one
    lane = tl.arange(0, BLOCK_O)
    channel = column // next_words * next_outputs + begin + lane
    lowest = column // next_words * next_outputs + begin
    stop = tl.where(count > 0, (lowest + count - 1) // outputs + 1, 0)
    sums = tl.zeros([BLOCK_P, BLOCK_O], tl.int32)
    for group in range(lowest // outputs, stop):
        o = channel - group * outputs
        own = _sums(
            signs, weight, first // size, image, top, left, present, group, o,
            images, height, width, groups, words, blocks, kernel_h, kernel_w, dilation_h, dilation_w,
            PLANES, OFFSET, ASSEMBLY, BLOCK_P, BLOCK_O,
        )  # fmt: skip
        sums = tl.where(((o >= 0) & (o < outputs))[None, :], own, sums)
    real = lane < count
    every = outputs * groups
    direction = tl.load(thresholds + channel, mask=real, other=0)[None, :]
    lower = tl.load(thresholds + every + channel, mask=real, other=0)[None, :]
    upper = tl.load(thresholds + 2 * every + channel, mask=real, other=0)[None, :]
    sign = direction * ((sums > upper).to(tl.int32) - (sums < lower).to(tl.int32))
    target = output + (first + tl.arange(0, BLOCK_P)) * columns + column
    tl.store(target, pack_bits(sign > 0, lane), mask=present)
    tl.store(target + images.to(tl.int64) * size * columns, pack_bits(sign != 0, lane), mask=present)


def binary_packed_conv2d(
    signs: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rows: Tensor | None,
    relu: bool,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The operator ``tersor::binary_packed_conv2d``; outputs in float64, which no caller makes, by the reference."""
    name = "binary_packed_conv2d"
    if dtype not in DTYPES:
        window = (stride, padding, dilation, rows, relu, activation, residual, dtype, channels_last)
        return _reference(signs, weight, weight_sums, channels, *window)
    shape = _check(name, signs, weight, weight_sums, channels, stride, padding, dilation)
    outputs = weight_sums.shape[0]
    if rows is not None and (rows.dtype != torch.float32 or tuple(rows.shape) != (len(ROWS), outputs)):
        raise ValueError(f"{name}: rows must be float32 ({len(ROWS)}, {outputs}), got {rows.dtype} of {rows.shape}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"{name}: residual must have shape {shape}, got {tuple(residual.shape)}")
    return convolve(
        signs, weight, weight_sums.shape, shape, (stride, padding, dilation), rows, relu, activation, residual, dtype,
        channels_last,
    )  # fmt: skip


def convolve(
    signs: Tensor,
    weight: Tensor,
    kernel: Sequence[int],
    shape: tuple[int, ...],
    window: tuple[Sequence[int], ...],
    rows: Tensor | None,
    relu: bool,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The output of ``shape``; ``kernel`` is ``(O, KH, KW)``, ``window`` the stride, the padding and the dilation."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    output = torch.empty(shape, dtype=dtype, device=signs.device, memory_format=format)
    if not output.numel():
        return output
    batch, outputs, out_height, out_width = shape
    size, groups = out_height * out_width, weight.shape[1]
    block = _block(outputs // groups)
    columns = triton.cdiv(outputs // groups, block) * groups
    constants = _constants(signs, weight, shape, block, columns)
    grid = (triton.cdiv(batch * size, constants["BLOCK_P"]) * columns,)
    tensors = (
        signs.contiguous(), weight.contiguous(), None if rows is None else rows.contiguous(),
        None if rows is None else residual, output,
    )  # fmt: skip
    strides = [output.stride(0), output.stride(1), outputs if channels_last else 1]
    strides += [0, 0, 0, 0] if residual is None else residual.stride()
    constants |= {"RELU": relu, "ACTIVATION": activation} if rows is not None else {"RELU": False, "ACTIVATION": "none"}
    sizes = _sizes(signs, weight, shape)
    with torch.cuda.device_of(signs):
        _convolve_kernel[grid](
            *tensors, *sizes, outputs // groups, *kernel[1:], *_flat(window), *strides, **constants, **OPTIONS
        )  # fmt: skip
    return output


def binary_packed_conv2d_signs(
    signs: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    thresholds: Tensor,
    groups: int,
) -> Tensor:
    """The operator ``tersor::binary_packed_conv2d_signs``."""
    name = "binary_packed_conv2d_signs"
    shape = _check(name, signs, weight, weight_sums, channels, stride, padding, dilation)
    batch, outputs, out_height, out_width = shape
    if thresholds.dtype != torch.int32 or tuple(thresholds.shape) != (3, outputs):
        given = f"{thresholds.dtype} of {tuple(thresholds.shape)}"
        raise ValueError(f"{name}: thresholds must be int32 (3, {outputs}), got {given}")
    if groups < 1 or outputs % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({outputs}), got {groups}")
    words = triton.cdiv(outputs // groups, WORD)
    output = signs.new_empty((2, batch, out_height, out_width, groups, words))
    if output.numel():
        columns = groups * words * (WORD // HALF)
        constants = _constants(signs, weight, shape, HALF, columns)
        grid = (triton.cdiv(batch * out_height * out_width, constants["BLOCK_P"]) * columns,)
        tensors = (signs.contiguous(), weight.contiguous(), thresholds.contiguous(), output.view(torch.int32))
        sizes = (*_sizes(signs, weight, shape), outputs // weight.shape[1])
        window = (*weight_sums.shape[1:], *stride, *padding, *dilation)
        with torch.cuda.device_of(signs):
            _signs_kernel[grid](
                *tensors, *sizes, *window, outputs // groups, columns // groups, columns, **constants, **OPTIONS
            )  # fmt: skip
    return output


def _block(outputs: int) -> int:
    return min(max(triton.next_power_of_2(outputs), 8), 64)


def _flat(window: tuple[Sequence[int], ...]) -> list[int]:
    return [n for pair in window for n in pair]


def _sizes(signs: Tensor, weight: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """In the order of ``_SIZES``."""
    _, batch, height, width, groups, words = signs.shape
    return batch, shape[2] * shape[3], shape[3], height, width, groups, words, weight.shape[2]


def _tile(shape: tuple[int, ...], block_o: int, columns: int, wanted: int) -> dict[str, int]:
    """2048 sums, 8 a thread, of up to 64 positions; of fewer where there are fewer programs than ``wanted`` otherwise.

    ``columns`` programs have the same positions. With 16 sums a thread the assembler takes all of the 255 registers.
    """
    positions, block_p = shape[0] * shape[2] * shape[3], min(ELEMENTS // block_o, 64)
    while block_p > 16 and triton.cdiv(positions, block_p) * columns < wanted:
        block_p //= 2
    return {"BLOCK_P": block_p, "BLOCK_O": block_o}


def _constants(signs: Tensor, weight: Tensor, shape: tuple[int, ...], block_o: int, columns: int) -> dict[str, Any]:
    """The tile, and how the places of words are counted within the images that a program has a part of."""
    tile = _tile(shape, block_o, columns, PROGRAMS if signs.is_cuda else 1)  # the interpreter takes 0.1 s a program
    images = tile["BLOCK_P"] // (shape[2] * shape[3]) + 2
    offset = tl.int32 if images * signs[0, :1].numel() < 2**31 else tl.int64
    return tile | {"PLANES": weight.shape[0], "OFFSET": offset, "ASSEMBLY": use_assembly()}


def _check(
    where: str,
    signs: Tensor,
    weight: Tensor,
    sums: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The output's shape; refuses what a kernel would answer with a read outside a tensor, or not at all."""
    check_words(where, signs)
    if weight.dtype != torch.int64 or weight.dim() != 7 or weight.shape[0] not in (1, 2) or weight.shape[6] != BLOCK:
        raise ValueError(f"{where}: weight must be int64 blocks of 8, got {weight.dtype} of {tuple(weight.shape)}")
    _, groups, blocks, kernel_h, kernel_w, words, _ = weight.shape
    if signs.shape[4:] != (groups, words) or triton.cdiv(channels, WORD) != words:
        raise ValueError(
            f"{where}: signs and weight must have {groups} groups of {channels} channels, "
            f"got shapes {tuple(signs.shape)} and {tuple(weight.shape)}"
        )
    outputs = sums.shape[0]
    if tuple(sums.shape) != (outputs, kernel_h, kernel_w) or outputs % groups:
        raise ValueError(f"{where}: weight_sums must be (O, {kernel_h}, {kernel_w}), got {tuple(sums.shape)}")
    if triton.cdiv(outputs // groups, BLOCK) != blocks:
        raise ValueError(f"{where}: weight must have blocks for {outputs} channels, got {tuple(weight.shape)}")
    _, batch, height, width, _, _ = signs.shape
    sizes = output_sizes((batch, channels, height, width), (kernel_h, kernel_w), stride, padding, dilation)
    if min(sizes) < 1:
        raise ValueError(f"{where}: signs must be as large as the window, got shape {tuple(signs.shape)}")
    return batch, outputs, *sizes


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: ResNet-18's layers of 64 and 512 channels."""
    vectors = ("output_n", "output_c", "outputs", "residual_n", "residual_h", "residual_w")
    tensors = {"signs": "*i64:16", "weight": "*i64:16", "rows": "*fp32:16", "thresholds": "*i32:16"}
    for channels, images, size in ((64, 32, 56), (512, 8, 7)):
        shape = (images, channels, size, size)
        for planes in (1, 2):
            own: dict[str, Any] = {"PLANES": planes, "OFFSET": tl.int32, "ASSEMBLY": True}
            label = f"{channels} channels, {planes} planes"
            ends: dict[str, dict[str, Any]] = {
                "sums fp32": {"rows": None, "residual": None, "ACTIVATION": "none", "RELU": False},
                "prelu fp16": {"ACTIVATION": "prelu", "RELU": True, "residual_c": 1},
                "hardtanh fp32": {"ACTIVATION": "hardtanh", "RELU": False, "residual": None},
            }
            for end, more in ends.items():
                tile = _tile(shape, _block(channels), channels // _block(channels), PROGRAMS)
                constants = own | tile | more | {"output_c": 1}
                kinds = tensors | dict.fromkeys(("output", "residual"), f"*{end.split()[1]}:16")
                kinds |= dict.fromkeys(vectors, "i32:16")
                signature = {a: kinds.get(a, "i32") for a in _convolve_kernel.arg_names if a not in constants}
                yield _convolve_kernel, f"{end}, {label}", signature, constants, OPTIONS
            constants = own | _tile(shape, HALF, channels // HALF, PROGRAMS)
            kinds = tensors | {"output": "*i32:16"}
            signature = {a: kinds.get(a, "i32") for a in _signs_kernel.arg_names if a not in constants}
            yield _signs_kernel, label, signature, constants, OPTIONS
