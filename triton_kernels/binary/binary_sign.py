"""The sign and its estimated gradients on GPUs: one pass over memory, in the order in which it lies.

A program owns whole octets of elements, whose bits "inside" share a byte. Where the samples are scaled, the forward
pass reads the input once as well: it writes the signs together with each block's mean and sum of centred squares, which
one program a sample combines; only that of a sample without a deviation comes back for its signs. Backward, a sum over
the sample comes first, in at most 256 parts that every program then adds up in the same order: no atomics, bitwise
the same every run.

========  ==============  ====================================
launch    moves           besides
========  ==============  ====================================
forward   2u              a bit an element ("ste"), 8 bytes a block (scaled)
backward  3u, "ste" 2u    a bit an element ("ste")
sums      2u              where scaled
========  ==============  ====================================
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

from tersor._window import is_channels_last
from tersor.binary.binary_sign import EPS
from tersor.binary.estimators import Estimator
from tersor.freezing.mask import check_mask
from tersor.triton_kernels.binary._power import power, split
from tersor.triton_kernels.freezing._octets import cases, launch, load_bytes, octets, pack, store_bytes, unpack
from tersor.triton_kernels.quantization._fake_quantize import ELEMENTS, OPTIONS, SUMS, WORD, Case, store

PARTS = 256  # of a sample's sum, so that reading them stays below a tenth of reading a block
BLOCK = 1024  # partial results that are read at once

_EPS = tl.constexpr(EPS)
_NUMBERS = ("t", "interval", "chord", "share", "exponent", "high", "low")


@triton.jit
def sign(x):
    """Of NaN 0."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def _slope(a, t, interval, chord, share, exponent, high, low, RULE: tl.constexpr):
    """The estimator's derivative at the magnitude ``a``; ``share`` is 1 / o and ``exponent`` is 1 / o - 1."""
    if RULE == "ste":
        slope = tl.where(a <= t, 1.0, 0.0)
    elif RULE == "approx":
        slope = tl.where(a >= 1.0, 0.0, 2.0 - 2.0 * a)
    else:
        far = share * power(tl.where(a > interval, a, interval), exponent, high, low)
        slope = tl.where(a <= interval, chord, tl.where(a <= t, far, 0.0))
    return slope


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(input, output, inside, t, size, VECTOR: tl.constexpr, OCTETS: tl.constexpr):
    """Without ``inside`` no bits are written."""
    start, offsets, present = octets(size, VECTOR, OCTETS)
    x = tl.load(input + start + offsets, mask=present, other=0.0).to(tl.float32)
    store(output, start, offsets, present, sign(x))
    if inside is not None:
        store_bytes(inside, start, size, pack((tl.abs(x) <= t) & present), OCTETS)


@triton.jit(do_not_specialize=["size"])
def _inside_kernel(grad_output, inside, grad_input, size, VECTOR: tl.constexpr, OCTETS: tl.constexpr):
    start, offsets, present = octets(size, VECTOR, OCTETS)
    chosen = unpack(load_bytes(inside, start, size, OCTETS))
    grad = tl.load(grad_output + start + offsets, mask=present, other=0.0)
    tl.store(grad_input + start + offsets, tl.where(chosen, grad, 0.0), mask=present)


@triton.jit(do_not_specialize=["size"])
def _backward_kernel(
    grad_output, input, grad_input, t, interval, chord, share, exponent, high, low, size,
    RULE: tl.constexpr, VECTOR: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    start, offsets, present = octets(size, VECTOR, OCTETS)
    x = tl.load(input + start + offsets, mask=present, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + start + offsets, mask=present, other=0.0).to(tl.float32)
    slope = _slope(tl.abs(x), t, interval, chord, share, exponent, high, low, RULE)
    store(grad_input, start, offsets, present, grad * slope)


@triton.jit
def _block(size, blocks, BLOCK: tl.constexpr):
    """The sample of this program, the elements of its block within the sample, and which exist."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return sample, place, place < size


@triton.jit(do_not_specialize=["size", "blocks"])
def _moments_kernel(input, output, partials, size, blocks, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Signs, and the block's mean and sum of centred squares; ``partials`` is ``(2, N, blocks)``."""
    size = size.to(tl.int64) * VECTOR
    sample, place, present = _block(size, blocks, BLOCK)
    first = sample * size
    x = tl.load(input + first + place, mask=present, other=0.0).to(tl.float32)
    tl.store(output + first + place, sign(x).to(output.dtype.element_ty), mask=present)
    count = tl.sum(present.to(tl.float32), axis=0)
    mean = tl.div_rn(tl.sum(x, axis=0), tl.maximum(count, 1.0))
    centred = tl.where(present, x - mean, 0.0)
    own = partials + tl.program_id(0).to(tl.int64)
    tl.store(own, mean)
    tl.store(own + tl.num_programs(0), tl.sum(centred * centred, axis=0))


@triton.jit(do_not_specialize=["size", "words"])
def _statistics_kernel(
    partials, statistics, output, size, words, WORD: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A sample's mean and reciprocal deviation by the formula of Chan et al.; zeros for signs where it has none."""
    sample = tl.program_id(0).to(tl.int64)
    blocks = words * WORD
    means = partials + sample * blocks
    squares = means + tl.num_programs(0).to(tl.int64) * blocks
    size = size.to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, blocks, BLOCK):
        b = begin + tl.arange(0, BLOCK)
        count = tl.minimum(tl.maximum(size - b.to(tl.int64) * ELEMENTS, 0), ELEMENTS).to(tl.float32)
        total += count * tl.load(means + b, mask=b < blocks, other=0.0)
    mean = tl.div_rn(tl.sum(total, axis=0), size.to(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, blocks, BLOCK):
        b = begin + tl.arange(0, BLOCK)
        count = tl.minimum(tl.maximum(size - b.to(tl.int64) * ELEMENTS, 0), ELEMENTS).to(tl.float32)
        apart = tl.load(means + b, mask=b < blocks, other=0.0) - mean
        between = tl.where(count > 0.0, count * (apart * apart), 0.0)
        total += tl.load(squares + b, mask=b < blocks, other=0.0) + between
    variance = tl.div_rn(tl.sum(total, axis=0), (size - 1).to(tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + _EPS))
    tl.store(statistics + sample * 2, mean)
    tl.store(statistics + sample * 2 + 1, rstd)
    if not (rstd > 0.0):
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], output.dtype.element_ty)
            tl.store(output + sample * size + place, zeros, mask=place < size)


