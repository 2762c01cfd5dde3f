"""The published ways to compute shifted-window attention, in eager torch: the baselines of the benchmarks.

Roll the map, copy it into windows, two batched products with bias and mask tensors between them, copy the windows back,
roll back; all in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.attention.window_attention import bias_index


def window_attention_partition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    """What :func:`tersor.window_attention` computes, by rolling and partitioning.

    Args:
        query, key, value: ``(B, H, W, heads, head_dim)``, floating point, any strides.
        window_size, shift, position_bias, mask, mask_value, scale: as :func:`tersor.window_attention`, sizes as two
            ints; they are not checked here.

    Returns:
        ``(B, H, W, heads, head_dim)``.
    """
    height, width, _, head_dim = query.shape[1:]
    q, k, v = (partition(t, window_size, shift).transpose(2, 3) for t in (query, key, value))
    logits = (q * (head_dim**-0.5 if scale is None else scale)) @ k.transpose(-1, -2)  # [B, windows, heads, N, N]
    logits = _with_bias_and_mask(logits, query, window_size, shift, position_bias, mask, mask_value)
    return merge((logits.softmax(-1) @ v).transpose(2, 3), height, width, window_size, shift)


def window_attention_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    """The same with torch's scaled_dot_product_attention between the copies, bias and masks as its float mask."""
    height, width = query.shape[1:3]
    q, k, v = (partition(t, window_size, shift).transpose(2, 3) for t in (query, key, value))
    batch, windows, _, tokens, _ = q.shape
    added = _with_bias_and_mask(
        q.new_zeros(1, 1, 1, tokens, tokens), query, window_size, shift, position_bias, mask, mask_value
    )
    if added.shape[0] == 1 and added.shape[1] == 1:  # one for all windows
        merged = added[0].expand(batch * windows, -1, -1, -1)
    else:
        merged = added.expand(batch, windows, -1, -1, -1).flatten(0, 1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=merged.to(q.dtype), scale=scale)
    output = output.unflatten(0, (batch, windows)).transpose(2, 3)
    return merge(output, height, width, window_size, shift)


def partition(tensor: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """``(B, H, W, ...)`` to a copy ``(B, windows, h * w, ...)`` of the map rolled by ``-shift``."""
    if any(shift):
        tensor = tensor.roll((-shift[0], -shift[1]), (1, 2))
    height, width = tensor.shape[1:3]
    tiles = tensor.unflatten(2, (width // window[1], window[1])).unflatten(1, (height // window[0], window[0]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge(windows: Tensor, height: int, width: int, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of :func:`partition`."""
    tiles = windows.unflatten(2, tuple(window)).unflatten(1, (height // window[0], width // window[1]))
    tensor = tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return tensor.roll((shift[0], shift[1]), (1, 2)) if any(shift) else tensor.contiguous()


def shift_mask(height: int, width: int, window: Sequence[int], shift: Sequence[int], like: Tensor) -> Tensor:
    """1 where the shift has put two tokens of a window next to each other that are not neighbours, else 0.

    Built region by region, as the published code does: ``(1, windows, N, N)``.
    """
    regions = torch.zeros(1, height, width, device=like.device)
    count = 0
    for rows in _regions(height, window[0], shift[0]):
        for columns in _regions(width, window[1], shift[1]):
            regions[:, rows, columns] = count
            count += 1
    tiles = partition(regions, window, (0, 0))
    return (tiles[..., :, None] != tiles[..., None, :]).to(like.dtype)


def _regions(size: int, window: int, shift: int) -> list[slice]:
    if shift > 0:
        return [slice(0, size - window), slice(size - window, size - shift), slice(size - shift, size)]
    if shift < 0:
        return [slice(0, -shift), slice(-shift, window), slice(window, size)]
    return [slice(0, size)]


def _with_bias_and_mask(
    logits: Tensor,
    query: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    position_bias: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
) -> Tensor:
    height, width = query.shape[1:3]
    if position_bias is not None:
        index = bias_index(window, query.device)
        logits = logits + position_bias.to(logits.dtype)[index].permute(2, 0, 1)
    if any(shift):
        logits = logits + mask_value * shift_mask(height, width, window, shift, logits).unsqueeze(2)
    if mask is not None:
        if mask.dim() == 3:
            outside = partition(mask, window, shift)
            mask = outside[..., :, None] & outside[..., None, :]
        logits = logits + mask_value * mask.to(logits.dtype).unsqueeze(2)
    return logits
