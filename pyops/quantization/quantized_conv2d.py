"""Convolution of a quantised activation with quantised weights, in whole numbers; for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._checks import as_int, check_floating, check_window
from tersor._operator import operator
from tersor._window import check_fits, empty_output, is_channels_last, output_sizes
from tersor.quantization._quantizer import check_bits
from tersor.quantization.fake_quantize_bounds import check_bounds

BLOCK = 8  # output channels that lie together in a packed weight
RUN = 16  # input channels that lie side by side in it
MOST_TERMS = 65536  # of one sum: 255 * 128 * 65536 < 2**31
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantized_conv2d(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    output_relu: bool = False,
) -> Tensor:
    r"""``conv2d`` of the input quantised between two bounds with a weight given by its codes.

    The input's codes are those of :func:`fake_quantize_bounds` (rule ``"ddtb"``), found on the fly. With its s and z,

    .. math:: output = bias + \frac{weight\_scale}{s} \sum (q + z)\,(weight + weight\_zero),

    where the sum runs over the taps inside the image, in whole numbers without any rounding. What then is rounded:
    the result, once to float32 (and from there to a half type). Against ``conv2d`` of the two fake-quantised float32
    tensors, itself summed without rounding, the difference is at most 2 eps times the sum of the terms' absolute
    values, bias included, with eps = 2^-23: the rounding of these tensors.

    With 8 bits the level that :func:`fake_quantize_bounds` adds at the top for some bounds has no code; its elements
    take the level below. Fewer bits have all levels.

    Args:
        input: ``(N, C, H, W)``, float16, bfloat16 or float32; any strides. NaN comes out of each window it is in.
        weight: codes ``(O, C / groups, KH, KW)``, int8; ``KH KW C / groups`` at most 65536.
        weight_scale: size of the weights' steps; floating point, one element or ``(O,)``.
        weight_zero: whole numbers that are added to the codes, likewise; None for none.
        lower, upper: bounds, one element each or one per sample ``(N, 1, 1, 1)``.
        bits: of the input's codes, 2 to 8.
        bias: ``(O,)``, floating point.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``; the padding stands for 0.
        relu: quantise ``relu(input)`` instead, in the same pass.
        residual: added to the result, in float32; of the output's shape and the input's dtype. None for none.
        output_relu: then take the ReLU.

    Returns:
        ``(N, O, H', W')`` in the input's dtype, in channels-last memory format if the input is in it, else
        contiguous. Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or number is not as stated or does not fit the others; or, on the CPU, a bound is not
            finite or ``lower >= upper``.
    """
    name = "quantized_conv2d"
    prepared = prepare_weight(weight, weight_scale, weight_zero, bias, groups)
    window = check_window(name, stride, padding, dilation)
    end: dict[str, Any] = {"residual": residual, "output_relu": output_relu}
    return convolve(name, input, prepared, lower, upper, bits, *window, relu=relu, **end)


class PreparedWeight(NamedTuple):
    """A weight as the kernels read it; made once by :func:`prepare_weight`.

    ``blocks`` is ``(groups, ceil(O / groups / 8), KH, KW, ceil(C / groups / 16), 8, 16)``: the codes with the last two
    dimensions over output and input channels, zero beyond them. ``sums`` ``(O, KH, KW)`` int32 adds up the codes over
    the input channels. ``scale``, ``zero`` and ``bias`` are float32 of shape ``(O,)``.
    """

    blocks: Tensor
    sums: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    channels: int  # C / groups


def prepare_weight(
    weight: Tensor, weight_scale: Tensor, weight_zero: Tensor | None, bias: Tensor | None, groups: int = 1
) -> PreparedWeight:
    """Arguments as for :func:`quantized_conv2d`, checked."""
    name = "quantized_conv2d"
    groups = as_int(name, groups=groups)
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: weight must be a tensor of int8, got {given}")
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(f"{name}: weight must be (O, C / groups, KH, KW), not empty, got shape {tuple(weight.shape)}")
    outputs, channels, height, width = weight.shape
    if groups < 1 or outputs % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({outputs}), got {groups}")
    if channels * height * width > MOST_TERMS:
        raise ValueError(
            f"{name}: weight must have at most {MOST_TERMS} codes per output channel, got {channels * height * width}"
        )
    check_floating(name, weight_scale=weight_scale)
    numbers = {}
    for argument, tensor in (("weight_scale", weight_scale), ("weight_zero", weight_zero), ("bias", bias)):
        if tensor is None:
            continue
        check_floating(name, **{argument: tensor})
        if tensor.device != weight.device:
            raise ValueError(f"{name}: {argument} must be on the device of weight {weight.device}, got {tensor.device}")
        if tuple(tensor.shape) != (outputs,) and (argument == "bias" or tensor.numel() != 1):
            one = "" if argument == "bias" else "one element or "
            raise ValueError(f"{name}: {argument} must have {one}shape ({outputs},), got shape {tuple(tensor.shape)}")
        numbers[argument] = tensor.detach().float().reshape(-1).expand(outputs).contiguous()
    codes = weight.reshape(groups, outputs // groups, channels, height * width)
    codes = F.pad(codes, (0, 0, 0, -channels % RUN, 0, -(outputs // groups) % BLOCK))
    codes = codes.unflatten(2, (-1, RUN)).unflatten(1, (-1, BLOCK))  # g, blocks, 8, runs, 16, taps
    blocks = codes.permute(0, 1, 5, 3, 2, 4).contiguous().unflatten(2, (height, width))
    sums = weight.sum(1, dtype=torch.int32)
    return PreparedWeight(
        blocks, sums, numbers["weight_scale"], numbers.get("weight_zero"), numbers.get("bias"), channels
    )


def convolve(
    name: str,
    input: Tensor,
    weight: PreparedWeight,
    lower: Tensor,
    upper: Tensor,
    bits: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    relu: bool = False,
    residual: Tensor | None = None,
    output_relu: bool = False,
    channels_last: bool = False,
) -> Tensor:
    """:func:`quantized_conv2d` with a prepared weight and checked window; ``name`` is for errors.

    ``channels_last`` asks for that memory format; it is taken for an input in it anyway.
    """
    lower, upper = _check_input(name, input, weight, lower, upper)
    bits = check_bits(name, bits)
    if bits == 32:
        raise ValueError(f"{name}: bits must be 2 to 8, got 32")
    check_fits(name, input.shape, weight.sums.shape[1:], stride, padding, dilation)
    channels_last = channels_last or is_channels_last(input)
    window = (list(stride), list(padding), list(dilation))
    if residual is not None:
        sizes = output_sizes(input.shape, weight.sums.shape[1:], stride, padding, dilation)
        residual = _checked_residual(name, residual, input, (input.shape[0], weight.sums.shape[0], *sizes))
        residual = residual.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    numbers = (lower, upper, weight.bias, residual, bits)
    switches = (bool(relu), bool(output_relu), channels_last)
    try:
        return _quantized_conv2d.inference(input, *weight[:3], weight.zero, *numbers, *window, *switches)
    except RuntimeError:
        explain_bounds(name, input, lower, upper)
        raise


def explain_bounds(name: str, input: Tensor, lower: Tensor, upper: Tensor) -> None:
    """The C++ kernels refuse bounds that are none; here is said which."""
    if input.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(lower, upper, name)


def _checked_residual(name: str, residual: Any, input: Tensor, shape: Sequence[int]) -> Tensor:
    check_floating(name, residual=residual)
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"{name}: residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.dtype != input.dtype or residual.device != input.device:
        raise ValueError(
            f"{name}: residual must be {input.dtype} on {input.device} as input is, got {residual.dtype} on "
            f"{residual.device}"
        )
    return residual


def _check_input(
    name: str, input: Tensor, weight: PreparedWeight, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The bounds in float32."""
    check_quantized_input(name, input, weight, lower, upper)
    channels = weight.blocks.shape[0] * weight.channels
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"{name}: input must be (N, {channels}, H, W) for this weight, got shape {tuple(input.shape)}")
    for argument, bound in (("lower", lower), ("upper", upper)):
        if bound.numel() != 1 and tuple(bound.shape) != (input.shape[0], 1, 1, 1):
            raise ValueError(
                f"{name}: {argument} must have one element or shape ({input.shape[0]}, 1, 1, 1), "
                f"got shape {tuple(bound.shape)}"
            )
    return lower.float(), upper.float()


