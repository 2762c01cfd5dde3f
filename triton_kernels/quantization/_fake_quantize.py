"""What the fake-quantisers' Triton kernels share: tiles over memory, exact rounding, parameters, and their gradients.

A quantiser is one pass in each direction over memory in storage order, seen as a matrix: of one row where every
parameter has one value, else such that each row, or each column, has one. A program owns one tile. Backward it also
writes the sum of what its tile gives to each parameter, and one more launch adds these up in a fixed order: no atomics,
bitwise the same every run. Nothing waits for the GPU: parameters are read where they lie.

Bytes that move, with u bytes of input (output and grad_output have the same):

========  =================  =======================================================================
launch    moves              besides
========  =================  =======================================================================
forward   2u, two inputs 3u  the parameters, from the caches
backward  3u, two inputs 5u  4 or 8 bytes per tile and parameter: 0.2 % of u for two parameters
sum       -                  the same again; 64 MiB of input leave 64 KiB per parameter
========  =================  =======================================================================

By calculation (no GPU has measured it): 16 elements per thread take 16-byte loads, and at 110 to 128 registers a
multiprocessor has 16 warps, hence 32 KiB of half-precision input and gradient under way; 4.3 TB/s on 132
multiprocessors ask for 29 KiB at 900 ns. At that rate a half-precision element may cost 36 instructions forward and 49
backward. The rule "ddtb" takes about 26 and 50 of Hopper's, hence one division per element and no more, and what
depends on the parameters alone is computed once per program.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.quantization._quantizer import Rule

NUM_WARPS = 4
# Twice as many take 255 registers backward in half precision; of half as many a third goes into what is per program.
ELEMENTS = NUM_WARPS * 32 * 16
# Contraction to fused multiply-add would move ties. It is refused by name, since Triton 3.10 turns its default.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
# What each dtype's sums are done in. In float32 those of float32 would err by 1e-6, in float64 by one rounding: two
# additions per element, for which there is room where an element is 12 bytes.
SUMS = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# A shorter row would idle lanes and leave a partial sum for few elements; then columns have a value each.
SHORTEST_ROW = 64
NARROW = 64  # columns of such a tile, whose 32 rows share a partial sum
WORD = 4  # partial sums that are read at once
# Never specialised, so that other sizes do not compile anew; what the loads must know of alignment is in TILE.
SIZES = ["rows", "columns", "size"]


@triton.jit
def round_half_even(x):
    """``torch.round`` with the signs of zeros; the compiler and the interpreter have none in common.

    Adding 2**23 leaves no digits behind the point, rounding to even; from there on a float32 is whole as it is.
    """
    magnitude = tl.abs(x)
    whole = (magnitude + 8388608.0) - 8388608.0
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    whole = (whole.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 8388608.0, whole, x)


@triton.jit
def least(x, y):
    """The lesser, and NaN if one is, as with torch."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest(x, y):
    """The greater, and NaN if one is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu(x):
    """With NaN and -0 as they are, as with torch: the GPU's maximum of 0 and -0 is 0."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def clamp(x, low, high):
    """Between two numbers, with NaN and -0 as they are."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def quantize_ddtb(x, low, high, levels):
    """Output and clipped input of the rule ``"ddtb"``, in the order of the reference; ``levels`` is 2**bits - 1."""
    scale = tl.div_rn(tl.cast(levels, tl.float32), high - low)
    zero = round_half_even(scale * low) + (levels + 1.0) * 0.5
    clipped = greatest(least(x, high), low)
    return tl.div_rn(round_half_even(scale * clipped - zero) + zero, scale), clipped


@triton.jit
def differentiate_ddtb(g, x, low, high, levels, TIE: tl.constexpr):
    """The input's gradient, and what each element gives to low and to high."""
    y, clipped = quantize_ddtb(x, low, high, levels)
    error = (y - clipped) * tl.div_rn(1.0, high - low)  # only summed: one more rounding does not show
    EQUAL: tl.constexpr = 0.5 if TIE == "half" else 1.0
    above = tl.where(x > high, 1.0, tl.where(x == high, EQUAL, 0.0))
    lesser = least(x, high)
    below = tl.where(lesser < low, 1.0, tl.where(lesser == low, EQUAL, 0.0))
    grad = g * (1.0 - above) * (1.0 - below)
    return grad, g * (below - error), g * (above * (1.0 - below) + error)


@triton.jit
def _origin(columns, TILE: tl.constexpr):
    """First row and column of this program's tile, and how many tiles lie side by side; columns are whole here."""
    program = tl.program_id(0)
    if TILE[0] == "tensor":
        across = tl.num_programs(0)
        row, column = tl.full([], 0, tl.int32), program
    else:
        across = tl.cdiv(columns, TILE[2]).to(tl.int32)  # the GPU has no 64-bit division
        row, column = program // across, program % across
    return row.to(tl.int64) * TILE[1], column.to(tl.int64) * TILE[2], across


