"""Uformer's feed-forward (LeFF) the published way and channels-last, as baselines for :func:`tersor.leff`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def leff_rearrange(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None = None,
    hidden_shift: Tensor | None = None,
) -> Tensor:
    """The published code's way: tokens through the linear layers, rearranged to (B, E, H, W) for the convolution.

    Args and result as :func:`tersor.leff`.
    """
    height, width = input.shape[1:3]
    hidden = F.gelu(F.linear(input.flatten(1, 2), weight1, bias1))
    if hidden_scale is not None and hidden_shift is not None:
        hidden = hidden * hidden_scale + hidden_shift
    maps = hidden.transpose(1, 2).unflatten(2, (height, width)).contiguous()
    maps = F.gelu(F.conv2d(maps, depthwise_weight, depthwise_bias, padding=1, groups=maps.shape[1]))
    hidden = maps.flatten(2).transpose(1, 2).contiguous()
    return F.linear(hidden, weight2, bias2).unflatten(1, (height, width))


def leff_channels_last(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None = None,
    hidden_shift: Tensor | None = None,
) -> Tensor:
    """Without rearranging: the hidden map stays (B, H, W, E) in memory, which the convolution sees as channels-last.

    Args and result as :func:`tersor.leff`.
    """
    hidden = F.gelu(F.linear(input, weight1, bias1))
    if hidden_scale is not None and hidden_shift is not None:
        hidden = hidden * hidden_scale + hidden_shift
    maps = F.conv2d(hidden.permute(0, 3, 1, 2), depthwise_weight, depthwise_bias, padding=1, groups=hidden.shape[3])
    return F.linear(F.gelu(maps).permute(0, 2, 3, 1), weight2, bias2)
