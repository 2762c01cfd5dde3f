"""Weight quantisation that freezes what has settled, on GPUs: one pass over weight and state in each direction.

Bytes per element that move, for a weight of u bytes:

========  ==============================================================================================
forward   without a schedule 2u; with one 2u + 10, the distance and the code being read and written
blocks    u + 5 more, read before, to count their elements within the threshold
backward  3u
saved     u more where an octet of elements is all free, 2u where some are frozen; backward u where some are
mask      1/8 read and 1/8 written, with a schedule 1/8 more; backward 1/8
========  ==============================================================================================

The step lies on the device, and no launch may change it while another program may still read it: a last launch, of one
program, counts it on and adds up what each program has frozen. Where whole blocks freeze this launch lies between the
counting and the pass, decides, and knows from the count what will freeze; the pass goes by its decisions.
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

from tersor.quantization.fake_quantize_bounds import check_bounds
from tersor.triton_kernels.freezing._octets import (
    cases,
    check,
    in_place,
    launch,
    load_bytes,
    octets,
    pack,
    store_bytes,
    unpack,
    whole_words,
)
from tersor.triton_kernels.quantization._fake_quantize import (
    ELEMENTS,
    KINDS,
    OPTIONS,
    SUMS,
    WORD,
    Case,
    _sums,
    clamp,
    round_half_even,
)

PROGRAMS = 528  # that count blocks: four for each of an H200's multiprocessors
WIDTH = 1024  # counts that are read at once
_HALF_PI = tl.constexpr(math.pi / 2)
_HALF_PI_REST = tl.constexpr(6.123233995736766e-17)  # pi / 2 less its float64

_NUMBERS = ["levels", "new_share", "old_share", "reset", "threshold"]
_STEPS = ["warmup", "span"]
_BLOCKS = ["columns", "block_rows", "block_columns", "across"]


@triton.jit
def _sine(x):
    """Of a float64. The library's takes 40 bytes of stack, for arguments that do not occur."""
    turns = tl.floor(x / _HALF_PI + 0.5)
    rest = (x - turns * _HALF_PI) - turns * _HALF_PI_REST
    square = rest * rest
    odd = square * 0.0 + 1.0
    even = odd
    for i in tl.static_range(9):  # Taylor's series to the 18th power: 1e-19 at pi / 4
        even = 1.0 - square * even * (1.0 / ((17 - 2 * i) * (18 - 2 * i)))
        odd = 1.0 - square * odd * (1.0 / ((18 - 2 * i) * (19 - 2 * i)))
    quarter = turns.to(tl.int64) & 3
    value = tl.where((quarter & 1) == 1, even, rest * odd)
    return tl.where(quarter > 1, -value, value)


@triton.jit
def _limit(step, threshold, levels, warmup, span, GROWTH: tl.constexpr):
    """The threshold of this step, in float64 until the end, or ``threshold``; in the warm-up below any distance."""
    limit = threshold
    if GROWTH != "fixing":
        part = (step - warmup).to(tl.float64) / span.to(tl.float64)
        if GROWTH == "sine":
            part = _sine(part * _HALF_PI)
        limit = (part / tl.cast(levels, tl.float64)).to(tl.float32)
    return tl.where(step > warmup, limit, float("-inf"))


@triton.jit
def _effective(weight, saved, place, present, bytes, still):
    """The saved weight where frozen, else the weight; ``saved`` may be None."""
    if saved is None:
        x = tl.load(weight + place, mask=present, other=0.0)
    else:
        x = tl.load(weight + place, mask=present & (bytes != 255)[:, None], other=0.0)
        x = tl.where(still, tl.load(saved + place, mask=present & (bytes != 0)[:, None], other=0.0), x)
    return x


@triton.jit
def _quantize(x, lower, upper, levels):
    """Place between the bounds, and level as a whole number."""
    low, high = tl.load(lower), tl.load(upper)
    place = tl.div_rn(x.to(tl.float32) - low, high - low)
    return place, round_half_even(clamp(place, 0.0, 1.0) * levels)