@triton.jit
def tile(rows, columns, TILE: tl.constexpr):
    """Where this program's tile starts, the offsets of its elements from there, and which of them exist."""
    columns = columns.to(tl.int64) * TILE[3]
    row, column, _ = _origin(columns, TILE)
    down, right = tl.arange(0, TILE[1])[:, None], tl.arange(0, TILE[2])[None, :]
    present = (row + down < rows) & (column + right < columns)  # [ROWS, COLUMNS]
    return row * columns + column, down * columns + right, present


@triton.jit
def load(pointer, start, offsets, present, ELSE: tl.constexpr):
    return tl.load(pointer + start + offsets, mask=present, other=ELSE).to(tl.float32)


@triton.jit
def store(pointer, start, offsets, present, values):
    tl.store(pointer + start + offsets, values.to(pointer.dtype.element_ty), mask=present)


@triton.jit
def parameter(pointer, rows, columns, size, TILE: tl.constexpr):
    """What the tile needs of a parameter: one value, ``[ROWS, 1]`` or ``[1, COLUMNS]``."""
    columns = columns.to(tl.int64) * TILE[3]
    row, column, _ = _origin(columns, TILE)
    if TILE[0] == "tensor":
        value = tl.load(pointer)
    elif TILE[0] == "column":
        own = column + tl.arange(0, TILE[2])
        value = tl.load(pointer + own, mask=own < columns, other=1.0)[None, :]
    elif TILE[1] == 1:
        value = tl.load(pointer + row.to(tl.int32) % size)
    else:
        own = row.to(tl.int32) + tl.arange(0, TILE[1])
        value = tl.load(pointer + own % size, mask=own < rows, other=1.0)[:, None]
    return value


