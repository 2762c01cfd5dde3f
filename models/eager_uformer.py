"""The published way to compute Uformer's LeWin blocks, in eager torch: the baseline of the benchmarks.

Tokens are rolled and copied into windows and back, the masks are tensors built anew in every call, the modulator is
repeated for every window, and the feed-forward goes from tokens to ``(B, C, H, W)`` and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.models.eager_attention import merge, partition, shift_mask
from tersor.models.eager_leff import leff_rearrange
from tersor.models.uformer import LeWinBlock, resized_mask


class EagerLeWinBlock(LeWinBlock):
    """:class:`tersor.models.uformer.LeWinBlock` by rolling and partitioning: same options and parameters."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        self.check_inputs(input, mask)
        height, width = input.shape[1:3]
        window, shift = self.attn.window_size, self.attn.shift_size
        windows = partition(self.norm1(input), window, shift)  # [B, windows, N, dim]
        if self.modulator is not None:
            windows = windows + self.modulator.weight
        added = self._mask(windows, height, width, mask)
        attended = merge(self._attend(windows, added), height, width, window, shift)
        x = input + self.drop_path(attended)
        layers = (self.mlp.linear1[0], self.mlp.dwconv[0], self.mlp.linear2[0])
        weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]
        return x + self.drop_path(leff_rearrange(self.norm2(x), *weights))  # type: ignore[arg-type]

    def _attend(self, windows: Tensor, added: Tensor | None) -> Tensor:
        attention = self.attn
        heads = (attention.num_heads, attention.dim // attention.num_heads)
        query = attention.qkv.to_q(windows).unflatten(3, heads).transpose(2, 3) * heads[1] ** -0.5
        key, value = attention.qkv.to_kv(windows).unflatten(3, (2, *heads)).permute(3, 0, 1, 4, 2, 5)
        logits = query @ key.transpose(-1, -2)  # [B, windows, heads, N, N]
        tokens = windows.shape[2]
        table = attention.relative_position_bias_table[attention.relative_position_index.view(-1)]
        logits = logits + table.view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        if added is not None:
            logits = logits + added.unsqueeze(2)
        output = (logits.softmax(-1) @ value).transpose(2, 3).reshape(windows.shape)
        return attention.proj(output)

    def _mask(self, windows: Tensor, height: int, width: int, mask: Tensor | None) -> Tensor | None:
        """``(1 or B, windows, N, N)`` of 0, -100 and -200."""
        window, shift = self.attn.window_size, self.attn.shift_size
        added = None
        if mask is not None:
            outside = partition(resized_mask(mask, height, width).to(windows.dtype), window, (0, 0))
            pairs = outside[..., :, None] * outside[..., None, :]
            added = torch.zeros_like(pairs).masked_fill(pairs != 0, -100.0)
        if any(shift):
            cut = -100.0 * shift_mask(height, width, window, shift, windows)
            added = cut if added is None else added + cut
        return added
