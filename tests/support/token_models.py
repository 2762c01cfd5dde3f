"""What the tests of the models that choose their tokens share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def images(batch: int, side: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, side, side, generator=generator, dtype=dtype)


def block_keys(depth: int, qkv_bias: bool) -> set[str]:
    """The authors' keys of the blocks."""
    layers = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    keys = {f"blocks.{i}.{layer}.{p}" for i in range(depth) for layer in layers for p in ("weight", "bias")}
    return keys | {f"blocks.{i}.attn.qkv.{p}" for i in range(depth) for p in ("weight", "bias")[: 1 + qkv_bias]}


def stem_keys() -> set[str]:
    """Those of LV-ViT's convolutions in front."""
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"patch_embed.bn{i}.{p}" for i in (1, 2, 3) for p in buffers}
    return keys | {f"patch_embed.conv{i}.weight" for i in (1, 2, 3)}


def giga_macs(function: Callable[..., Any], *args: Any) -> float:
    """Multiply-adds of convolutions, linear layers and both products of every attention, in 10^9."""

    def attention(query: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
        batch, height, width, heads, head_dim = query
        return 4 * batch * height * width * heads * head_dim * args[4][0] * args[4][1]

    counts = {torch.ops.tersor.window_attention_forward: attention}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops() / 2e9
