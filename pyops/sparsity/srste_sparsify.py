"""A weight with the smallest elements of every group set to zero, refined straight through (SR-STE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import call_function, operator
from tersor.freezing.mask import pack_mask, unpack_mask
from tersor.sparsity.nm_pattern import check_groups, check_pattern, from_groups, to_groups
from tersor.sparsity.nm_sparsify import _unbound


def srste_sparsify(weight: Tensor, n: int, m: int, decay: float = 2e-4) -> Tensor:
    r"""Keeps the n largest of every m elements in absolute value: output = mask W.

    The gradient goes to all elements, and those that are zero now decay:

        grad_weight = grad_output + decay (1 - mask) W

    Args:
        weight: ``(O, I)`` or ``(O, I, KH, KW)``, elements a multiple of m, in the groups of :func:`nm_sparsify`;
            float16, bfloat16, float32 or float64. Of equal elements the one with the lower index is set to zero first.
        n, m: 1 <= n < m <= 16.
        decay: of the elements that are zero.

    Returns:
        The shape, dtype and strides of ``weight``. Differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", arXiv 2102.04010.
    """
    name = "srste_sparsify"
    n, m = check_pattern(name, n, m)
    check_floating(name, weight=weight)
    check_groups(name, weight.shape, m)
    return call_function(_SrsteSparsify, weight, n, m, float(decay))[0]


def _reference(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    groups = to_groups(weight, m)
    smallest = torch.sort(groups.abs(), dim=1, stable=True).indices[:, : m - n]
    kept = torch.ones_like(groups, dtype=torch.bool).scatter(1, smallest, False)
    output = torch.empty_like(weight).copy_(from_groups(torch.where(kept, groups, 0), weight.shape))
    return output, pack_mask(kept)


def _reference_backward(grad_output: Tensor, weight: Tensor, mask: Tensor, m: int, decay: float) -> Tensor:
    groups = to_groups(weight, m)
    exact = groups.to(torch.promote_types(weight.dtype, torch.float32))
    pruned = torch.where(unpack_mask(mask, groups.shape), 0, decay * exact)
    total = to_groups(grad_output, m).to(exact.dtype) + pruned
    return torch.empty_like(weight).copy_(from_groups(total, weight.shape))


def _fake(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(((weight.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_backward(grad_output: Tensor, weight: Tensor, mask: Tensor, m: int, decay: float) -> Tensor:
    return torch.empty_like(weight)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    results = [_SrsteSparsify.apply(*each, 0.0) for each in _unbound(info, in_dims, args)]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)


def _vmap_function(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    results = [_SrsteSparsify.apply(*each) for each in _unbound(info, in_dims, args)]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return torch.stack([_backward.overload(*each) for each in _unbound(info, in_dims, args)]), 0


class _SrsteSparsify(torch.autograd.Function):
    @staticmethod
    def forward(weight, n, m, decay):
        return _forward(weight, n, m)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, ctx.m, ctx.decay = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        return _backward(grad_output, *ctx.saved_tensors, ctx.m, ctx.decay), None, None, None

    vmap = staticmethod(_vmap_function)


def _straight_through(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    return _SrsteSparsify.apply(weight, n, m, 0.0)


_forward = operator(
    "srste_sparsify_forward(Tensor weight, int n, int m) -> (Tensor output, Tensor mask)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_straight_through,
)
_backward = operator(
    "srste_sparsify_backward(Tensor grad_output, Tensor weight, Tensor mask, int m, float decay) -> Tensor grad_weight",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
