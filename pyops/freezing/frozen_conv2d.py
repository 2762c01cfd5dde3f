"""Convolution whose weight gradient is computed only where something is still free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as dense

from tersor._checks import as_int, check_floating, check_window
from tersor._operator import autocast_tensors, call_function, operator
from tersor.freezing.freeze_plan import FreezePlan
from tersor.freezing.frozen_linear import check_layer, check_plan, listed
from tersor.freezing.mask import unpack_mask
from tersor.freezing.zero_frozen import masked


def frozen_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    frozen: Tensor | None = None,
    plan: FreezePlan | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with the gradient of frozen weights left out, see :func:`frozen_linear`.

    Args:
        input: ``(N, C, H, W)``; float16, bfloat16, float32 or float64.
        weight: ``(O, C / groups, KH, KW)``.
        bias: ``(O,)``.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``, in numbers. With several groups only
            the whole layer can be left out.
        frozen: packed mask of the weight, see :func:`pack_mask`; must stay as it is until the backward pass. None for
            no zeros besides what ``plan`` leaves out.
        plan: from :func:`freeze_plan`; None makes one now.

    Returns:
        ``(N, O, H', W')``, in the autocast dtype where autocast is on.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "frozen_conv2d"
    given = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(name, **given)
    groups = as_int(name, groups=groups)
    if weight.dim() != 4 or input.dim() != 4 or groups < 1 or input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"{name}: input must be (N, C, H, W) for a weight (O, C / groups, KH, KW), got shapes {tuple(input.shape)} "
            f"and {tuple(weight.shape)} for groups {groups}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({weight.shape[0]}), got {groups}")
    check_layer(name, weight, bias, input)
    window = check_window(name, stride, padding, dilation)
    plan = check_plan(name, weight, frozen, plan, groups)
    input, weight, *rest = autocast_tensors(input.device.type, *given.values())
    bias = rest[0] if rest else None
    return call_function(_FrozenConv2d, input, weight, bias, frozen, *window, groups, *plan[:3])


class _FrozenConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, frozen, stride, padding, dilation, groups, level, index, tile):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, frozen, *ctx.window, ctx.groups, ctx.level, index, ctx.tile = inputs
        ctx.input_shape, ctx.weight_shape = input.shape, weight.shape
        needed = ctx.needs_input_grad
        wanted = needed[1] and ctx.level != "layer"
        ctx.save_for_backward(
            input if wanted else None, weight if needed[0] else None, frozen if wanted else None, index
        )

    @staticmethod
    def backward(ctx, grad_output):
        input, weight, frozen, index = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = dense.conv2d_input(ctx.input_shape, weight, grad_output, *ctx.window, ctx.groups)
        if ctx.needs_input_grad[1] and input is not None:
            grad_weight = _weight_gradient(ctx, grad_output, input, frozen, index)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias, *[None] * 8


def _weight_gradient(ctx: Any, grad_output: Tensor, input: Tensor, frozen: Tensor | None, index: Any) -> Tensor:
    rows, columns, *kernel_size = ctx.weight_shape
    stride, padding, dilation = ctx.window
    if ctx.level == "tiles":
        return _backward(grad_output, input, frozen, index, kernel_size, stride, padding, dilation, *ctx.tile)
    if ctx.level == "dense":
        gradient = dense.conv2d_weight(input, ctx.weight_shape, grad_output, stride, padding, dilation, ctx.groups)
    elif ctx.level == "rows":
        size = (len(index), columns, *kernel_size)
        some = dense.conv2d_weight(input, size, grad_output.index_select(1, index), stride, padding, dilation)
        gradient = input.new_zeros(ctx.weight_shape).index_copy_(0, index, some)
    else:
        size = (rows, len(index), *kernel_size)
        some = dense.conv2d_weight(input.index_select(1, index), size, grad_output, stride, padding, dilation)
        gradient = input.new_zeros(ctx.weight_shape).index_copy_(1, index, some)
    return masked(gradient, frozen)


def _reference_backward(
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
    dtype = torch.promote_types(input.dtype, torch.float32)
    shape = (grad_output.shape[1], input.shape[1], *kernel_size)
    gradient = dense.conv2d_weight(input.to(dtype), shape, grad_output.to(dtype), stride, padding, dilation)
    free = listed(tiles, gradient.shape[:2], tile_rows, tile_columns)[:, :, None, None]
    if frozen is not None:
        free = free & ~unpack_mask(frozen, shape)
    return torch.where(free, gradient, 0).to(input.dtype).contiguous()


def _fake_backward(
    grad_output: Tensor, input: Tensor, frozen: Tensor | None, tiles: Tensor, kernel_size: Sequence[int], *_: Any
) -> Tensor:
    return input.new_empty((grad_output.shape[1], input.shape[1], *kernel_size))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [
        a.unbind(dim) if isinstance(dim, int) else [a] * info.batch_size for a, dim in zip(args, in_dims, strict=True)
    ]
    return torch.stack([_backward.overload(*each) for each in zip(*mapped, strict=True)]), 0


_backward = operator(
    "frozen_conv2d_backward(Tensor grad_output, Tensor input, Tensor? frozen, Tensor tiles, int[] kernel_size,"
    " int[] stride, int[] padding, int[] dilation, int tile_rows, int tile_columns) -> Tensor grad_weight",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
