"""Linear layer whose weight gradient is computed only where something is still free."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import autocast_tensors, call_function, is_autocast_enabled, operator
from tersor.freezing.freeze_plan import DENSE, FreezePlan, freeze_plan
from tersor.freezing.mask import check_mask, unpack_mask
from tersor.freezing.zero_frozen import masked


def frozen_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    frozen: Tensor | None = None,
    plan: FreezePlan | None = None,
) -> Tensor:
    r"""``torch.nn.functional.linear`` with the gradient of frozen weights left out.

    The weight's gradient is the dense one with zeros where ``frozen`` has a 1, found by one of these ways, which
    ``plan`` names: the dense product; only the tiles, the output channels or the input channels in which something is
    free; or nothing at all, where the gradient is None and ``input`` is not kept for the backward pass.

    Args:
        input: ``(..., I)``; float16, bfloat16, float32 or float64.
        weight: ``(O, I)``.
        bias: ``(O,)``.
        frozen: packed mask of the weight, see :func:`pack_mask`; it must stay as it is until the backward pass. None
            for no zeros besides what ``plan`` leaves out, as where :func:`lts_quantize` puts them in.
        plan: from :func:`freeze_plan` for this mask or an earlier one of the same training; None makes one now, which
            reads the mask (on a GPU, waits for it).

    Returns:
        ``(..., O)``, in the autocast dtype where autocast is on.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source of the masks: Zhong et al., arXiv 2211.08544; the authors compute the dense gradient and mask it.
    """
    name = "frozen_linear"
    given = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(name, **given)
    if weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: input must be (..., I) for a weight (O, I), got shapes {tuple(input.shape)} and "
            f"{tuple(weight.shape)}"
        )
    check_layer(name, weight, bias, input)
    plan = check_plan(name, weight, frozen, plan)
    input, weight, *rest = autocast_tensors(input.device.type, *given.values())
    return call_function(_FrozenLinear, input, weight, rest[0] if rest else None, frozen, *plan[:3])


def check_layer(where: str, weight: Tensor, bias: Tensor | None, input: Tensor) -> None:
    """What a linear layer and a convolution ask of their tensors; these are floating-point already."""
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{where}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{where}: {name} must be on the device of input {input.device}, got {tensor.device}")
        if tensor.dtype != input.dtype and not is_autocast_enabled(input.device.type):
            raise TypeError(f"{where}: {name} must have the dtype of input {input.dtype}, got {tensor.dtype}")


def check_plan(
    where: str, weight: Tensor, frozen: Tensor | None, plan: FreezePlan | None, groups: int = 1
) -> FreezePlan:
    """The plan to go by."""
    if plan is not None and not isinstance(plan, FreezePlan):
        raise TypeError(f"{where}: plan must be a FreezePlan or None, got {type(plan).__name__}")
    if plan is not None and plan.shape is not None and plan.shape != tuple(weight.shape[:2]):
        raise ValueError(
            f"{where}: plan must be of this weight {tuple(weight.shape)}, got one of {plan.shape} channels"
        )
    if frozen is not None:
        check_mask(where, frozen, weight.shape, weight.device)
        return freeze_plan(frozen, weight.shape, groups=groups) if plan is None else plan
    return DENSE if plan is None else plan


class _FrozenLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, frozen, level, index, tile):
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, frozen, ctx.level, index, ctx.tile = inputs
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
            grad_input = grad_output @ weight
        if ctx.needs_input_grad[1] and input is not None:
            rows = grad_output.reshape(-1, grad_output.shape[-1]), input.reshape(-1, input.shape[-1])
            grad_weight = _weight_gradient(*rows, frozen, ctx.level, index, ctx.tile)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_input, grad_weight, grad_bias, None, None, None, None


def _weight_gradient(
    grad_output: Tensor, input: Tensor, frozen: Tensor | None, level: str, index: Any, tile: tuple[int, int]
) -> Tensor:
    if level == "tiles":
        return _backward(grad_output, input, frozen, index, *tile)
    if level == "dense":
        gradient = grad_output.t() @ input
    elif level == "rows":
        gradient = input.new_zeros(grad_output.shape[1], input.shape[1])
        gradient.index_copy_(0, index, grad_output.index_select(1, index).t() @ input)
    else:
        gradient = input.new_zeros(grad_output.shape[1], input.shape[1])
        gradient.index_copy_(1, index, grad_output.t() @ input.index_select(1, index))
    return masked(gradient, frozen)


def _reference_backward(
    grad_output: Tensor, input: Tensor, frozen: Tensor | None, tiles: Tensor, tile_rows: int, tile_columns: int
) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    gradient = grad_output.to(dtype).t() @ input.to(dtype)
    free = listed(tiles, gradient.shape, tile_rows, tile_columns)
    if frozen is not None:
        free = free & ~unpack_mask(frozen, gradient.shape)
    return torch.where(free, gradient, 0).to(input.dtype)


def listed(tiles: Tensor, shape: torch.Size, tile_rows: int, tile_columns: int) -> Tensor:
    """Bool, of the given shape (output channels, input channels): whether an element lies in one of the tiles."""
    grid = tiles.new_zeros((-(-shape[0] // tile_rows), -(-shape[1] // tile_columns)), dtype=torch.bool)
    grid = grid.index_put((tiles[:, 0].long(), tiles[:, 1].long()), torch.ones_like(tiles[:, 0], dtype=torch.bool))
    whole = grid.repeat_interleave(tile_rows, 0).repeat_interleave(tile_columns, 1)
    return whole[: shape[0], : shape[1]]


def _fake_backward(grad_output: Tensor, input: Tensor, *_: Any) -> Tensor:
    return input.new_empty((grad_output.shape[1], input.shape[1]))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [[a] * info.batch_size if dim is None else a.unbind(dim) for a, dim in zip(args, in_dims, strict=True)]
    return torch.stack([_backward.overload(*each) for each in zip(*mapped, strict=True)]), 0


_backward = operator(
    "frozen_linear_backward(Tensor grad_output, Tensor input, Tensor? frozen, Tensor tiles, int tile_rows,"
    " int tile_columns) -> Tensor grad_weight",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
