"""Product with a packed N:M matrix on GPUs: the weight leaves memory packed and is expanded in registers.

A step takes the values of a tile of groups and their index, and spreads every group over its M positions: kept element
i is compared with all of them, n M selections a group, 2 an element at 2:4. No place is ever an address, so a damaged
index leads nowhere. Of up to FEW rows each is multiplied and added as it is (the packed bytes are what takes the time);
more rows go through the matrix units as dense tiles, which saves bytes, not multiplications. Where such tiles are too
few for a GPU the groups are shared out in parts, whose sums a second launch adds in order: no atomics, bitwise the same
every run.

Bytes of the weight, of those it has when dense: 0.56 at 2:4 and 4:8, 0.28 at 1:4, 0.08 at 1:16 in half precision.
"""

# A jitted function annotates its constants only, and a tuple grows in it.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.sparsity.nm_matmul import DTYPES, check_activation
from tersor.sparsity.nm_pack import check_packed, index_bits
from tersor.triton_kernels.quantization._fake_quantize import Case, greatest

FEW = 4  # rows up to which they are not worth a matrix product; by calculation, not measured on a GPU
PROGRAMS = 264  # two for each of 132 multiprocessors
STEPS = 8  # that a part has at least
DENSE, SUMS = 64, 16  # of a thread, for few rows: elements of one row of the weight, and sums
ELEMENTS = 1024  # of the output, in a program that adds up parts
BLOCK = 64  # outputs and rows of a dense tile, whose 64 x 64 sums are 32 registers a thread
# Nothing is exact here, so multiplications and additions are contracted.
OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}

# Never specialised, so that other sizes do not compile anew; what the loads must know of alignment is in VECTOR.
_SIZES = ["rows", "outputs", "groups", "index_row"]


