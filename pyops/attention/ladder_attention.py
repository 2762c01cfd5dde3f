"""Ladder self-attention of PSLT (arXiv 2304.03481): branches of window attention, each with the last one's values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import as_int, check_floating, check_pair
from tersor._folding import ChannelAffine, fold_into_next_, fold_into_previous_
from tersor._operator import autocast_tensors
from tersor.attention.layers import DropPath, WindowBias
from tersor.attention.leff import leff
from tersor.attention.window_attention import window_attention_qkpacked, window_attention_qkvpacked

_DIRECTIONS = (0, 1, -1)  # of the branches' shifts, in windows rolled up and left, or down and right


def pixel_adaptive_fusion(
    input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    r"""Gates every channel of every position by the position's own channels, and mixes them by a linear layer.

    .. math:: z = y \cdot \mathrm{sigmoid}(W_2 \, \mathrm{relu}(W_1 y + b_1) + b_2), \qquad
        \mathrm{output} = W z + b + z

    Args:
        input: ``(..., C)``, floating point; y above.
        weight1, bias1: ``(hidden, C)`` and ``(hidden,)``.
        weight2, bias2: ``(C, hidden)`` and ``(C,)``.
        weight, bias: ``(C, C)`` and ``(C,)``.

    Returns:
        ``(..., C)``. Differentiable.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes do not fit each other.

    Source: Wu et al., "PSLT: A Light-Weight Vision Transformer With Ladder Self-Attention and Progressive Shift",
    arXiv 2304.03481.
    """
    name = "pixel_adaptive_fusion"
    given = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "weight": weight, "bias": bias}
    check_floating(name, input=input, **given)
    if input.dim() < 1 or weight1.dim() != 2:
        raise ValueError(
            f"{name}: input must be (..., C) and weight1 (hidden, C), "
            f"got shapes {tuple(input.shape)} and {tuple(weight1.shape)}"
        )
    channels, hidden = input.shape[-1], weight1.shape[0]
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,), (channels, channels), (channels,))
    for (argument, tensor), shape in zip(given.items(), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: {argument} must be {shape} for input of {channels} channels and weight1 of {hidden} rows, "
                f"got shape {tuple(tensor.shape)}"
            )
    gate = F.linear(F.linear(input, weight1, bias1).relu(), weight2, bias2).sigmoid()
    gated = input * gate
    return F.linear(gated, weight, bias) + gated


class ChannelGate(nn.Module):
    """sigmoid(fc2(relu(fc1(x)))) with ``hidden_dim`` channels within: ``(..., dim)`` to ``(..., dim)``."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc2(self.fc1(input).relu()).sigmoid()


class LadderAttention(WindowBias):
    r"""Window attention of one branch: with values of its own, or with given ones and the input added once more.

    With :math:`A` for :func:`window_attention`, the output is :math:`\mathrm{proj}(A(q, k, v))` of the fused
    projection ``qkv``; or, with given values, :math:`\mathrm{proj}(A(q, k, \mathrm{value})) + \mathrm{input}`, where
    the fused projection gives query and key only (its published name is ``kv`` all the same).

    Args:
        dim: channels d of the branch, a multiple of ``num_heads``.
        num_heads: heads.
        window_size: rows and columns of a window (one int for both).
        shift_size: as the ``shift`` of :func:`window_attention`; negative is PSLT's direction 0.
        given_values: whether the values are given.
        pad: False refuses maps that are not whole windows. True pads input and values on the right and at the bottom
            with zeros, unmasked, and drops the shift where the smaller side of the map is at most the window's.
        qkv_bias: whether the fused projection has a bias.

    Shape:
        input, value and output ``(B, H, W, dim)``.

    Raises:
        TypeError, ValueError: the options do not fit each other, or the input is not as stated.

    Source: arXiv 2304.03481.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] = 0,
        given_values: bool = False,
        pad: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, window_size, shift_size)
        self.given_values, self.pad = given_values, pad
        if given_values:
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def check_inputs(self, input: Tensor, value: Tensor | None) -> None:
        self.check_map(input)
        if (value is not None) != self.given_values:
            raise ValueError(
                f"LadderAttention: value must be {'a tensor' if self.given_values else 'None'} "
                f"with given_values={self.given_values}, got {type(value).__name__}"
            )
        if value is not None:
            check_floating("LadderAttention", value=value)
            if value.shape != input.shape:
                raise ValueError(
                    f"LadderAttention: value must have the shape of input {tuple(input.shape)}, "
                    f"got {tuple(value.shape)}"
                )
        for axis, size, window in zip("HW", input.shape[1:3], self.window_size, strict=True):
            if size < 1 or (size % window and not self.pad):
                raise ValueError(f"LadderAttention: {axis} ({size}) must be a multiple of the window's size ({window})")

    def forward(self, input: Tensor, value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``(B, H, W, dim)`` to the same; ``mask`` is that of :func:`window_attention`, for the padded map."""
        self.check_inputs(input, value)
        height, width = input.shape[1:3]
        below, right = self.padding(height, width)
        shift, border = self.shift_for(height, width), (0, 0, 0, right, 0, below)
        padded = F.pad(input, border) if below or right else input
        common = (self.window_size, shift, self.relative_position_bias_table, mask)
        if value is None:
            qkv = self.qkv(padded).unflatten(3, (3, self.num_heads, -1))
            return self.proj(window_attention_qkvpacked(qkv, *common).flatten(3)[:, :height, :width])
        qk = self.kv(padded).unflatten(3, (2, self.num_heads, -1))
        (value,) = autocast_tensors(value.device.type, value)
        value = F.pad(value, border) if below or right else value
        value = value.unflatten(3, (self.num_heads, -1))
        output = window_attention_qkpacked(qk, value, *common)
        return self.proj(output.flatten(3)[:, :height, :width]) + input

    def shift_for(self, height: int, width: int) -> list[int]:
        """The shift on a map of this size, decided anew for every call."""
        covers = height <= self.window_size[0] or width <= self.window_size[1]
        return [0, 0] if self.pad and covers else self.shift_size


