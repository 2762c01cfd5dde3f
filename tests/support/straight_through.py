"""The quantisers as chains of torch operations with straight-through rounding, differentiated by torch itself.

Independent of the references' written derivatives; all in the dtype of the tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_through(x: Tensor) -> Tensor:
    """Rounds half to even; the gradient passes as if it did not. Bits as ``torch.round``'s."""
    return _RoundThrough.apply(x)


class _RoundThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.round(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def number(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value)


def ddtb(x: Tensor, lower: Tensor, upper: Tensor, bits: int, relu: bool = False) -> Tensor:
    x = torch.relu(x) if relu else x
    scale = number(upper, 2**bits - 1) / (upper - lower)
    zero = round_through(scale * lower) + 2 ** (bits - 1)
    clipped = torch.maximum(torch.minimum(x, upper), lower)
    return (round_through(scale * clipped - zero) + zero) / scale


def unit(x: Tensor, lower: Tensor, upper: Tensor, bits: int, signed: bool = False, relu: bool = False) -> Tensor:
    x = torch.relu(x) if relu else x
    levels = 2**bits - 1
    part = (x - lower) / (upper - lower)
    part = torch.where(part < 0, 0, torch.where(part > 1, 1, part))  # clamp's gradient at a bound is 1 until torch 2.13
    output = round_through(part * levels) / levels
    return (output - 0.5) * 2 if signed else output


def lsq(x: Tensor, scale: Tensor, quant_min: int, quant_max: int, grad_factor: float) -> Tensor:
    """As the paper writes it: a gradient scale, then strict masks from a hard clip."""
    scale = _scale_gradient(scale, grad_factor)
    value = x / scale
    clipped = torch.where(value <= quant_min, quant_min, torch.where(value >= quant_max, quant_max, value))
    return round_through(clipped) * scale


def lsq_plus(x: Tensor, scale: Tensor, offset: Tensor, levels: int, grad_factor: float) -> Tensor:
    scale, offset = _scale_gradient(scale, grad_factor), _scale_gradient(offset, grad_factor)
    value = (x - offset) / scale
    clipped = torch.where(value <= 0, 0, torch.where(value >= levels, levels, value))
    return round_through(clipped) * scale + offset


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    return _ScaleGradient.apply(x, factor)


class _ScaleGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, factor):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None
