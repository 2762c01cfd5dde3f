"""Window attention as a layer, as in Swin (arXiv 2103.14030), and what such layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import as_int, check_floating
from tersor.attention.window_attention import bias_index, check_window_options, window_attention_qkvpacked


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of whole samples with probability ``rate`` in training.

    What is kept is scaled by ``1 / (1 - rate)``. Dimension 0 is the batch.

    Raises:
        ValueError: ``rate`` is not in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: rate must be in [0, 1), got {rate}")
        self.rate = float(rate)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return input
        keep = 1 - self.rate
        mask = input.new_empty((input.shape[0],) + (1,) * (input.dim() - 1)).bernoulli_(keep)
        return input * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class WindowBias(nn.Module):
    """What layers of window attention have in common: the bias table and its index, sizes, and the check of maps.

    The operators need the table only; ``relative_position_index`` is there because published state dicts have it. It
    loads flat or as a square matrix, and may be missing; one with other entries is refused.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: heads.
        window_size: rows and columns of a window (one int for both).
        shift_size: rows and columns, see the ``shift`` of :func:`window_attention`.
        flat: whether the index is kept as a vector (torchvision) or as a square matrix (most authors).

    Raises:
        TypeError, ValueError: the options do not fit each other.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        flat: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.dim, self.num_heads = as_int(name, dim=dim), as_int(name, num_heads=num_heads)
        if self.num_heads < 1 or self.dim < 1 or self.dim % self.num_heads:
            raise ValueError(f"{name}: dim ({dim}) must be a positive multiple of num_heads ({num_heads})")
        sizes = [window_size] * 2 if isinstance(window_size, int) else window_size
        shape = (1, *sizes, num_heads, dim // num_heads) if len(sizes) == 2 else (1, 1, 1, 1, 1)
        self.window_size, self.shift_size = check_window_options(name, shape, window_size, shift_size)
        rows, columns = self.window_size
        table = torch.empty((2 * rows - 1) * (2 * columns - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))  # Swin's default
        index = bias_index(self.window_size)
        self.register_buffer("relative_position_index", index.flatten() if flat else index)

    def check_map(self, input: Tensor) -> None:
        """``input`` is ``(B, H, W, dim)`` of some floating-point type."""
        name = type(self).__name__
        check_floating(name, input=input)
        if input.dim() != 4 or input.shape[3] != self.dim:
            raise ValueError(f"{name}: input must be (B, H, W, {self.dim}), got shape {tuple(input.shape)}")

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that are missing to whole windows."""
        return -height % self.window_size[0], -width % self.window_size[1]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "relative_position_index"
        index = bias_index(self.window_size, torch.device("cpu")).view(self.relative_position_index.shape)
        given = state_dict.get(key)
        if isinstance(given, Tensor) and not given.is_meta:
            index = index.to(given.device)
            if not torch.equal(given.flatten().to(index.dtype), index.flatten()):
                args[-1].append(f"{key} must be that of {tuple(self.window_size)} windows with row-major tokens")
        state_dict[key] = index
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"


class WindowAttention(WindowBias):
    """Self-attention within shifted windows, between a fused projection and an output projection.

    A drop-in for torchvision's ``ShiftedWindowAttention``, with its arguments and parameter names, that neither rolls
    nor partitions the map and builds no mask. Maps of any size are padded with zeros on the right and at the bottom to
    whole windows; along an axis where one window covers the padded map there is no shift.

    Args:
        dim: channels C, a multiple of ``num_heads``.
        window_size, shift_size: rows and columns (one int for both), each shift nearer to 0 than the window's size.
        num_heads: heads.
        qkv_bias, proj_bias: whether the projections have a bias.
        attention_dropout: must be 0: the fused kernels keep no attention matrix to drop from.
        dropout: after the output projection.

    Shape:
        input and output ``(B, H, W, dim)``; the input is left as it is.

    Raises:
        TypeError, ValueError: the options do not fit each other, or the input is not as stated.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, window_size, shift_size, flat=True)
        if attention_dropout != 0:
            raise ValueError(
                f"WindowAttention: attention_dropout must be 0 (no attention matrix is kept), got {attention_dropout}"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        self.check_map(input)
        height, width = input.shape[1:3]
        below, right = self.padding(height, width)
        padded = F.pad(input, (0, 0, 0, right, 0, below)) if below or right else input
        sizes = zip(padded.shape[1:3], self.window_size, self.shift_size, strict=True)
        shift = [0 if window >= size else shift for size, window, shift in sizes]
        qkv = self.qkv(padded).unflatten(3, (3, self.num_heads, -1))
        output = window_attention_qkvpacked(qkv, self.window_size, shift, self.relative_position_bias_table)
        return self.dropout(self.proj(output.flatten(3)[:, :height, :width]))
