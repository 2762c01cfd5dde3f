"""The published way to compute PSLT's ladder blocks, in eager torch: the baseline of the benchmarks.

Tokens and windows are copied by rolling and partitioning, the shift's mask is a tensor that is added to the logits,
the values are put together again and rolled back though nobody reads them, and the outputs' concatenation grows with
every branch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor import LadderBlock
from tersor._checks import check_pair
from tersor.attention.ladder_attention import LadderAttention, LadderBranch
from tersor.models.eager_attention import merge, partition, shift_mask


class EagerLadderAttention(LadderAttention):
    """:class:`tersor.LadderAttention` by rolling and partitioning: same options and parameters.

    The mask for the map that the block is built for is a buffer, as published; for other maps it is built in each call.
    """

    built_for: tuple[int, ...] = ()
    attn_mask: Tensor

    def forward(self, input: Tensor, value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``(B, H, W, dim)`` to the same; ``mask`` must be None."""
        assert mask is None, "the published layer builds the shift's mask only"
        self.check_inputs(input, value)
        height, width = input.shape[1:3]
        below, right = self.padding(height, width)
        window, shift = self.window_size, self.shift_for(height, width)
        x = F.pad(input, (0, 0, 0, right, 0, below))
        padded_height, padded_width = x.shape[1:3]
        x = partition(x, window, shift)  # [B, windows, N, dim]
        heads = (self.num_heads, self.dim // self.num_heads)
        if value is None:
            query, key, values = self.qkv(x).unflatten(3, (3, *heads)).permute(3, 0, 1, 4, 2, 5)
        else:
            query, key = self.kv(x).unflatten(3, (2, *heads)).permute(3, 0, 1, 4, 2, 5)
            value_windows = partition(F.pad(value, (0, 0, 0, right, 0, below)), window, shift)
            values = value_windows.unflatten(3, heads).transpose(2, 3)
        logits = query * heads[1] ** -0.5 @ key.transpose(-1, -2)  # [B, windows, heads, N, N]
        index = self.relative_position_index.view(-1)
        bias = self.relative_position_bias_table[index].view(x.shape[2], x.shape[2], -1).permute(2, 0, 1).contiguous()
        logits = logits + bias
        if any(shift):
            built = (padded_height, padded_width) == self.built_for
            cut = self.attn_mask if built else self.shift_mask(padded_height, padded_width, logits)
            logits = logits + cut.unsqueeze(2)
        output = (logits.softmax(-1) @ values.to(logits.dtype)).transpose(2, 3).reshape(x.shape)
        output = self.proj(output)
        if value is not None:
            output = output + x
            merge(value_windows, padded_height, padded_width, window, shift)  # as published: nobody reads it
        output = merge(output, padded_height, padded_width, window, shift)
        return output[:, :height, :width].contiguous()

    def shift_mask(self, height: int, width: int, like: Tensor) -> Tensor:
        return -100.0 * shift_mask(height, width, self.window_size, self.shift_size, like)


class EagerLadderBlock(LadderBlock):
    """:class:`tersor.LadderBlock` of :class:`EagerLadderAttention`; the MLPs run on ``(B, C, H, W)``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"attention": EagerLadderAttention} | options)
        resolution = options["input_resolution"] if "input_resolution" in options else (*args[2:3], None)[0]
        if resolution is None:
            return
        for branch in self.blocks:
            assert isinstance(branch.attn, EagerLadderAttention)
            if any(branch.attn.shift_size):
                sizes = tuple(check_pair("EagerLadderBlock", "input_resolution", resolution, 1))
                mask = branch.attn.shift_mask(*sizes, branch.attn.relative_position_bias_table.detach())
                branch.attn.register_buffer("attn_mask", mask, persistent=False)
                branch.attn.built_for = sizes

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        outputs: Tensor | None = None
        value: Tensor | None = None
        for branch, part in zip(self.blocks, input.chunk(len(self.blocks), 3), strict=True):
            assert isinstance(branch, LadderBranch)
            part = part.contiguous()
            x = part + branch.drop_path(branch.attn(branch.norm1(part), value))
            mlp = branch.mlp.conv(branch.norm2(x).permute(0, 3, 1, 2).contiguous())
            value = x + branch.drop_path(mlp.permute(0, 2, 3, 1).contiguous())
            outputs = value if outputs is None else torch.cat([outputs, value], 3)
        assert outputs is not None
        gated = outputs * self.se(outputs)
        return self.pointconv(gated) + gated