class MlpLight(nn.Module):
    """1x1, depth-wise 3x3 and 1x1 convolutions: ``(B, H, W, dim)`` to ``(B, H, W, dim)``.

    GELU (exact) comes **before** the batch norm of the first two; the third has a norm only. The depth-wise convolution
    pads the normalised map with zeros.

    Raises:
        TypeError, ValueError: the input is not as stated, or in training mode there is one position only, so that norms
            have nothing to average.

    Source: arXiv 2304.03481.
    """

    weights_read_directly = ("conv",)  # for tersor.compress

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden_dim, 1),
            nn.GELU(),
            nn.BatchNorm2d(hidden_dim),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim),
            nn.GELU(),
            nn.BatchNorm2d(hidden_dim),
            nn.Conv2d(hidden_dim, dim, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, input: Tensor) -> Tensor:
        check_floating("MlpLight", input=input)
        if input.dim() != 4 or input.shape[3] != self.dim:
            raise ValueError(f"MlpLight: input must be (B, H, W, {self.dim}), got shape {tuple(input.shape)}")
        if isinstance(self.conv[2], ChannelAffine):
            return folded_layers(self.conv, input)
        expand, activation, norm1, depthwise, _, norm2, reduce, norm3 = self.conv
        x = normalized(norm1, activation(_pointwise(expand, input)))
        x = depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = normalized(norm2, activation(x))
        return normalized(norm3, _pointwise(reduce, x))

    def fold_norms_(self) -> None:
        """See :func:`tersor.fold_norms_`; then :func:`tersor.leff` computes it all."""
        fold_layers_(self.conv)


def fold_layers_(layers: nn.Sequential) -> None:
    """Of eight layers as :class:`MlpLight`'s: both norms around the third convolution go into it.

    The first norm cannot go into the depth-wise convolution, whose padding comes after it.
    """
    fold_into_next_(layers, 5, layers[6])
    fold_into_previous_(layers, 6, 7)
    if not isinstance(layers[2], ChannelAffine):
        layers[2] = ChannelAffine(layers[2])


def folded_layers(layers: nn.Sequential, input: Tensor) -> Tensor:
    """Folded layers with a depth-wise convolution of stride 1, on a map ``(B, H, W, C)``."""
    modules: list[Any] = list(layers)
    expand, _, affine, depthwise, _, _, reduce, _ = modules
    first, last = (expand.weight.flatten(1), expand.bias), (reduce.weight.flatten(1), reduce.bias)
    return leff(input, *first, depthwise.weight, depthwise.bias, *last, affine.scale, affine.shift)