@triton.jit
def store_partial(partials, WHICH: tl.constexpr, contributions, rows, columns, TILE: tl.constexpr):
    """The sum of what this tile gives to the WHICH-th parameter.

    ``partials`` is ``(parameters, rows, tiles side by side)``, or, where a column has a value,
    ``(parameters, tiles one above the other, columns)``. An element that does not exist has grad_output 0: it gives 0.
    """
    contributions = contributions.to(partials.dtype.element_ty)
    columns = columns.to(tl.int64) * TILE[3]
    row, column, across = _origin(columns, TILE)
    if TILE[0] == "column":
        own = column + tl.arange(0, TILE[2])
        place = (row // TILE[1] + WHICH * tl.cdiv(rows, TILE[1])) * columns + own
        tl.store(partials + place, tl.sum(contributions, axis=0), mask=own < columns)
    else:
        own = row + tl.arange(0, TILE[1])
        place = (own + WHICH * rows) * across + column // TILE[2]
        tl.store(partials + place, tl.sum(contributions, axis=1), mask=own < rows)


@triton.jit(do_not_specialize=["outer", "size", "inner"])
def _sum_kernel(
    partials, first, second, third, fourth, factor, outer, size, inner,
    VECTOR: tl.constexpr, NESTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``factor`` times the sums over outer and inner of ``(parameters, outer, size, inner)``, one sum per program.

    ``inner`` counts VECTOR each. Without NESTED, ``outer`` is 1.
    """
    index, which = tl.program_id(0), tl.program_id(1)
    inner = inner * VECTOR
    count = inner
    if NESTED:
        count = outer * inner
    partials += which.to(tl.int64) * size * count
    total = tl.zeros([BLOCK], partials.dtype.element_ty)
    for begin in range(0, count, BLOCK):
        own = begin + tl.arange(0, BLOCK)
        if NESTED:
            place = ((own // inner).to(tl.int64) * size + index) * inner + own % inner
        else:
            place = index.to(tl.int64) * inner + own
        total += tl.load(partials + place, mask=own < count, other=0.0)
    result = (tl.sum(total, axis=0) * factor).to(tl.float32)
    tl.store(first + index, result, mask=which == 0)
    tl.store(second + index, result, mask=which == 1)
    tl.store(third + index, result, mask=which == 2)
    tl.store(fourth + index, result, mask=which == 3)


class Plan(NamedTuple):
    """Memory as a matrix, its tiles, and the shape of the partial sums."""

    sizes: tuple[int, int, int]  # rows, columns in vectors, values of a parameter
    tile: tuple[str, int, int, int]  # what has a value each, rows, columns, elements in a vector
    programs: int
    repeat: int  # columns side by side that share a value
    partials: tuple[int, int, int]  # outer, size, inner, of which outer and inner are summed over


def forward(
    kernel: Any, rule: Rule, inputs: Sequence[Tensor], parameters: Sequence[Tensor], *numbers: float, **constants: Any
) -> Tensor:
    """Launches ``kernel(*inputs, output, *parameters, *numbers, *SIZES, **constants, TILE)``; returns the output.

    Args:
        kernel: quantises one tile.
        rule: the operator's own; its ``check_values`` runs on CPU tensors, hence in the interpreter.
        inputs: in any layout, all of one shape.
        parameters: float32, each of one element or along the same dimension of the inputs.
        numbers, constants: the kernel's own arguments.
    """
    plan = _plan(inputs[0], parameters)
    if inputs[0].device.type == "cpu":
        rule.check_values(*parameters)
    output = torch.empty_like(inputs[0])
    tensors = [*(laid_out_like(output, t) for t in inputs), output]
    launch(kernel, plan, tensors, parameters, numbers, constants)
    return output


def backward(
    kernel: Any,
    grad_output: Tensor,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *numbers: float,
    factor: float = 1.0,
    **constants: Any,
) -> tuple[Tensor, ...]:
    """Launches ``kernel(grad_output, *inputs, *grad_inputs, partials, *parameters, *numbers, *SIZES, **constants,
    TILE)``; returns the inputs' gradients and, times ``factor``, the parameters'."""
    plan = _plan(inputs[0], parameters)
    gradients = [torch.empty_like(t) for t in inputs]
    # The kernel has one memory order, the first input's.
    written = [g if same_order(gradients[0], g) else torch.empty_like(gradients[0]) for g in gradients]
    sources = [laid_out_like(gradients[0], t) for t in (grad_output, *inputs)]
    dtype = SUMS[inputs[0].dtype]
    partials = torch.empty((len(parameters), *plan.partials), dtype=dtype, device=grad_output.device)
    launch(kernel, plan, [*sources, *written, partials], parameters, numbers, constants)
    gradients = [g if g is w else g.copy_(w) for g, w in zip(gradients, written, strict=True)]
    return *gradients, *_sums(partials, parameters, factor)


def launch(
    kernel: Any,
    plan: Plan,
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, Any],
) -> None:
    """Launches over all tiles; none, no launch."""
    if not plan.programs:
        return
    if plan.tile[0] != "tensor":
        parameters = [p.reshape(-1, 1).expand(plan.sizes[2], plan.repeat).contiguous() for p in parameters]
    with torch.cuda.device_of(tensors[0]):
        kernel[(plan.programs,)](
            *tensors, *parameters, *numbers, *plan.sizes, **constants, TILE=plan.tile, **OPTIONS
        )  # fmt: skip


def same_order(dense: Tensor, tensor: Tensor) -> bool:
    """Whether the same offset is the same element in both."""
    strides = zip(dense.shape, dense.stride(), tensor.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in strides)


def laid_out_like(dense: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, or a copy in the memory order of ``dense``, which has no gaps."""
    if tensor.shape != dense.shape:
        raise ValueError(
            f"fake_quantize: the tensors must have the input's shape {tuple(dense.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor if same_order(dense, tensor) else torch.empty_like(dense).copy_(tensor)


def one_value_each(input: Tensor) -> Plan:
    """The plan where every parameter has one value."""
    if input.dtype not in SUMS:
        raise TypeError(f"fake_quantize: the Triton kernels take float16, bfloat16 and float32, got {input.dtype}")
    tiles = triton.cdiv(triton.cdiv(input.numel(), ELEMENTS), WORD) * WORD  # so that the sum reads whole words
    return _planned(input, "tensor", (1, input.numel(), 1), (1, ELEMENTS), tiles, (1, 1, tiles))


def _plan(input: Tensor, parameters: Sequence[Tensor]) -> Plan:
    """The tiles, chosen here only; and what a kernel would answer with a read outside a tensor is refused."""
    along = {_axis(input, p) for p in parameters if p.numel() != 1}
    if len(along) > 1:
        raise ValueError(f"fake_quantize: the parameters must lie along one dimension, got dimensions {sorted(along)}")
    if any(p.dtype != torch.float32 for p in parameters):
        raise TypeError(f"fake_quantize: the parameters must be float32, got {[p.dtype for p in parameters]}")
    plan = one_value_each(input)
    if not along or not input.numel():
        return plan
    (axis,) = along
    size = input.shape[axis]
    inner = torch.empty_like(input, device="meta").stride(axis)  # of the dense copy, should the input be none
    outer = input.numel() // (size * inner)
    if outer == 1 or inner >= SHORTEST_ROW:
        width = min(triton.next_power_of_2(inner), ELEMENTS)
        height, across = ELEMENTS // width, triton.cdiv(inner, width)
        tiles = triton.cdiv(outer * size, height) * across
        return _planned(input, "row", (outer * size, inner, size), (height, width), tiles, (outer, size, across))
    columns = size * inner
    width = min(triton.next_power_of_2(columns), NARROW)
    height = ELEMENTS // width
    above = triton.cdiv(outer, height)
    tiles = above * triton.cdiv(columns, width)
    return _planned(input, "column", (outer, columns, size), (height, width), tiles, (above, size, inner))


def _planned(
    input: Tensor,
    per: str,
    sizes: tuple[int, int, int],
    tile: tuple[int, int],
    tiles: int,
    partials: tuple[int, int, int],
) -> Plan:
    rows, columns, size = sizes
    vector = math.gcd(16 // input.element_size(), columns)  # 16 bytes are the widest load
    repeat = columns // size if per == "column" else 1
    return Plan((rows, columns // vector, size), (per, *tile, vector), tiles, repeat, partials)


def _axis(input: Tensor, parameter: Tensor) -> int:
    """The dimension of ``input`` that the parameter lies along."""
    along = [axis for axis, size in enumerate(parameter.shape) if size != 1]
    if parameter.dim() != input.dim() or len(along) != 1 or parameter.shape[along[0]] != input.shape[along[0]]:
        raise ValueError(
            f"fake_quantize: a parameter must have one element or lie along one dimension of the input "
            f"{tuple(input.shape)}, got {tuple(parameter.shape)}"
        )
    return along[0]


def _sums(partials: Tensor, parameters: Sequence[Tensor], factor: float) -> list[Tensor]:
    """The parameters' gradients from ``(parameters, outer, size, inner)``."""
    count, outer, size, inner = partials.shape
    if not partials.numel():
        return [torch.zeros(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    shapes = [p.shape if p.numel() == size else (size,) for p in parameters]
    sums = [partials.new_empty(shape, dtype=torch.float32) for shape in shapes]
    constants, options = _sum_constants(outer, inner)
    unused = [sums[0]] * (4 - count)
    with torch.cuda.device_of(partials):
        _sum_kernel[(size, count)](
            partials, *sums, *unused, factor, outer, size, inner // constants["VECTOR"], **constants, **options
        )
    # One value beside a parameter of many: its gradient is the sum over them.
    return [s if s.numel() == p.numel() else s.sum().reshape(p.shape) for s, p in zip(sums, parameters, strict=True)]


def _sum_constants(outer: int, inner: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants and options: one program alone adds up what a whole tensor leaves, so it has many loads under way."""
    block, warps = (16384, 16) if outer * inner > 2048 else (2048, 4)
    constants = {"VECTOR": math.gcd(inner, WORD), "NESTED": outer > 1, "BLOCK": block}
    return constants, OPTIONS | {"num_warps": warps}


KINDS = {torch.float32: "*fp32:16", torch.float64: "*fp64:16"}
Case = tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]


def cases(
    kernels: Sequence[Any], variants: dict[str, dict[str, Any]], numbers: Sequence[str] = (), everywhere: bool = False
) -> Iterator[Case]:
    """The ahead-of-time cases of an operator: kernel, label, signature, constants and options as a launch has them.

    Args:
        kernels: the operator's.
        variants: values of the kernels' own constants, by label.
        numbers: the kernels' arguments that are float32 numbers.
        everywhere: parameters along a dimension too.
    """
    places = {"": ((1 << 20,), (1,)), "per row": ((8, 1 << 17), (8, 1)), "per column": ((1 << 10, 128), (1, 128))}
    for label, own in variants.items():
        for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
            kinds = dict.fromkeys(("input", "other", "output"), f"*{name}:16")
            kinds |= dict.fromkeys(("grad_output", "grad_input", "grad_other"), f"*{name}:16")
            kinds |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(numbers, "fp32")
            kinds["partials"] = KINDS[SUMS[dtype]]
            for place, (shape, along) in places.items() if everywhere else [("", places[""])]:
                plan = _plan(torch.empty(shape, dtype=dtype, device="meta"), [torch.empty(along, device="meta")])
                constants = {"TILE": plan.tile, **own}
                for kernel in kernels:
                    used = {k: v for k, v in constants.items() if k in kernel.arg_names}
                    signature = {a: kinds.get(a, "*fp32:16") for a in kernel.arg_names if a not in used}
                    yield kernel, " ".join(filter(None, (label, name, place))), signature, used, OPTIONS


def ahead_of_time_cases() -> Iterator[Case]:
    """The sum of partial sums; the quantisers' own modules have theirs."""
    for dtype, tiles in itertools.product((torch.float32, torch.float64), (1152, 8192)):  # EDSR's, and 64 MiB
        kinds = {"factor": "fp32", "outer": "i32", "size": "i32", "inner": "i32", "partials": KINDS[dtype]}
        constants, options = _sum_constants(1, tiles)
        signature = {a: kinds.get(a, "*fp32:16") for a in _sum_kernel.arg_names if a not in constants}
        yield _sum_kernel, f"{KINDS[dtype][1:5]} of {tiles}", signature, constants, options