@triton.jit
def _move_on(place, level, levels, distance, code, step, new_share, old_share, reset):
    """The new distance and code; ``step`` is the one before."""
    away = tl.abs(place - tl.div_rn(level, levels))
    new_code = tl.where(level == level, level, 0.0).to(tl.int32)  # NaN has no code, and has moved
    moved = (new_code != code.to(tl.int32)) | (level != level)
    running = new_share * away + old_share * distance
    running = tl.where(moved, reset, running)
    return tl.where(step == 0, away, running), new_code


@triton.jit(do_not_specialize=[*_STEPS, *_BLOCKS, "size"])
def _forward_kernel(
    weight, saved, lower, upper, distance, code, frozen, counters, frozen_step, settled, output, frozen_before, counts,
    levels, new_share, old_share, reset, threshold, warmup, span, columns, block_rows, block_columns, across, size,
    UPDATE: tl.constexpr, GROWTH: tl.constexpr, FREEZES: tl.constexpr, VECTOR: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """What FREEZES together: an ``"element"``, or a block, of which ``"octets"`` are whole parts or ``"parts"`` not."""
    start, offsets, present = octets(size, VECTOR, OCTETS)
    bytes = load_bytes(frozen, start, size, OCTETS)
    store_bytes(frozen_before, start, size, bytes, OCTETS)
    still = unpack(bytes)
    x = _effective(weight, saved, start + offsets, present, bytes, still)
    if saved is not None:
        tl.store(saved + start + offsets, x, mask=present & (bytes != 255)[:, None])
    place, level = _quantize(x, lower, upper, levels)
    y = (tl.div_rn(level, levels) - 0.5) * 2.0
    tl.store(output + start + offsets, y.to(output.dtype.element_ty), mask=present)
    if UPDATE:
        step = tl.load(counters)
        if FREEZES != "element":
            step -= 1  # the deciding launch has counted it on
        old_distance = tl.load(distance + start + offsets, mask=present, other=0.0)
        old_code = tl.load(code + start + offsets, mask=present, other=0)
        new_distance, new_code = _move_on(
            place, level, levels, old_distance, old_code, step, new_share, old_share, reset
        )
        tl.store(distance + start + offsets, new_distance, mask=present)
        tl.store(code + start + offsets, new_code.to(tl.uint8), mask=present)
        if FREEZES == "element":
            within = new_distance <= _limit(step + 1, threshold, levels, warmup, span, GROWTH)
        elif FREEZES == "octets":
            octet = (start + tl.arange(0, OCTETS) * 8).to(size.dtype)  # the GPU has no 64-bit division
            block = octet // columns // block_rows * across + octet % columns // block_columns
            within = (tl.load(settled + block, mask=start + tl.arange(0, OCTETS) * 8 < size, other=0) != 0)[:, None]
        else:
            element = (start + offsets).to(size.dtype)
            block = element // columns // block_rows * across + element % columns // block_columns
            within = tl.load(settled + block, mask=present, other=0) != 0
        new = present & within & (still == 0)
        store_bytes(frozen, start, size, bytes | pack(new), OCTETS)
        if frozen_step is not None:
            tl.store(frozen_step + start + offsets, (step + 1).to(tl.int32), mask=new)
        if FREEZES == "element":
            tl.store(counts + tl.program_id(0), tl.sum(tl.sum(new.to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=[*_STEPS, *_BLOCKS, "rows", "padded"])
def _count_kernel(
    weight, saved, lower, upper, distance, code, frozen, counters, counts,
    levels, new_share, old_share, reset, threshold, warmup, span,
    columns, block_rows, block_columns, across, rows, padded,
    GROWTH: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """How many elements of a block will be within the threshold, and how many are free, in one of several parts of it.

    ``counts`` is ``(2, parts, padded)``: the blocks lie side by side. In the warm-up nothing is read.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(1)
    columns = columns // VECTOR * VECTOR  # which tells the compiler what divides them
    block_columns = block_columns // VECTOR * VECTOR
    first_row = block // across * block_rows
    first_column = block % across * block_columns
    step = tl.load(counters)
    limit = _limit(step + 1, threshold, levels, warmup, span, GROWTH)
    wide = tl.cdiv(block_columns, COLUMNS)
    tiles = tl.where(step + 1 > warmup, tl.cdiv(block_rows, ROWS) * wide, 0)
    within = tl.zeros([ROWS, COLUMNS], tl.int32)
    free = tl.zeros([ROWS, COLUMNS], tl.int32)
    for tile in range(part, tiles, parts):
        r = tile // wide * ROWS + tl.arange(0, ROWS)[:, None]
        c = tile % wide * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        present = (r < block_rows) & (first_row + r < rows) & (c < block_columns) & (first_column + c < columns)
        place = (first_row + r).to(tl.int64) * columns + first_column + c
        bytes = tl.load(frozen + (place >> 3), mask=present, other=0).to(tl.int32)
        still = ((bytes >> (place & 7).to(tl.int32)) & 1) != 0
        x = tl.load(weight + place, mask=present, other=0.0)
        if saved is not None:
            x = tl.where(still, tl.load(saved + place, mask=present, other=0.0), x)
        old_distance = tl.load(distance + place, mask=present, other=0.0)
        old_code = tl.load(code + place, mask=present, other=0)
        place_between, level = _quantize(x, lower, upper, levels)
        new_distance, _ = _move_on(
            place_between, level, levels, old_distance, old_code, step, new_share, old_share, reset
        )
        within += (present & (new_distance <= limit)).to(tl.int32)
        free += (present & (still == 0)).to(tl.int32)
    own = counts + part.to(tl.int64) * padded + block
    tl.store(own, tl.sum(tl.sum(within, axis=1), axis=0))
    tl.store(own + parts.to(tl.int64) * padded, tl.sum(tl.sum(free, axis=1), axis=0))


@triton.jit(do_not_specialize=["count", "words", "parts", "across", "down", "whole", "right", "bottom", "corner"])
def _settle_kernel(
    counters, counts, settled, count, words, parts, across, down, whole, right, bottom, corner,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Counts the step on and adds up what freezes; of BLOCKS, decides which do.

    ``whole`` to ``corner`` are the least counts that freeze a block, in the last row and column of smaller ones.
    """
    padded = words * WORD
    total = tl.zeros([WIDTH], tl.int64)
    for begin in range(0, padded, WIDTH):
        own = begin + tl.arange(0, WIDTH)
        if BLOCKS:
            within = tl.zeros([WIDTH], tl.int64)
            free = tl.zeros([WIDTH], tl.int64)
            for part in range(parts):
                row = counts + tl.cast(part, tl.int64) * padded + own
                within += tl.load(row, mask=own < padded, other=0)
                free += tl.load(row + tl.cast(parts, tl.int64) * padded, mask=own < padded, other=0)
            last = own % across == across - 1
            least = tl.where(own // across == down - 1, tl.where(last, corner, bottom), tl.where(last, right, whole))
            enough = (within >= least) & (own < count)
            tl.store(settled + own, enough.to(tl.uint8), mask=own < padded)
            total += tl.where(enough, free, 0)
        else:
            total += tl.load(counts + own, mask=own < padded, other=0)
    tl.store(counters, tl.load(counters) + 1)
    tl.store(counters + 1, tl.load(counters + 1) + tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    grad_output, weight, saved, lower, upper, frozen, grad_weight, partials, size,
    VECTOR: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """``partials`` is ``(2, programs)``: what this program's elements give to each bound."""
    start, offsets, present = octets(size, VECTOR, OCTETS)
    bytes = load_bytes(frozen, start, size, OCTETS)
    still = unpack(bytes)
    low, high = tl.load(lower), tl.load(upper)
    g = tl.load(grad_output + start + offsets, mask=present, other=0.0).to(tl.float32)  # 0 beyond the end gives 0
    x = _effective(weight, saved, start + offsets, present, bytes, still).to(tl.float32)
    place = tl.div_rn(x - low, high - low)
    grad = tl.where((place >= 0.0) & (place <= 1.0), tl.div_rn(g * 2.0, high - low), 0.0)
    place = clamp(place, 0.0, 1.0)  # one far outside would make 0 * inf
    tl.store(grad_weight + start + offsets, tl.where(still, 0.0, grad).to(grad_weight.dtype.element_ty), mask=present)
    kind = partials.dtype.element_ty
    own = partials + tl.program_id(0)
    tl.store(own, tl.sum(tl.sum((grad * (place - 1.0)).to(kind), axis=1), axis=0))
    tl.store(own + tl.num_programs(0), tl.sum(tl.sum((-grad * place).to(kind), axis=1), axis=0))


def lts_quantize_forward(
    weight: Tensor,
    lower: Tensor,
    upper: Tensor,
    distance: Tensor,
    code: Tensor,
    frozen: Tensor,
    counters: Tensor,
    saved: Tensor | None,
    frozen_step: Tensor | None,
    bits: int,
    update: bool,
    growth: str,
    rate: float,
    momentum: float,
    warmup: int,
    total: int,
    block_rows: int,
    block_columns: int,
    quantile: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::lts_quantize_forward`` for float16, bfloat16 and float32."""
    _check(weight, lower, upper, frozen, distance=distance, code=code, saved=saved, frozen_step=frozen_step)
    output = torch.empty_like(weight, memory_format=torch.contiguous_format)
    before = torch.empty_like(frozen, memory_format=torch.contiguous_format)
    levels, size = 2**bits - 1, weight.numel()
    numbers = float(levels), 1 - momentum, momentum, 1 / levels, rate / levels, warmup, total - warmup
    growing: dict[str, Any] = {"GROWTH": growth}
    with in_place(distance, code, frozen, counters, saved, frozen_step) as (d, c, f, n, s, at):
        assert n is not None
        inputs = weight.contiguous(), s, lower, upper, d, c, f, n
        programs, settled, counts = whole_words(size), None, None
        blocks, freezes = (1, 1, 1, 1), "element"
        if update and size and (block_rows, block_columns) != (1, 1):
            columns = size // weight.shape[0]
            width = min(block_columns, columns)
            blocks = columns, min(block_rows, weight.shape[0]), width, triton.cdiv(columns, width)
            freezes = "octets" if columns % 8 == 0 and width % 8 == 0 else "parts"
            settled = _settled_blocks(inputs, numbers, growing, blocks, weight.shape[0], quantile)
        elif update:
            counts = torch.empty(programs, dtype=torch.int32, device=weight.device)
        tensors = *inputs, at, settled, output, before, counts
        constants = growing | {"UPDATE": update, "FREEZES": freezes}
        launch(_forward_kernel, size, *tensors, *numbers, *blocks, programs=programs, **constants)
        if update and settled is None:
            _settle(n, counts, None, programs, 1, 1, 1, (0, 0, 0, 0))
    return output, before


def _settled_blocks(
    inputs: tuple[Any, ...],
    numbers: tuple[Any, ...],
    growing: dict[str, Any],
    blocks: tuple[int, int, int, int],
    rows: int,
    quantile: float,
) -> Tensor:
    """Counts in blocks and decides, one byte each; the step and the count of the frozen move on."""
    columns, block_rows, block_columns, across = blocks
    down, counters = triton.cdiv(rows, block_rows), inputs[-1]
    tile = _count_tile(columns, block_rows, block_columns)
    tiles = triton.cdiv(block_rows, tile["ROWS"]) * triton.cdiv(block_columns, tile["COLUMNS"])
    padded = triton.cdiv(down * across, WORD) * WORD
    parts = min(triton.cdiv(PROGRAMS, padded), tiles)
    counts = torch.empty((2, parts, padded), dtype=torch.int32, device=counters.device)
    settled = torch.empty(padded, dtype=torch.uint8, device=counters.device)
    with torch.cuda.device_of(counters):
        _count_kernel[(padded, parts)](*inputs, counts, *numbers, *blocks, rows, padded, **growing, **tile, **OPTIONS)
    heights = block_rows, rows - (down - 1) * block_rows
    widths = block_columns, columns - (across - 1) * block_columns
    # A count is a whole number, hence at least the bound as soon as it is at least the next whole number.
    least = [math.ceil(quantile * (height * width)) for height in heights for width in widths]
    _settle(counters, counts, settled, down * across, parts, across, down, least)
    return settled


def _settle(
    counters: Tensor, counts: Any, settled: Any, count: int, parts: int, across: int, down: int, least: Any
) -> None:
    constants = {"BLOCKS": settled is not None, "WIDTH": WIDTH, "WORD": WORD}
    with torch.cuda.device_of(counters):
        numbers = count, triton.cdiv(count, WORD), parts, across, down, *least
        _settle_kernel[(1,)](counters, counts, settled, *numbers, **constants, **OPTIONS)


def _count_tile(columns: int, block_rows: int, block_columns: int) -> dict[str, int]:
    """At most ELEMENTS in a tile; 64 columns of 32 rows are 256 bytes of the distances in a piece."""
    rows = min(triton.next_power_of_2(block_rows), 32)
    width = min(triton.next_power_of_2(block_columns), ELEMENTS // rows)
    return {"VECTOR": math.gcd(columns, block_columns, 8), "ROWS": rows, "COLUMNS": width}


def lts_quantize_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor | None, lower: Tensor, upper: Tensor, frozen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::lts_quantize_backward`` for float16, bfloat16 and float32; no atomics."""
    _check(weight, lower, upper, frozen, grad_output=grad_output, saved=saved)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    programs = whole_words(weight.numel())
    partials = torch.empty((2, 1, 1, programs), dtype=SUMS[weight.dtype], device=weight.device)
    sources = [None if t is None else t.contiguous() for t in (grad_output, weight, saved)]
    tensors = *sources, lower, upper, frozen.contiguous(), grad_weight, partials
    launch(_backward_kernel, weight.numel(), *tensors, programs=programs)
    grad_lower, grad_upper = _sums(partials, [lower, upper], 1.0)
    return grad_weight, grad_lower, grad_upper


def _check(weight: Tensor, lower: Tensor, upper: Tensor, frozen: Tensor, **others: Tensor | None) -> None:
    name = "lts_quantize"
    check(name, weight, frozen, **others)
    for which, bound in (("lower", lower), ("upper", upper)):
        if bound.dtype != torch.float32 or bound.numel() != 1:
            raise ValueError(f"{name}: {which} must be one float32, got {bound.dtype} of shape {tuple(bound.shape)}")
    if weight.device.type == "cpu":  # in the interpreter; on a GPU it would wait for the values
        check_bounds(lower, upper, name)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    kinds = {"distance": "*fp32:16", "code": "*u8:16", "counters": "*i64:16", "frozen_step": "*i32:16"}
    kinds |= {"settled": "*u8:16", "frozen_before": "*u8:16", "counts": "*i32:16"}
    kinds |= dict.fromkeys(("lower", "upper"), "*fp32:16") | dict.fromkeys(_NUMBERS, "fp32")
    kinds |= dict.fromkeys((*_STEPS, *_BLOCKS, "rows", "padded"), "i32")
    data = ["weight", "saved", "output", "grad_output", "grad_weight"]
    none = {"saved": None, "frozen_step": None, "settled": None}
    plain: dict[str, Any] = {"UPDATE": True, "GROWTH": "sine", "FREEZES": "element"}
    variants = {
        "element": plain | none,
        "element saved step": plain | {"settled": None},
        "octets": plain | {"FREEZES": "octets", "saved": None, "frozen_step": None, "counts": None},
        "parts saved": plain | {"FREEZES": "parts", "frozen_step": None, "counts": None},
        "evaluation": plain | {"UPDATE": False, "counts": None} | none,
    }
    yield from cases(_forward_kernel, variants, kinds, data)
    tile = {"GROWTH": "sine"} | _count_tile(4608, 64, 576)
    yield from cases(_count_kernel, {"saved": tile, "": tile | {"saved": None}}, kinds, data)
    for kernel_name, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for case in cases(
            _backward_kernel, {"saved": {}, "": {"saved": None}}, kinds | {"partials": KINDS[SUMS[kind]]}, data
        ):
            if case[1].endswith(kernel_name):
                yield case
    for blocks in (False, True):
        fixed = {"BLOCKS": blocks, "WIDTH": WIDTH, "WORD": WORD} | ({} if blocks else {"settled": None})
        signature = {a: kinds.get(a, "i32") for a in _settle_kernel.arg_names if a not in fixed}
        yield _settle_kernel, "blocks" if blocks else "elements", signature, fixed, OPTIONS