def check_quantized_input(name: str, input: Tensor, weight: PreparedWeight, lower: Tensor, upper: Tensor) -> None:
    """Types and devices."""
    check_floating(name, input=input, lower=lower, upper=upper)
    if input.dtype not in DTYPES:
        raise TypeError(f"{name}: input must be float16, bfloat16 or float32, got {input.dtype}")
    for argument, tensor in (("weight", weight.blocks), ("lower", lower), ("upper", upper)):
        if tensor.device != input.device:
            raise ValueError(f"{name}: {argument} must be on the device of input {input.device}, got {tensor.device}")


def _reference(
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
    """Whole numbers in float64, which holds them all."""
    if input.device.type == "cpu":
        check_bounds(lower, upper, "quantized_conv2d")
    lower, upper = (b.reshape(-1, 1, 1, 1) for b in (lower, upper))
    half = 2 ** (bits - 1)
    scale = torch.full_like(upper, 2**bits - 1) / (upper - lower)
    zero = torch.round(scale * lower) + half
    x = torch.relu(input.float()) if relu else input.float()
    clipped = torch.maximum(torch.minimum(x, upper), lower)
    codes = torch.round(scale * clipped - zero).clamp(-half, min(half, 255 - half))  # of 8 bits, a byte has 256
    groups = weight.shape[0]
    exact = _unblock(weight, weight_sums.shape[0], input.shape[1] // groups).double()
    if weight_zero is not None:
        exact = exact + weight_zero.double().view(-1, 1, 1, 1)
    total = F.conv2d(codes.double() + zero.double(), exact, None, stride, padding, dilation, groups)
    output = total * (weight_scale.double().view(-1, 1, 1) / scale.double())
    if bias is not None:
        output = output + bias.double().view(-1, 1, 1)
    output = output.float() if residual is None else output.float() + residual.float()
    return empty_output(input, output.shape, channels_last).copy_(torch.relu(output) if output_relu else output)


def _unblock(blocks: Tensor, outputs: int, channels: int) -> Tensor:
    """The codes ``(O, C / groups, KH, KW)`` of :class:`PreparedWeight`'s blocks."""
    groups, _, height, width = blocks.shape[:4]
    codes = blocks.permute(0, 1, 5, 4, 6, 2, 3).reshape(groups, blocks.shape[1] * BLOCK, -1, height, width)
    return codes[:, : outputs // groups, :channels].reshape(outputs, channels, height, width)


def _fake(input: Tensor, weight: Tensor, weight_sums: Tensor, *args: Any) -> Tensor:
    stride, padding, dilation, _, _, channels_last = args[-6:]
    sizes = output_sizes(input.shape, weight_sums.shape[1:], stride, padding, dilation)
    return empty_output(input, (input.shape[0], weight_sums.shape[0], *sizes), channels_last)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [a.unbind(d) if isinstance(d, int) else [a] * info.batch_size for a, d in zip(args, in_dims, strict=True)]
    return torch.stack([_quantized_conv2d.overload(*each) for each in zip(*mapped, strict=True)]), 0


_quantized_conv2d = operator(
    "quantized_conv2d(Tensor input, Tensor weight, Tensor weight_sums, Tensor weight_scale, Tensor? weight_zero,"
    " Tensor lower, Tensor upper, Tensor? bias, Tensor? residual, int bits, int[] stride, int[] padding,"
    " int[] dilation, bool relu, bool output_relu, bool channels_last) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
