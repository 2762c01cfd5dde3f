"""A gradient without what belongs to frozen weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import call_function, operator
from tersor.freezing.mask import check_mask, unpack_mask


def zero_frozen(input: Tensor, frozen: Tensor) -> Tensor:
    """``input`` with zeros where the packed mask ``frozen`` has a 1; non-finite elements become zero there too.

    Args:
        input: any shape; float16, bfloat16, float32 or float64.
        frozen: see :func:`pack_mask`.

    Returns:
        The shape and dtype of ``input``, contiguous. Its derivative is the function itself.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    check_floating("zero_frozen", input=input)
    check_mask("zero_frozen", frozen, input.shape, input.device)
    return call_function(_ZeroFrozen, input, frozen)


def masked(gradient: Tensor, frozen: Tensor | None) -> Tensor:
    """:func:`zero_frozen` for gradients; the gradient itself where that is cheaply known to change nothing."""
    if frozen is None:
        return gradient
    plain = type(frozen) is Tensor and frozen.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    if plain and not torch.compiler.is_compiling() and not frozen.any():
        return gradient
    return _forward(gradient, frozen)


def _reference(input: Tensor, frozen: Tensor) -> Tensor:
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    return output.copy_(torch.where(unpack_mask(frozen, input.shape), 0, input))


def _fake(input: Tensor, frozen: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _vmap(info: Any, in_dims: Any, input: Tensor, frozen: Tensor) -> tuple[Tensor, int]:
    inputs, masks = (
        [t] * info.batch_size if dim is None else t.unbind(dim) for t, dim in zip((input, frozen), in_dims, strict=True)
    )
    return torch.stack([_ZeroFrozen.apply(i, m) for i, m in zip(inputs, masks, strict=True)]), 0


class _ZeroFrozen(torch.autograd.Function):
    @staticmethod
    def forward(input, frozen):
        return _forward(input, frozen)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad_output):
        return _ZeroFrozen.apply(grad_output, *ctx.saved_tensors), None

    vmap = staticmethod(_vmap)


_forward = operator(
    "zero_frozen(Tensor input, Tensor frozen) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_ZeroFrozen.apply,
)