def normalized(norm: nn.Module, input: Tensor) -> Tensor:
    """A batch norm of a map ``(B, H, W, C)``.

    torch 2.13 gives wrong gradients on the CPU at batch 1 if a norm's input has neither its plain nor its true
    channels-last strides, as views of tokens do: hence the view that states all strides anew.
    """
    if norm.training and isinstance(norm, nn.BatchNorm2d) and input.shape[:3].numel() == 1:
        raise ValueError(f"batch norm in training mode: input must have several positions, got {tuple(input.shape)}")
    strided = input.flatten(0, 2).view(input.shape)
    return norm(strided.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _pointwise(conv: nn.Module, input: Tensor) -> Tensor:
    """A 1x1 convolution of a map ``(B, H, W, C)``."""
    assert isinstance(conv, nn.Conv2d)
    return F.linear(input, conv.weight.flatten(1), conv.bias)


class LadderBranch(nn.Module):
    """x = input + attention(norm1(input), value), output = x + mlp(norm2(x)); ``(B, H, W, dim)`` maps.

    The two stochastic-depth branches draw independently.
    """

    def __init__(self, attention: LadderAttention, hidden_dim: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(attention.dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(attention.dim)
        self.mlp = MlpLight(attention.dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, input: Tensor, value: Tensor | None = None) -> Tensor:
        x = input + self.drop_path(self.attn(self.norm1(input), value))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "attn_mask", None)  # published layers keep the shift's mask as a buffer
        super()._load_from_state_dict(state_dict, prefix, *args)


class LadderBlock(nn.Module):
    """PSLT's ladder: a third of the channels for each branch, whose output is the next branch's values; then fusion.

    Branches are not shifted, shifted by half a window up and left, and by half a window down and right. The parameters
    carry the published names.

    Args:
        dim: channels C, a multiple of ``branches``, and a branch's channels one of ``num_heads``.
        num_heads: heads of each branch.
        input_resolution: H and W (one int for both) that the block is built for. Where the smaller one is at most
            ``window_size``, it becomes the window's size and nothing is shifted; other maps must be whole windows of
            that size. None builds for maps of any size, as for detection: windows keep their size, maps are padded
            with zeros to whole windows after the norm, and the shift is dropped, in that call, where the smaller side
            is at most the window's.
        window_size: rows and columns of a window.
        branches: 1, 2 or 3.
        mlp_ratio, reduce_scale: the MLP has ``int(int(C / branches * mlp_ratio) / reduce_scale)`` channels within.
        qkv_bias: whether the fused projections have a bias.
        drop_path: stochastic-depth rate of all branches, with independent draws.
        attention: called like :class:`LadderAttention`.

    Shape:
        input and output ``(B, H, W, dim)``, tokens ``(B, H * W, dim)`` being a view of it.

    Raises:
        TypeError, ValueError: the options do not fit each other, or the input is not as stated.

    Source: Wu et al., "PSLT: A Light-Weight Vision Transformer With Ladder Self-Attention and Progressive Shift",
    arXiv 2304.03481.
    """

    weights_read_directly = ("se", "pointconv")  # for tersor.compress

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_resolution: int | Sequence[int] | None = None,
        window_size: int = 7,
        branches: int = 3,
        mlp_ratio: float = 4.0,
        reduce_scale: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        attention: type[LadderAttention] = LadderAttention,
    ) -> None:
        super().__init__()
        self.dim, count = as_int("LadderBlock", dim=dim), as_int("LadderBlock", branches=branches)
        window = as_int("LadderBlock", window_size=window_size)
        if not 1 <= count <= len(_DIRECTIONS):
            raise ValueError(f"LadderBlock: branches must be 1, 2 or 3, got {branches}")
        if dim < 1 or dim % count:
            raise ValueError(f"LadderBlock: dim ({dim}) must be a multiple of {count}")
        shift = window // 2
        if input_resolution is not None:
            sizes = check_pair("LadderBlock", "input_resolution", input_resolution, 1)
            if min(sizes) <= window:
                window, shift = min(sizes), 0
            for axis, size in zip("HW", sizes, strict=True):
                if size % window:
                    raise ValueError(
                        f"LadderBlock: {axis} of input_resolution ({size}) must be a multiple of the window's size "
                        f"({window})"
                    )
        width = dim // count
        hidden = int(int(width * mlp_ratio) / reduce_scale)
        self.blocks = nn.ModuleList()
        for index, direction in enumerate(_DIRECTIONS[:count]):
            layer = attention(
                width, num_heads, window, direction * shift, index > 0, input_resolution is None, qkv_bias
            )
            self.blocks.append(LadderBranch(layer, hidden, drop_path))
        self.se = ChannelGate(dim, dim // 2)
        self.pointconv = nn.Linear(dim, dim)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        check_floating("LadderBlock", input=input)
        if input.dim() != 4 or input.shape[3] != self.dim:
            raise ValueError(f"LadderBlock: input must be (B, H, W, {self.dim}), got shape {tuple(input.shape)}")
        outputs: list[Tensor] = []
        for branch, part in zip(self.blocks, input.chunk(len(self.blocks), 3), strict=True):
            outputs.append(branch(part, outputs[-1] if outputs else None))
        gate, mix = self.se, self.pointconv
        weights = (gate.fc1.weight, gate.fc1.bias, gate.fc2.weight, gate.fc2.bias, mix.weight, mix.bias)
        return pixel_adaptive_fusion(torch.cat(outputs, 3), *weights)
