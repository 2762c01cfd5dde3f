"""Convolution in whole numbers on GPUs: one launch finds the input's codes, one multiplies them as a matrix product.

The first reads the input and writes a byte per element, channels side by side, and their sum per position (float32,
which NaN goes with). In the second a program owns BLOCK_P output positions of one sample and BLOCK_O channels and walks
over the window's taps; a tap outside the image reads the code that stands for 0. Sums are whole numbers, and the end
of the formula is in float64, so that the results are the reference's, bit for bit.

With e = bytes of an element, the launches move N C H W (e + 1) bytes, then N C H W + N O H' W' e and the weight; the
neighbours' codes come from L1 and L2.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Quantisation is bit-exact: no contraction to fused multiply-add.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK, RUN = 8, 16  # of a prepared weight

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers, ties to even

_SIZES = ["height", "width", "out_height", "out_width", "groups", "in_channels", "out_channels", "blocks"]
_WINDOW = ["kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w", "dilation_h", "dilation_w"]


@triton.jit(do_not_specialize=["groups"])
def _quantize_kernel(
    input, lower, upper, scale, zero, codes, sums,
    size, groups, in_channels, channels, input_n, step,
    PER_SAMPLE: tl.constexpr, BITS: tl.constexpr, RELU: tl.constexpr, POINTS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``step`` elements lie between positions if channels are neighbours (POINTS), else between channels."""
    image = tl.program_id(1).to(tl.int64)  # sample and group
    sample = image // groups
    which = sample if PER_SAMPLE else 0
    low, high, s, z = tl.load(lower + which), tl.load(upper + which), tl.load(scale + which), tl.load(zero + which)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    step = tl.cast(step, tl.int64)
    channel = image % groups * in_channels
    first = input + sample * input_n + (channel if POINTS else channel * step)
    total = tl.zeros([BLOCK_P], tl.float32)
    half: tl.constexpr = 2 ** (BITS - 1)
    top: tl.constexpr = half if BITS < 8 else 127  # the extra top level of 8 bits has no code
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        present = (p < size)[:, None] & (c < in_channels)[None, :]
        if POINTS:  # noqa: SIM108 (the two are of different kinds)
            place = p.to(tl.int64)[:, None] * step + c[None, :]
        else:
            place = p[:, None] + c.to(tl.int64)[None, :] * step
        x = tl.load(first + place, mask=present, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
        if RELU:
            x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
        code = tl.maximum(s * x - z, -half, propagate_nan=tl.PropagateNan.ALL)
        code = tl.minimum(code, top, propagate_nan=tl.PropagateNan.ALL)
        code = (code + _MAGIC) - _MAGIC
        code = tl.where(present, code, 0.0)
        total += tl.sum(code, axis=1)
        byte = tl.where(code == code, code, 0.0).to(tl.int8)
        rows = codes + (image * size + p)[:, None] * channels + c[None, :]
        tl.store(rows, byte, mask=(p < size)[:, None] & (c < channels)[None, :])
    tl.store(sums + image * size + p, total, mask=p < size)


@triton.jit(do_not_specialize=_SIZES + _WINDOW)
def _convolve_kernel(
    codes, sums, weight, factor, constant, weight_zero, tap_sums, zero, bias, residual, output,
    height, width, out_height, out_width, groups, in_channels, channels, out_channels, blocks,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    output_n, output_c, output_p,
    PER_SAMPLE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OUTPUT_RELU: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles = (out_channels + BLOCK_O - 1) // BLOCK_O
    image = tl.program_id(1).to(tl.int64)
    sample = image // groups
    group = image % groups
    which = sample if PER_SAMPLE else 0
    z = tl.load(zero + which)
    pad = tl.minimum(tl.maximum(-z, -128.0), 127.0)  # the code for 0, or the nearest to it
    p = tl.program_id(0) // tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    valid = p < out_height * out_width
    top = p // out_width * stride_h - padding_h
    left = p % out_width * stride_w - padding_w
    taps = kernel_h * kernel_w
    real = o < out_channels
    channel = group * out_channels + o
    block = ((group * blocks + o // 8) * taps) * channels * 8 + o % 8 * 16

    products = tl.zeros([BLOCK_P, BLOCK_O], tl.int32)
    code_sum = tl.zeros([BLOCK_P], tl.float32)
    for tap in range(taps):
        y = top + tap // kernel_w * dilation_h
        x = left + tap % kernel_w * dilation_w
        inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = image * height * width + y * width + x
        code_sum += tl.load(sums + place, mask=inside, other=0.0)
        code_sum += tl.where(inside, 0.0, pad * in_channels)
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            a = tl.load(
                codes + place[:, None] * channels + c[None, :],
                mask=inside[:, None] & (c < channels)[None, :],
                other=pad.to(tl.int8),
            )  # [BLOCK_P, BLOCK_C]; beyond the channels the weights are zero
            b = tl.load(
                weight + (block + tap * channels * 8)[None, :] + (c // 16 * 128 + c % 16)[:, None],
                mask=(o < blocks * 8)[None, :] & (c < channels)[:, None],
                other=0,
            )  # [BLOCK_C, BLOCK_O]
            products = tl.dot(a, b, acc=products, out_dtype=tl.int32)

    of_sample = which * groups * out_channels + channel
    total = products.to(tl.float64) + tl.load(constant + of_sample, mask=real, other=0.0)[None, :]
    w_zero = tl.load(weight_zero + channel, mask=real, other=0.0)
    total += code_sum.to(tl.float64)[:, None] * w_zero[None, :]  # 0 NaN is NaN
    excess = (pad + z).to(tl.float64)
    if excess != 0:  # 0 lies beyond the bounds: away with what the taps outside have added
        for tap in range(taps):
            y = top + tap // kernel_w * dilation_h
            x = left + tap % kernel_w * dilation_w
            outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
            added = excess * tl.load(tap_sums + channel * taps + tap, mask=real, other=0.0)
            total -= tl.where(outside[:, None], added[None, :], 0.0)
    total *= tl.load(factor + of_sample, mask=real, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + channel, mask=real, other=0.0)[None, :]
    result = total.to(tl.float32)
    if RESIDUAL:
        added = residual + sample * output_n + p.to(tl.int64)[:, None] * output_p + channel[None, :] * output_c
        result += tl.load(added, mask=valid[:, None] & real[None, :], other=0.0).to(tl.float32)
    if OUTPUT_RELU:
        result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rows = output + sample * output_n + p.to(tl.int64)[:, None] * output_p + channel[None, :] * output_c
    tl.store(rows, result.to(output.dtype.element_ty), mask=valid[:, None] & real[None, :])


def quantized_conv2d(
    input: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    output_relu: bool,
    channels_last: bool,
) -> Tensor:
    """The operator ``tersor::quantized_conv2d`` for float16, bfloat16 and float32."""
    _check(input, weight, weight_sums, lower, upper, scale=weight_scale, zero=weight_zero, bias=bias)
    batch, _, height, width = input.shape
    groups, blocks, kernel_h, kernel_w, runs = weight.shape[:5]
    outputs, inputs, channels = weight_sums.shape[0], input.shape[1] // groups, runs * RUN
    windows = zip((height, width), (kernel_h, kernel_w), stride, padding, dilation, strict=True)
    out_height, out_width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in windows)
    format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch, outputs, out_height, out_width)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)
    if residual is not None and (residual.shape != output.shape or residual.dtype != output.dtype):
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ValueError(f"quantized_conv2d: residual must be {output.dtype} {tuple(output.shape)}, got {given}")
    if not output.numel():
        return output
    residual = None if residual is None else residual.contiguous(memory_format=format)  # the output's strides
    codes = torch.empty((batch, groups, height * width, channels), dtype=torch.int8, device=input.device)
    sums = torch.empty((batch, groups, height * width), dtype=torch.float32, device=input.device)
    points = input.stride(1) == 1 and input.stride(2) == width * input.stride(3)
    if not points and (input.stride(3) != 1 or input.stride(2) != width):
        input = input.contiguous()
    step = input.stride(3) if points else input.stride(1)
    # What is one number per sample or channel, by torch: in the order of fake_quantize_bounds, then in float64.
    lower, upper = torch.broadcast_tensors(lower.reshape(-1, 1), upper.reshape(-1, 1))
    scale = torch.full_like(upper, 2**bits - 1) / (upper - lower)
    zero = torch.round(scale * lower) + 2 ** (bits - 1)
    exact_zero = torch.zeros_like(weight_scale) if weight_zero is None else weight_zero
    exact_zero = exact_zero.double()
    tap_sums = weight_sums.double() + inputs * exact_zero.view(-1, 1, 1)
    constant = zero.double() * tap_sums.sum((1, 2))
    factor = weight_scale.double() / scale.double()
    per_sample = {"PER_SAMPLE": scale.numel() > 1}
    with torch.cuda.device_of(input):
        tile = _quantize_tile(channels, input.element_size())
        grid = (triton.cdiv(height * width, tile["BLOCK_P"]), batch * groups)
        tensors = (input, lower.contiguous(), upper.contiguous(), scale, zero, codes, sums)
        sizes = (height * width, groups, inputs, channels, input.stride(0), step)
        constants = per_sample | {"BITS": bits, "RELU": relu, "POINTS": points}
        _quantize_kernel[grid](*tensors, *sizes, **constants, **tile, **OPTIONS)
        tile = _convolve_tile(channels, outputs // groups, residual is not None)
        per_image = triton.cdiv(out_height * out_width, tile["BLOCK_P"])
        grid = (per_image * triton.cdiv(outputs // groups, tile["BLOCK_O"]), batch * groups)
        shift = None if bias is None else bias.double()
        tensors = (
            codes,
            sums,
            weight.contiguous(),
            factor,
            constant,
            exact_zero,
            tap_sums,
            zero,
            shift,
            residual,
            output,
        )
        sizes = (height, width, out_height, out_width, groups, inputs, channels, outputs // groups, blocks)
        window = (kernel_h, kernel_w, *stride, *padding, *dilation)
        strides = (output.stride(0), output.stride(1), outputs if channels_last else 1)
        end = {"BIAS": bias is not None, "RESIDUAL": residual is not None, "OUTPUT_RELU": output_relu}
        constants = per_sample | end
        _convolve_kernel[grid](*tensors, *sizes, *window, *strides, **constants, **tile, **OPTIONS)
    return output


def ahead_of_time_cases() -> Iterator[tuple[Any, str, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """What the ahead-of-time test compiles: kernel, label, signature, constants and options, as a launch has them."""
    tensors = {"codes": "*i8:16", "sums": "*fp32:16", "weight": "*i8:16"}
    tensors |= dict.fromkeys(("lower", "upper", "scale", "zero"), "*fp32:16")
    tensors |= dict.fromkeys(("factor", "constant", "weight_zero", "tap_sums", "bias"), "*fp64:16")
    tensors |= dict.fromkeys(("size", "in_channels", "channels", "input_n", "step", "output_n"), "i32:16")
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        types = tensors | dict.fromkeys(("input", "residual", "output"), f"*{name}:16")
        for points in (False, True):
            fixed = {"PER_SAMPLE": False, "BITS": 8, "RELU": True, "POINTS": points} | _quantize_tile(64, itemsize)
            signature = {a: types.get(a, "i32") for a in _quantize_kernel.arg_names if a not in fixed}
            yield _quantize_kernel, f"{name} {'points' if points else 'planes'}", signature, fixed, OPTIONS
        for residual in (False, True):
            end: dict[str, Any] = {"BIAS": True, "RESIDUAL": residual, "OUTPUT_RELU": residual}
            end |= {} if residual else {"residual": None}
            fixed = {"PER_SAMPLE": False, "output_p": 1} | end | _convolve_tile(64, 64, residual)
            signature = {a: types.get(a, "i32") for a in _convolve_kernel.arg_names if a not in fixed}
            label = f"{name} 64 to 64 channels{' and a residual' if residual else ''}"
            yield _convolve_kernel, label, signature | {"in_channels": "i32"}, fixed, OPTIONS


def _quantize_tile(channels: int, itemsize: int) -> dict[str, int]:
    """16 KiB: four 16-byte loads a thread."""
    block = min(triton.next_power_of_2(channels), 64)
    return {"BLOCK_P": 16384 // itemsize // block, "BLOCK_C": block}


def _convolve_tile(channels: int, outputs: int, residual: bool) -> dict[str, int]:
    """A byte product takes 32 channels or more, and 16 outputs or more; 128 x 64 sums are 32 registers a thread, beside
    which those of a residual would spill."""
    block = min(max(triton.next_power_of_2(outputs), 16), 64)
    return {"BLOCK_P": 64 if residual else 128, "BLOCK_O": block, "BLOCK_C": 32 if channels <= 32 else 64}


def _check(input: Tensor, weight: Tensor, sums: Tensor, lower: Tensor, upper: Tensor, **vectors: Tensor | None) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    name = "quantized_conv2d"
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: the Triton kernels take float16, bfloat16 and float32, got {input.dtype}")
    if input.dim() != 4 or weight.dim() != 7 or weight.dtype != torch.int8 or tuple(weight.shape[5:]) != (BLOCK, RUN):
        given = tuple(weight.shape)
        raise ValueError(f"{name}: input and weight must be (N, C, H, W) and int8 blocks of 8 by 16, got {given}")
    groups, blocks, kernel_h, kernel_w, runs = weight.shape[:5]
    if sums.dtype != torch.int32 or tuple(sums.shape[1:]) != (kernel_h, kernel_w) or sums.shape[0] % groups:
        raise ValueError(f"{name}: weight_sums must be int32 (O, KH, KW), got {sums.dtype} of {tuple(sums.shape)}")
    fits = input.shape[1] % groups == 0 and triton.cdiv(input.shape[1] // groups, RUN) == runs
    if not fits or triton.cdiv(sums.shape[0] // groups, BLOCK) != blocks:
        raise ValueError(
            f"{name}: weight must have blocks for {input.shape[1]} and {sums.shape[0]} channels, "
            f"got shape {tuple(weight.shape)}"
        )
    for what, bound in (("lower", lower), ("upper", upper)):
        if bound.dtype != torch.float32 or bound.numel() not in (1, input.shape[0]):
            raise ValueError(f"{name}: {what} must be float32, one or one per sample, got shape {tuple(bound.shape)}")
    for what, vector in vectors.items():
        if vector is not None and (vector.dtype != torch.float32 or tuple(vector.shape) != (sums.shape[0],)):
            raise ValueError(f"{name}: {what} must be float32 of shape ({sums.shape[0]},), got {tuple(vector.shape)}")