@triton.jit
def _load_packed(
    values, index, output, begin, outputs, groups, index_row,
    N: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """The values of the groups, ``[OUTPUTS, GROUPS KEPT]``, KEPT the power of two from N on, and the index's bytes."""
    KEPT: tl.constexpr = triton.next_power_of_2(N)
    real = (output < outputs)[:, None]
    column = tl.arange(0, GROUPS * KEPT)
    place = begin * N + (column if KEPT == N else column // KEPT * N + column % KEPT)
    present = place < groups * N
    if KEPT != N:
        present = present & (column % KEPT < N)
    row = values + (output * groups * N)[:, None]
    kept = tl.load(row + place[None, :], mask=real & present[None, :], other=0.0)
    byte = begin * BITS // 8 + tl.arange(0, GROUPS * BITS // 8)
    row = index + (output * index_row)[:, None]
    return kept, tl.load(row + byte[None, :], mask=real & (byte < index_row)[None, :], other=0)


@triton.jit
def _side_by_side(parts):
    """``[..., X, len(parts)]`` of tensors ``[..., X]``."""
    for _ in tl.static_range(4):
        joined = ()
        if len(parts) > 1:
            for j in tl.static_range(len(parts) // 2):
                joined = joined + (tl.join(parts[j], parts[j + len(parts) // 2]),)  # noqa: RUF005 (no unpacking in Triton)
            parts = joined
    return parts[0]


@triton.jit
def _expand(
    kept, bytes, N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """The weight's elements, ``[OUTPUTS, GROUPS WIDTH]``, with zeros from M on and where there are no groups."""
    OUTPUTS: tl.constexpr = kept.shape[0]
    left = bytes.to(tl.int32)
    if BITS == 16:
        low, high = tl.split(tl.reshape(left, [OUTPUTS, GROUPS, 2]))
        left = low | high << 8
    elif BITS < 8:
        shifted = ()
        for j in tl.static_range(8 // BITS):
            shifted = shifted + (left >> j * BITS & ((1 << BITS) - 1),)  # noqa: RUF005 (no unpacking in Triton)
        left = tl.reshape(_side_by_side(shifted), [OUTPUTS, GROUPS])
    kept = tl.reshape(kept, [OUTPUTS, GROUPS, triton.next_power_of_2(N)])
    i = tl.arange(0, kept.shape[2])[None, None, :]
    zero = tl.zeros([OUTPUTS, GROUPS], kept.dtype)
    dense = (zero,) * WIDTH
    for k in tl.static_range(N):
        if N == 1:
            own = 1 << left
        elif BITS == 4 and N == 2:
            own = 1 << (left >> 2 * k & 3)
        else:  # the lowest bit that is left, or none
            own = left & -left
            left = left ^ own
        value = tl.sum(tl.where(i == k, kept, tl.zeros_like(kept)), axis=2)
        spread = ()
        for p in tl.static_range(WIDTH):
            spread = spread + (tl.where(own == 1 << p, value, dense[p]) if p < M else zero,)  # noqa: RUF005
        dense = spread
    return tl.reshape(_side_by_side(dense), [OUTPUTS, GROUPS * WIDTH])


@triton.jit
def _columns(begin, groups, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The input's columns that the elements of :func:`_expand` belong to, and which exist."""
    column = tl.arange(0, GROUPS * WIDTH)
    if M == WIDTH:
        place = begin * M + column
        return place, place < groups * M
    group = begin + column // WIDTH
    return group * M + column % WIDTH, (group < groups) & (column % WIDTH < M)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = greatest(x, 0.0)
    if ACTIVATION == "gelu":
        x = x * 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return x


@triton.jit(do_not_specialize=_SIZES)
def _few_kernel(
    input, values, index, bias, target, rows, outputs, groups, index_row,
    ROWS: tl.constexpr, ACTIVATION: tl.constexpr, VECTOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """OUTPUTS outputs of ROWS rows; beyond the last row that one again."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1).to(tl.int64) * ROWS
    groups = groups // VECTOR[0] * VECTOR[0]  # which tells the compiler what divides it
    index_row = index_row // VECTOR[1] * VECTOR[1]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([OUTPUTS, GROUPS], tl.float32),)  # noqa: RUF005 (no unpacking in Triton)
    kept, bytes = _load_packed(values, index, output, 0, outputs, groups, index_row, N, BITS, GROUPS)
    for begin in range(0, groups, GROUPS):
        weight = _expand(kept, bytes, N, M, WIDTH, BITS, GROUPS)
        kept, bytes = _load_packed(values, index, output, begin + GROUPS, outputs, groups, index_row, N, BITS, GROUPS)
        column, present = _columns(begin, groups, M, WIDTH, GROUPS)
        added = ()
        for r in tl.static_range(ROWS):
            own = tl.minimum(row + r, rows - 1)
            x = tl.load(input + own * groups * M + column, mask=present, other=0.0)
            product = weight.to(tl.float32) * x.to(tl.float32)[None, :]
            added = added + (sums[r] + tl.sum(tl.reshape(product, [OUTPUTS, GROUPS, WIDTH]), axis=2),)  # noqa: RUF005
        sums = added
    real = output < outputs
    for r in tl.static_range(ROWS):
        total = tl.sum(sums[r], axis=1)
        if bias is not None:
            total += tl.load(bias + output, mask=real, other=0.0).to(tl.float32)
        total = _activate(total, ACTIVATION).to(target.dtype.element_ty)
        tl.store(target + tl.minimum(row + r, rows - 1) * outputs + output, total, mask=real)


@triton.jit(do_not_specialize=[*_SIZES, "chunk"])
def _many_kernel(
    input, values, index, bias, target, rows, outputs, groups, index_row, chunk,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A dense tile; ``target`` is the output ``(rows, outputs)``, or sums ``(parts, rows, outputs)``."""
    across = tl.cdiv(outputs, OUTPUTS)
    output = (tl.program_id(0) % across).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    groups = groups // VECTOR[0] * VECTOR[0]
    index_row = index_row // VECTOR[1] * VECTOR[1]
    chunk = chunk // GROUPS * GROUPS
    first = tl.program_id(1) * chunk
    sums = tl.zeros([OUTPUTS, ROWS], tl.float32)
    kept, bytes = _load_packed(values, index, output, first, outputs, groups, index_row, N, BITS, GROUPS)
    for begin in range(first, tl.minimum(first + chunk, groups), GROUPS):
        weight = _expand(kept, bytes, N, M, WIDTH, BITS, GROUPS)
        kept, bytes = _load_packed(values, index, output, begin + GROUPS, outputs, groups, index_row, N, BITS, GROUPS)
        column, present = _columns(begin, groups, M, WIDTH, GROUPS)
        place = input + (row * groups * M)[None, :] + column[:, None]
        x = tl.load(place, mask=present[:, None] & (row < rows)[None, :], other=0.0)  # [GROUPS WIDTH, ROWS]
        sums = tl.dot(weight, x, acc=sums, input_precision="ieee")
    real = output < outputs
    if bias is not None:
        sums += tl.load(bias + output, mask=real, other=0.0).to(tl.float32)[:, None]
    sums = _activate(sums, ACTIVATION)
    place = target + (tl.program_id(1) * rows + row)[None, :] * outputs + output[:, None]
    tl.store(place, sums.to(target.dtype.element_ty), mask=real[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize=["parts", "rows", "outputs"])
def _sum_kernel(
    partials, bias, target, parts, rows, outputs,
    ACTIVATION: tl.constexpr, VECTOR: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The parts' sums in their order."""
    outputs = outputs // VECTOR * VECTOR
    size = rows.to(tl.int64) * outputs
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)  # of few: parts are for small outputs
    total = tl.zeros([ELEMENTS], tl.float32)
    for part in range(parts):
        total += tl.load(partials + part * size + element, mask=element < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + element % outputs, mask=element < size, other=0.0).to(tl.float32)
    tl.store(target + element, _activate(total, ACTIVATION).to(target.dtype.element_ty), mask=element < size)


def nm_matmul(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, n: int, m: int, activation: str
) -> Tensor:
    """The operator ``tersor::nm_matmul`` for float16, bfloat16 and float32."""
    name = "nm_matmul"
    n, m = check_packed(name, values, index, n, m)
    outputs, groups = values.shape[:2]
    if not input.dim() or input.shape[-1] != groups * m:
        raise ValueError(f"{name}: input must be (..., {groups * m}) for this weight, got shape {tuple(input.shape)}")
    if input.dtype not in DTYPES or values.dtype != input.dtype:
        given = f"{input.dtype} and {values.dtype}"
        raise TypeError(f"{name}: input and values must both be float16, bfloat16 or float32, got {given}")
    if bias is not None and (tuple(bias.shape) != (outputs,) or bias.dtype != input.dtype):
        given = f"{bias.dtype} of shape {tuple(bias.shape)}"
        raise ValueError(f"{name}: bias must be {input.dtype} of shape ({outputs},), got {given}")
    check_activation(name, activation)
    output = torch.empty((*input.shape[:-1], outputs), dtype=input.dtype, device=input.device)
    if output.numel():
        packed, bias = (values.contiguous(), index.contiguous()), None if bias is None else bias.contiguous()
        with torch.cuda.device_of(input):
            _launch(input.contiguous(), *packed, bias, output, n, m, activation)
    return output


def _launch(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, output: Tensor, n: int, m: int, activation: str
) -> None:
    outputs, groups = values.shape[:2]
    rows = output.numel() // outputs
    sizes = rows, outputs, groups, index.shape[1]
    shared = {"VECTOR": tuple(math.gcd(16, size) for size in sizes[2:]), "ACTIVATION": activation}
    if rows <= FEW:
        tile = _few_tile(rows, n, m, input.element_size())
        grid = triton.cdiv(outputs, tile["OUTPUTS"]), triton.cdiv(rows, tile["ROWS"])
        _few_kernel[grid](input, values, index, bias, output, *sizes, **shared, **tile, **OPTIONS)
        return
    tile = _many_tile(rows, n, m, input.element_size())
    programs = triton.cdiv(outputs, tile["OUTPUTS"]) * triton.cdiv(rows, tile["ROWS"])
    steps = max(triton.cdiv(groups, tile["GROUPS"]), 1)
    chunk = triton.cdiv(steps, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(steps, STEPS))) * tile["GROUPS"]
    parts = max(triton.cdiv(groups, chunk), 1)
    if parts == 1:
        _many_kernel[(programs, 1)](input, values, index, bias, output, *sizes, chunk, **shared, **tile, **OPTIONS)
        return
    partials = torch.empty((parts, rows, outputs), dtype=torch.float32, device=input.device)
    shared["ACTIVATION"] = "none"
    _many_kernel[(programs, parts)](input, values, index, None, partials, *sizes, chunk, **shared, **tile, **OPTIONS)
    grid = (triton.cdiv(rows * outputs, ELEMENTS),)
    own = {"ACTIVATION": activation, "VECTOR": math.gcd(16, outputs), "ELEMENTS": ELEMENTS}
    _sum_kernel[grid](partials, bias, output, parts, rows, outputs, **own, **OPTIONS)


def _format(n: int, m: int) -> dict[str, int]:
    return {"N": n, "M": m, "WIDTH": triton.next_power_of_2(m), "BITS": index_bits(n, m)}


def _few_tile(rows: int, n: int, m: int, itemsize: int) -> dict[str, int]:
    """A row of the weight has a warp, or two: 16 bytes of values a thread, unless they take too many registers."""
    own, height = _format(n, m), min(triton.next_power_of_2(rows), FEW)
    outputs = 2 if n == 1 < height else 4  # one kept element a group makes most groups, hence sums
    dense = DENSE // min(height, 2) // own["WIDTH"]
    each = min(16 // itemsize // triton.next_power_of_2(n), dense, SUMS // height)
    return own | {"OUTPUTS": outputs, "GROUPS": max(128 // outputs * each, 8), "ROWS": height}


def _many_tile(rows: int, n: int, m: int, itemsize: int) -> dict[str, int]:
    """64 columns of half precision a step, or 128 where few are kept; less in float32, which has no matrix units."""
    own, half = _format(n, m), itemsize == 2
    columns = 64 if half else 32
    if n * (4 if half else 16) <= m:  # else a thread's load is narrow
        columns *= 2
    height = min(max(triton.next_power_of_2(rows), 16), BLOCK if half else 16)
    return own | {"OUTPUTS": BLOCK, "ROWS": height, "GROUPS": columns // own["WIDTH"]}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        kinds = dict.fromkeys(("input", "values", "bias", "target"), f"*{name}:16")
        kinds |= {"index": "*u8:16", "partials": "*fp32:16"}
        own = {"VECTOR": (16, 16), "ACTIVATION": "gelu"}
        for n, m in ((2, 4), (1, 4), (2, 8), (4, 8), (1, 16)):
            for rows in (1, FEW, 16, BLOCK):
                few = rows <= FEW
                constants: dict[str, Any] = own | (_few_tile if few else _many_tile)(rows, n, m, itemsize)
                if not few and n / m < 0.5:  # whose index and bias weigh more: in parts
                    constants |= {"ACTIVATION": "none", "bias": None}
                kernel = _few_kernel if few else _many_kernel
                types = kinds if "bias" not in constants else kinds | {"target": "*fp32:16"}
                signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constants}
                yield kernel, f"{n}:{m} {rows} rows {name}", signature, constants, OPTIONS
        constants = {"ACTIVATION": "gelu", "VECTOR": 16, "ELEMENTS": ELEMENTS}
        signature = {a: kinds.get(a, "i32") for a in _sum_kernel.arg_names if a not in constants}
        yield _sum_kernel, name, signature, constants, OPTIONS
