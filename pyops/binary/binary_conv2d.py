"""Convolution of signs with signs in training: whole numbers, and two bits a sign for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import as_int, check_floating, check_window
from tersor._operator import call_function, operator
from tersor._window import check_fits, empty_output, is_channels_last, output_sizes
from tersor.binary.binary_packed_conv2d import MOST_TERMS
from tersor.binary.pack_signs import _pack_signs
from tersor.binary.unpack_signs import _unpack_signs


def binary_conv2d(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """scale times ``conv2d`` of sign(input) with sign(weight); zeros, also of the padding, count as 0.

    The sums are exact whole numbers, and the product is rounded once to the dtype. The gradients are those of
    ``conv2d`` at the signs, which pass the sign itself unchanged: put :func:`binary_sign` or its like in front. For the
    backward pass two bits for each element of the input and the weight are kept, and ``scale``: its gradient is a sum
    over the weight's, sum(g y) = sum(grad_weight sign(weight)), so that no output is kept.

    Args:
        input: ``(N, C, H, W)``; float16, bfloat16, float32 or float64; any strides.
        weight: ``(O, C / groups, KH, KW)``, of the input's dtype; at most 2^23 weights for an output.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``.
        scale: ``(O,)`` or of one element, of the input's dtype; None for 1.

    Returns:
        ``(N, O, H', W')`` in the input's dtype, in channels-last memory format if the input is in it, else
        contiguous. Differentiable once. Under autocast works in that dtype.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "binary_conv2d"
    check_floating(name, input=input, weight=weight)
    groups = as_int(name, groups=groups)
    if input.dim() != 4 or not input.shape[1]:
        raise ValueError(f"{name}: input must be (N, C, H, W) with C of at least 1, got shape {tuple(input.shape)}")
    if groups < 1 or input.shape[1] % groups:
        raise ValueError(f"{name}: groups must divide the input channels ({input.shape[1]}), got {groups}")
    inputs = input.shape[1] // groups
    if weight.dim() != 4 or weight.shape[1] != inputs or not weight.numel() or weight.shape[0] % groups:
        raise ValueError(
            f"{name}: weight must be (O, {inputs}, KH, KW), not empty, with O a multiple of {groups}, "
            f"got shape {tuple(weight.shape)}"
        )
    if inputs * weight.shape[2] * weight.shape[3] > MOST_TERMS:
        raise ValueError(
            f"{name}: weight must have at most 2^23 weights for an output, got shape {tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(f"{name}: weight must be on the device of input {input.device}, got {weight.device}")
    if weight.dtype != input.dtype:
        raise TypeError(f"{name}: weight must have the dtype of input {input.dtype}, got {weight.dtype}")
    if scale is not None:
        check_floating(name, scale=scale)
        if scale.dim() > 1 or scale.numel() not in (1, weight.shape[0]):
            raise ValueError(
                f"{name}: scale must be ({weight.shape[0]},) or one number, got shape {tuple(scale.shape)}"
            )
        if scale.dtype != input.dtype or scale.device != input.device:
            raise TypeError(
                f"{name}: scale must be {input.dtype} on {input.device} like the input, got {scale.dtype} on "
                f"{scale.device}"
            )
        scale = scale.reshape(-1).expand(weight.shape[0])
    window = check_window(name, stride, padding, dilation)
    check_fits(name, input.shape, weight.shape[2:], *window)
    return call_function(_BinaryConv2d, input, weight, scale, *window, groups)[0]


def _reference(
    input: Tensor, weight: Tensor, scale: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(input)
    dtype = torch.promote_types(input.dtype, torch.float32)
    signs = torch.sign(input).to(dtype), torch.sign(weight).to(dtype)
    output = torch.round(F.conv2d(*signs, None, stride, padding, dilation, groups))
    output = output if scale is None else output * scale.to(dtype).view(-1, 1, 1)
    output = empty_output(input, output.shape, channels_last).copy_(output)
    return output, _pack_signs.overload(input, None, groups), _pack_signs.overload(weight, None, 1)


def _reference_backward(
    grad_output: Tensor,
    input_signs: Tensor,
    weight_signs: Tensor,
    scale: Tensor | None,
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = grad_output.dtype
    input = _unpack_signs.overload(input_signs, channels, dtype, channels_last)
    weight = _unpack_signs.overload(weight_signs, channels // groups, dtype, channels_last)
    window, needs = (stride, padding, dilation), (need_input, need_weight, need_scale)
    return convolution_gradients(grad_output, input, weight, scale, window, groups, channels_last, needs)


def convolution_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    window: Sequence[list[int]],
    groups: int,
    channels_last: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """For the signs ``input`` and ``weight``, by torch's convolutions; empty where not needed."""
    (need_input, need_weight, need_scale), dtype = needs, grad_output.dtype
    format = torch.channels_last if channels_last else torch.contiguous_format
    options = (None, *window, False, [0, 0], groups, [need_input, need_weight or need_scale, False])
    factor = None if scale is None else scale.to(dtype).view(-1, 1, 1, 1)
    scaled = weight if factor is None else weight * factor
    grads = torch.ops.aten.convolution_backward(grad_output.contiguous(memory_format=format), input, scaled, *options)
    grad_input, grad_weight, grad_scale = (grad_output.new_empty(0) for _ in range(3))
    if need_input:
        grad_input = grads[0].contiguous(memory_format=format)
    if need_scale:
        exact = torch.promote_types(dtype, torch.float32)
        grad_scale = (grads[1].to(exact) * weight.to(exact)).sum((1, 2, 3)).to(dtype)
    if need_weight:
        grad_weight = (grads[1] if factor is None else grads[1] * factor).contiguous()
    return grad_input, grad_weight, grad_scale


def _fake(
    input: Tensor, weight: Tensor, scale: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = output_sizes(input.shape, weight.shape[2:], stride, padding, dilation)
    output = empty_output(input, (input.shape[0], weight.shape[0], *sizes), is_channels_last(input))
    words = (input.shape[1] // groups + 63) // 64
    batch, _, height, width = input.shape
    input_signs = input.new_empty((2, batch, height, width, groups, words), dtype=torch.int64)
    outputs, _, *kernel = weight.shape
    return output, input_signs, input.new_empty((2, outputs, *kernel, 1, words), dtype=torch.int64)


def _fake_backward(
    grad_output: Tensor, input_signs: Tensor, weight_signs: Tensor, scale: Any, channels: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, groups, channels_last, need_input, need_weight, need_scale = args
    empty = grad_output.new_empty(0)
    _, batch, height, width, _, _ = input_signs.shape
    grad_input = empty_output(grad_output, (batch, channels, height, width), channels_last) if need_input else empty
    _, outputs, kernel_h, kernel_w, _, _ = weight_signs.shape
    shape = (outputs, channels // groups, kernel_h, kernel_w)
    grad_weight = grad_output.new_empty(shape) if need_weight else empty.clone()
    return grad_input, grad_weight, grad_output.new_empty((outputs,)) if need_scale else empty.clone()


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_binary_conv2d, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward.overload, info, in_dims, args)


class _BinaryConv2d(torch.autograd.Function):
    @staticmethod
    def forward(input, weight, scale, stride, padding, dilation, groups):
        return _forward(input, weight, scale, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, scale, *ctx.window, ctx.groups = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.channels, ctx.channels_last = input.shape[1], is_channels_last(input)
        ctx.dtypes = input.dtype, weight.dtype, None if scale is None else scale.dtype
        ctx.save_for_backward(*output[1:], scale)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 7
        options = (ctx.channels, *ctx.window, ctx.groups, ctx.channels_last, *ctx.needs_input_grad[:3])
        if grad_output.dtype == torch.float16 and grad_output.device.type == "cpu":
            grad_output = grad_output.float()  # torch's convolution would round the sums behind the scale's gradient
        *signs, scale = ctx.saved_tensors
        scale = scale if scale is None else scale.to(grad_output.dtype)  # under autocast that is another
        grads = _backward(grad_output, *signs, scale, *options)
        results = [
            grad.to(dtype) if need else None
            for grad, dtype, need in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        return (*results, None, None, None, None)

    vmap = staticmethod(_vmap)


def _binary_conv2d(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _BinaryConv2d.apply(*args)


_WINDOW = "int[] stride, int[] padding, int[] dilation, SymInt groups"
_forward = operator(
    f"binary_conv2d_forward(Tensor input, Tensor weight, Tensor? scale, {_WINDOW})"
    " -> (Tensor output, Tensor input_signs, Tensor weight_signs)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_binary_conv2d,
    autocast=True,
)
_backward = operator(
    "binary_conv2d_backward(Tensor grad_output, Tensor input_signs, Tensor weight_signs, Tensor? scale,"
    f" SymInt channels, {_WINDOW}, bool channels_last, bool need_input, bool need_weight, bool need_scale)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_scale)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
