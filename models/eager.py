"""The published way to compute dilated attention, in eager torch: the baseline of the benchmarks and of the demo.

Per group of heads: unfold keys and values into ``kernel_size ** 2`` copies, one batched product for the scores, a
softmax, one batched product for the output; all in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor import DilatedAttention


def dilated_attention_unfold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int = 3,
    dilation: int | Sequence[int] = (1, 2, 3),
    scale: float | None = None,
) -> Tensor:
    """What :func:`tersor.dilated_attention` computes, by unfolding.

    Args:
        query, key, value: ``(B, H, W, heads, head_dim)``, floating point, any strides.
        kernel_size, dilation, scale: as :func:`tersor.dilated_attention`; they are not checked here.

    Returns:
        ``(B, H, W, heads, head_dim)``.
    """
    batch, height, width, heads, head_dim = query.shape
    dilations = [dilation] if isinstance(dilation, int) else list(dilation)
    maps = (tensor.flatten(3).permute(0, 3, 1, 2) for tensor in (query, key, value))
    groups = zip(*(m.chunk(len(dilations), dim=1) for m in maps), dilations, strict=True)
    outputs = [_group(q, k, v, head_dim, kernel_size, d, scale or head_dim**-0.5) for q, k, v, d in groups]
    return torch.cat(outputs, dim=-1).view(batch, height, width, heads, head_dim)


def _group(query: Tensor, key: Tensor, value: Tensor, head_dim: int, kernel_size: int, d: int, scale: float) -> Tensor:
    """Heads of one dilation: ``(B, C, H, W)`` maps to ``(B, H, W, C)``."""
    batch, channels, height, width = query.shape
    heads, positions, taps = channels // head_dim, height * width, kernel_size**2
    padding = d * (kernel_size - 1) // 2
    query = query.reshape(batch, heads, head_dim, 1, positions).permute(0, 1, 4, 3, 2)  # [B, heads, HW, 1, head_dim]
    key, value = (
        F.unfold(x, kernel_size, d, padding).reshape(batch, heads, head_dim, taps, positions) for x in (key, value)
    )
    scores = query @ key.permute(0, 1, 4, 2, 3) * scale  # [B, heads, HW, 1, taps]
    output = scores.softmax(-1) @ value.permute(0, 1, 4, 3, 2)  # [B, heads, HW, 1, head_dim]
    return output.transpose(1, 2).reshape(batch, height, width, channels)


class EagerDilatedAttention(DilatedAttention):
    """:class:`tersor.DilatedAttention` computed by :func:`dilated_attention_unfold`: same options and parameters.

    The projection is the 1x1 convolution on ``(B, C, H, W)`` that the published model runs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        batch, height, width, dim = input.shape
        qkv = self.qkv(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qkv = qkv.unflatten(3, (3, self.num_heads, dim // self.num_heads))
        query, key, value = qkv.unbind(3)
        output = dilated_attention_unfold(query, key, value, self.kernel_size, self.dilation, self.scale)
        return self.proj_drop(self.proj(output.reshape(batch, height, width, dim)))
