"""Binary layers as the published code computes them, in eager torch: what the benchmarks compare with.

Not the published code: written from its formulas, with the same passes, temporary tensors and transfers to the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Clipped(torch.autograd.Function):
    """Straight through where the input is at most 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad[x.abs() > 1] = 0
        return grad


class _Triangle(torch.autograd.Function):
    """ReCU's activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = 2 - torch.abs(2 * x)
        slope[x >= 1] = 0
        slope[x <= -1] = 0
        return grad.clone() * slope


class _Power(torch.autograd.Function):
    """ReSTE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, o: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, o)
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, t, o = ctx.saved_tensors
        interval = 0.1
        slope = torch.zeros_like(x)
        above, below = (x <= t) & (x > interval), (x >= -t) & (x < -interval)
        slope[above] = (1 / o) * torch.pow(x[above], (1 - o) / o)
        slope[below] = (1 / o) * torch.pow(-x[below], (1 - o) / o)
        slope[(x <= interval) & (x >= -interval)] = interval ** (1 / o.item()) / interval
        return slope * grad.clone(), None, None


class _Identity(torch.autograd.Function):
    """ReCU's weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def ste_sign(x: Tensor) -> Tensor:
    return _Clipped.apply(x)


def approx_sign(x: Tensor) -> Tensor:
    return _Triangle.apply(x)


def reste_sign(x: Tensor, o: float, t: float = 1.5) -> Tensor:
    return _Power.apply(x, torch.tensor(t, dtype=x.dtype), torch.tensor(o, dtype=x.dtype))


def binarize_activation(x: Tensor) -> Tensor:
    """In training."""
    return _Triangle.apply(x / torch.sqrt(x.var([1, 2, 3], keepdim=True) + 1e-5))


def recu_weight(weight: Tensor, tau: float) -> Tensor:
    centred = weight - weight.mean([1, 2, 3], keepdim=True)
    standard = centred / (torch.sqrt(centred.var([1, 2, 3], keepdim=True) + 1e-5) / 2 / math.sqrt(2))
    bound = (-standard.abs().mean() * math.log(2 - 2 * tau)).detach().cpu().item()
    return _Identity.apply(torch.clamp(standard, -bound, bound))


class EagerReCUConv2d(nn.Conv2d):
    """The parameters of :class:`tersor.ReCUConv2d`."""

    tau: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha = nn.Parameter(torch.rand(self.out_channels, 1, 1))
        self.register_buffer("tau", torch.tensor(1.0))

    def forward(self, input: Tensor) -> Tensor:
        signs = binarize_activation(input) if self.training else approx_sign(input)
        weight = recu_weight(self.weight, float(self.tau))
        output = F.conv2d(signs, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return output * self.alpha


class EagerReSTEConv2d(nn.Conv2d):
    """The parameters of :class:`tersor.ReSTEConv2d`."""

    def __init__(self, *args: Any, o: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.o = o

    def forward(self, input: Tensor) -> Tensor:
        weight = reste_sign(self.weight, self.o) * self.weight.abs().mean([0, 1, 2, 3], keepdim=True)
        signs = reste_sign(input, self.o)
        return F.conv2d(signs, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