@triton.jit(do_not_specialize=["size", "parts", "blocks"])
def _partial_sums_kernel(
    grad_output, input, statistics, partials, t, interval, chord, share, exponent, high, low, size, parts, blocks,
    RULE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the ``blocks`` blocks of a part add to the sum over the sample of slope times input, ``(N, parts)``."""
    size = size.to(tl.int64) * VECTOR
    sample = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts).to(tl.int64) * blocks
    rstd = tl.load(statistics + sample * 2 + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        place = (first + block) * BLOCK + tl.arange(0, BLOCK)
        present = place < size
        x = tl.load(input + sample * size + place, mask=present, other=0.0).to(tl.float32)
        grad = tl.load(grad_output + sample * size + place, mask=present, other=0.0).to(tl.float32)
        slope = grad * _slope(tl.abs(x * rstd), t, interval, chord, share, exponent, high, low, RULE)
        total += tl.where(present, slope * x, 0.0)
    tl.store(partials + tl.program_id(0).to(tl.int64), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["size", "parts", "blocks"])
def _scaled_backward_kernel(
    grad_output, input, statistics, partials, grad_input,
    t, interval, chord, share, exponent, high, low, size, parts, blocks,
    RULE: tl.constexpr, VECTOR: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    size = size.to(tl.int64) * VECTOR
    parts = parts * WORD
    sample, place, present = _block(size, blocks, BLOCK)
    first = sample * size
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(partials + sample * parts + part, mask=part < parts, other=0.0), axis=0)
    mean, rstd = tl.load(statistics + sample * 2), tl.load(statistics + sample * 2 + 1)
    x = tl.load(input + first + place, mask=present, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + first + place, mask=present, other=0.0).to(tl.float32)
    slope = grad * _slope(tl.abs(x * rstd), t, interval, chord, share, exponent, high, low, RULE)
    along = tl.div_rn(total * (rstd * rstd * rstd), (size - 1).to(tl.float32))
    result = slope * rstd - (x - mean) * along
    tl.store(grad_input + first + place, result.to(grad_input.dtype.element_ty), mask=present)


def binary_sign_forward(
    input: Tensor, estimator: str, o: float, t: float, interval: float, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``tersor::binary_sign_forward`` for float16, bfloat16 and float32."""
    _check(input)
    channels_last = input.dim() == 4 and is_channels_last(input)
    input = input if channels_last else input.contiguous()
    output = torch.empty_like(input)
    bits = estimator == "ste" and not scaled
    inside = input.new_empty((input.numel() + 7) // 8 if bits else 0, dtype=torch.uint8)
    statistics = input.new_empty((input.shape[0], 2) if scaled else (0,), dtype=torch.float32)
    if not scaled:
        bound = _rounded(t, input.dtype)
        launch(_forward_kernel, input.numel(), input, output, inside if bits else None, bound)
    elif not input.numel():
        statistics.fill_(torch.nan)
    else:
        samples, size = input.shape[0], input[0].numel()
        blocks = triton.cdiv(triton.cdiv(size, ELEMENTS), WORD) * WORD
        partials = statistics.new_empty((2, samples, blocks))
        vector = _vector(size)
        with torch.cuda.device_of(input):
            _moments_kernel[(samples * blocks,)](
                input, output, partials, size // vector, blocks, vector, ELEMENTS, **OPTIONS
            )  # fmt: skip
            _statistics_kernel[(samples,)](
                partials, statistics, output, size, blocks // WORD, WORD, ELEMENTS, BLOCK, **OPTIONS
            )  # fmt: skip
    return output, inside, statistics


def binary_sign_backward(
    grad_output: Tensor,
    input: Tensor | None,
    inside: Tensor | None,
    statistics: Tensor | None,
    channels_last: bool,
    estimator: str,
    o: float,
    t: float,
    interval: float,
) -> Tensor:
    """The operator ``tersor::binary_sign_backward`` for float16, bfloat16 and float32."""
    _check(grad_output)
    format = torch.channels_last if channels_last else torch.contiguous_format
    grad_output = grad_output.contiguous(memory_format=format)
    size = grad_output.numel()
    if input is None:
        check_mask("binary_sign", inside, grad_output.shape, grad_output.device)
        assert inside is not None
        grad_input = torch.empty_like(grad_output)
        launch(_inside_kernel, size, grad_output, inside.contiguous(), grad_input)
        return grad_input
    _check(input, grad_output.shape)
    input = input.contiguous(memory_format=format)
    grad_input = torch.empty_like(input)
    numbers = _numbers(Estimator(estimator, o, t, interval), input.dtype if statistics is None else torch.float32)
    if statistics is None:
        launch(_backward_kernel, size, grad_output, input, grad_input, *numbers, RULE=estimator)
        return grad_input
    samples = input.shape[0] if input.dim() == 4 else 0
    if statistics.dtype != torch.float32 or tuple(statistics.shape) != (samples, 2):
        raise ValueError(
            f"binary_sign: statistics must be torch.float32 of shape ({samples}, 2), "
            f"got {statistics.dtype} of shape {tuple(statistics.shape)}"
        )
    if size:
        size //= samples
        blocks = triton.cdiv(size, ELEMENTS)
        each = triton.cdiv(blocks, PARTS)
        parts = triton.cdiv(triton.cdiv(blocks, each), WORD) * WORD
        partials = statistics.new_empty((samples, parts))
        vector, statistics = _vector(size), statistics.contiguous()
        with torch.cuda.device_of(input):
            _partial_sums_kernel[(samples * parts,)](
                grad_output, input, statistics, partials, *numbers, size // vector, parts, each,
                estimator, vector, ELEMENTS, **OPTIONS,
            )  # fmt: skip
            _scaled_backward_kernel[(samples * blocks,)](
                grad_output, input, statistics, partials, grad_input, *numbers, size // vector, parts // WORD, blocks,
                estimator, vector, WORD, ELEMENTS, PARTS, **OPTIONS,
            )  # fmt: skip
    return grad_input


def _rounded(value: float, dtype: torch.dtype) -> float:
    """To the dtype that the input is compared in."""
    return torch.tensor(value, dtype=dtype).item()


def _numbers(rule: Estimator, dtype: torch.dtype) -> tuple[float, ...]:
    """What :func:`_slope` takes; the chord is of the interval as given."""
    bounds = _rounded(rule.t, dtype), _rounded(rule.interval, dtype)
    if rule.name != "reste":
        return *bounds, 0.0, 0.0, 0.0, 0.0, 0.0
    return *bounds, rule.chord, 1 / rule.o, *split((1 - rule.o) / rule.o)


def _vector(size: int) -> int:
    return math.gcd(size, 8)


def _check(tensor: Tensor, shape: torch.Size | None = None) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    if tensor.dtype not in SUMS:
        raise TypeError(f"binary_sign: the Triton kernels take float16, bfloat16 and float32, got {tensor.dtype}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"binary_sign: input must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles: activations of ResNet-18's second stage, 64 of 128 x 28 x 28."""
    size = 128 * 28 * 28
    numbers: dict[str, str] = dict.fromkeys(_NUMBERS, "fp32")
    kinds = numbers | {"inside": "*u8:16"}
    for label, own in (("bits", {}), ("no bits", {"inside": None})):
        yield from cases(_forward_kernel, {label: own}, kinds, ["input", "output"])
    yield from cases(_inside_kernel, {"": {}}, kinds, ["grad_output", "grad_input"])
    rules: dict[str, dict[str, Any]] = {rule: {"RULE": rule} for rule in ("ste", "approx", "reste")}
    yield from cases(_backward_kernel, rules, kinds, ["grad_output", "input", "grad_input"])
    tile = {"VECTOR": _vector(size), "WORD": WORD, "ELEMENTS": ELEMENTS, "PARTS": PARTS}
    for name in ("fp16", "fp32"):
        data = dict.fromkeys(("input", "output", "grad_output", "grad_input"), f"*{name}:16")
        kinds = numbers | data | dict.fromkeys(("partials", "statistics"), "*fp32:16")
        scaled = [(_moments_kernel, ""), (_statistics_kernel, "")]
        scaled += [(k, rule) for k in (_partial_sums_kernel, _scaled_backward_kernel) for rule in ("approx", "reste")]
        for kernel, rule in scaled:
            every = tile | {"RULE": rule, "BLOCK": BLOCK if kernel is _statistics_kernel else ELEMENTS}
            constants = {k: v for k, v in every.items() if k in kernel.arg_names}
            signature = {a: kinds.get(a, "i32") for a in kernel.arg_names if a not in constants}
            yield kernel, f"{rule} {name}".strip(), signature, constants, OPTIONS
