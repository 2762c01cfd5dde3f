"""The binary layers of ReCU and ReSTE as their papers have them, in plain torch with autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sign(x: Tensor, slope: Tensor) -> Tensor:
    """sign(x), whose gradient is the incoming one times ``slope``."""
    through = x * slope.detach()
    return torch.sign(x) + (through - through.detach())


def ste(x: Tensor, t: float = 1.0) -> Tensor:
    return sign(x, (x.abs() <= t).to(x.dtype))


def approx(x: Tensor) -> Tensor:
    return sign(x, (2 - 2 * x.abs()).clamp(min=0))


def reste(x: Tensor, o: float, t: float, interval: float = 0.1) -> Tensor:
    a = x.abs()
    slope = a ** ((1 - o) / o) / o
    slope = torch.where(a > interval, slope, interval ** (1 / o) / interval)
    return sign(x, torch.where(a > t, 0, slope))


def recu_weight(w: Tensor, tau: float) -> Tensor:
    dims = tuple(range(1, w.dim()))
    centred = w - w.mean(dims, keepdim=True)
    scaled = centred / (centred.var(dims, keepdim=True) + 1e-5).sqrt() * 2 * 2**0.5
    if tau < 1:
        bound = -scaled.abs().mean() * torch.log(torch.tensor(2 - 2 * tau, dtype=torch.float64)).item()
        scaled = scaled.clamp(-bound.item(), bound.item())
    return sign(scaled, torch.ones_like(scaled))


def recu_conv(
    x: Tensor, w: Tensor, alpha: Tensor, tau: float, bias: Tensor | None, training: bool, *window: Any
) -> Tensor:
    x = x / (x.var((1, 2, 3), keepdim=True) + 1e-5).sqrt() if training else x
    return alpha * F.conv2d(approx(x), recu_weight(w, tau), bias, *window)


def reste_conv(
    x: Tensor,
    w: Tensor,
    o: float,
    o_a: float,
    t: float,
    t_a: float,
    bias: Tensor | None,
    act_bits32: bool,
    *window: Any,
) -> Tensor:
    weight = reste(w, o, t) * w.abs().mean()
    return F.conv2d(x if act_bits32 else reste(x, o_a, t_a), weight, bias, *window)
