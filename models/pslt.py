"""PSLT (arXiv 2304.03481): light convolutions with gates in the early stages, ladder self-attention in the late ones.

The state dicts have the published model's keys, so that its checkpoints load with
:func:`tersor.models.load_checkpoint`; index and mask buffers in them may be missing or there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tersor import LadderBlock
from tersor._checks import as_int, check_floating, check_pair
from tersor._folding import ChannelAffine, fold_into_next_
from tersor.attention.ladder_attention import ChannelGate, fold_layers_, folded_layers, normalized
from tersor.models.layers import init_linear

VARIANTS: dict[str, dict[str, Any]] = {
    "pslt_tiny": {"embed_dim": 24},
    "pslt_base": {"embed_dim": 36},
    "pslt_large": {"embed_dim": 48},
}


class Mv2Se(nn.Module):
    """Light convolution block: ``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``.

    1x1 to ``expansion`` times as many channels and depth-wise 3x3, each with GELU (exact) **before** the batch norm;
    1x1 with a batch norm; that times the gate (``ChannelGate``) of its mean; plus the input where sizes allow.

    Raises:
        ValueError: ``stride`` is not 1 or 2, or in training mode a norm has one position only.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"Mv2Se: stride must be 1 or 2, got {stride}")
        hidden = expansion * in_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.GELU(),
            nn.BatchNorm2d(hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.se = ChannelGate(out_channels, out_channels // 2)
        self.stride = stride
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.conv[2], ChannelAffine) and self.stride == 1:
            x = folded_layers(self.conv, input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = _convolved(self.conv, input)
        x = x * self.se(x.mean((2, 3)))[:, :, None, None]
        return input + x if self.residual else x

    def fold_norms_(self) -> None:
        """See :func:`tersor.fold_norms_`; with stride 1 :func:`tersor.leff` then computes all but the gate."""
        fold_layers_(self.conv)


def _convolved(layers: nn.Sequential, input: Tensor) -> Tensor:
    """The layers on ``(B, C, H, W)``, with norms that are safe at batch 1."""
    x = input
    for layer in layers:
        norm = isinstance(layer, nn.modules.batchnorm._BatchNorm)
        x = normalized(layer, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if norm else layer(x)
    return x


class PatchEmbed(nn.Module):
    """The stem, three 3x3 convolutions with GELU and batch norm each: ``(B, in_chans, H, W)`` to half the grid."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((in_chans, dim // 2, 2), (dim // 2, dim, 1), (dim, dim, 1)):
            conv = nn.Conv2d(before, after, 3, stride, 1, bias=False)
            layers += [conv, nn.GELU(), nn.BatchNorm2d(after)]
        self.proj = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        return _convolved(self.proj, input)


class PatchMerging(nn.Module):
    """Half the grid, twice the channels: ``(B, H, W, dim)`` to ``(B, H / 2, W / 2, 2 * dim)``.

    Args:
        dim: channels.
        pad: whether odd sizes get a row or column of zeros; else they are refused.
    """

    def __init__(self, dim: int, pad: bool = False) -> None:
        super().__init__()
        self.pad = pad
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[1:3]
        if height % 2 or width % 2:
            if not self.pad:
                raise ValueError(f"PatchMerging: H and W must be even, got {height} x {width}")
            input = F.pad(input, (0, 0, 0, width % 2, 0, height % 2))
        phases = input.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, 2, W / 2, 2, dim]
        return self.reduction(self.norm(phases.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class Stage(nn.Module):
    """Ladder blocks on one grid; ``downsample`` leads to the next one and is run by the model."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, input: Tensor) -> Tensor:
        return self.blocks(input)


class Trunk(nn.Module):
    """Stem, convolution blocks and ladder stages, which the classifier and the backbone share.

    ``channels`` are those of the maps that :meth:`maps` returns.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] | None,
        embed_dim: int,
        conv_depths: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        reduce_scale: float,
        qkv_bias: bool,
        drop_path: float,
        in_chans: int,
        block: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if len(num_heads) != len(depths):
            raise ValueError(
                f"{name}: num_heads must have one entry per stage ({len(depths)} in depths), got {len(num_heads)}"
            )
        for option, values in (("conv_depths", conv_depths), ("depths", depths)):
            if any(as_int(name, **{option: depth}) < 1 for depth in values) or not depths:
                raise ValueError(f"{name}: {option} must be positive, got {values}")
        self.in_chans, self.conv_depths = as_int(name, in_chans=in_chans), tuple(conv_depths)
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.channels = [embed_dim * 2 ** (i + 1) for i in range(len(conv_depths) + len(depths))]
        dim, layers = embed_dim, []
        for depth in (*conv_depths, 1):
            layers += [Mv2Se(dim, 2 * dim, 2), *(Mv2Se(2 * dim, 2 * dim) for _ in range(depth - 1))]
            dim *= 2
        self.conv_layers = nn.ModuleList(layers)
        grid = None
        if img_size is not None:
            grid = [-(-size // 2 ** (len(conv_depths) + 2)) for size in check_pair(name, "img_size", img_size, 1)]
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path * index / last for index in range(sum(depths))])
        options = {"window_size": window_size, "mlp_ratio": mlp_ratio, "reduce_scale": reduce_scale}
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            blocks = [
                block(dim, heads, grid, qkv_bias=qkv_bias, drop_path=next(rates), **options) for _ in range(depth)
            ]
            merge = stage < len(depths) - 1
            self.layers.append(Stage(blocks, PatchMerging(dim, pad=grid is None) if merge else None))
            if merge and grid is not None:
                if grid[0] % 2 or grid[1] % 2:
                    raise ValueError(f"{name}: img_size must give even grids before a merging, got {img_size}")
                grid = [size // 2 for size in grid]
            dim *= 2

    def maps(self, input: Tensor) -> list[Tensor]:
        """The ``(B, H', W', C')`` map of each group of convolution blocks and of each ladder stage."""
        name = type(self).__name__
        check_floating(name, input=input)
        if input.dim() != 4 or input.shape[1] != self.in_chans:
            raise ValueError(f"{name}: input must be (B, {self.in_chans}, H, W), got {tuple(input.shape)}")
        if input.shape[2] < 1 or input.shape[3] < 1:
            raise ValueError(f"{name}: the image must have at least one pixel, got {tuple(input.shape)}")
        x, maps, layers = self.patch_embed(input.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), [], 0
        for depth in self.conv_depths:
            for layer in self.conv_layers[layers : layers + depth]:
                x = layer(x)
            layers += depth
            maps.append(x.permute(0, 2, 3, 1))
        x = self.conv_layers[layers](x).permute(0, 2, 3, 1).contiguous()
        for stage in self.layers:
            assert isinstance(stage, Stage)
            maps.append(stage(x))
            x = maps[-1] if stage.downsample is None else stage.downsample(maps[-1])
        return maps

    def fold_norms_(self) -> None:
        """See :func:`tersor.fold_norms_`; of the stem the last norm, in front of a 1x1 convolution."""
        first = self.conv_layers[0]
        assert isinstance(first, Mv2Se)
        fold_into_next_(self.patch_embed.proj, 8, first.conv[0])


class PSLT(Trunk):
    """The classification model: stem, light convolution blocks, ladder stages with merging between, mean, linear head.

    Args:
        num_classes: size of the output; 0 leaves the head out and returns the pooled features.
        img_size: H and W (one int for both) that the ladder blocks are built for, see :class:`tersor.LadderBlock`.
        embed_dim: channels of the stem; every group of convolution blocks and every merging doubles them.
        conv_depths: convolution blocks of each group, the first one halving the grid; one more that halves it follows.
        depths, num_heads: ladder blocks of each stage, and heads of each of their branches.
        window_size, mlp_ratio, reduce_scale, qkv_bias: of the ladder blocks.
        drop_path: stochastic-depth rate of the last ladder block; the rates rise from 0 in equal steps.
        distilled: a second head, ``head_dist``: two outputs in training, their mean otherwise.
        in_chans: channels of the image.
        block: called like :class:`tersor.LadderBlock`.

    Shape:
        ``(B, in_chans, H, W)`` to ``(B, num_classes)``. Grids are halved rounding up; those of ladder stages must be
        whole windows, and even before a merging: multiples of 224 with the published depths at 224.

    Raises:
        TypeError, ValueError: options that do not fit each other, or an input of another shape or dtype.

    Source: Wu et al., arXiv 2304.03481.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        embed_dim: int = 36,
        conv_depths: Sequence[int] = (3, 3),
        depths: Sequence[int] = (10, 3),
        num_heads: Sequence[int] = (4, 8),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        reduce_scale: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.2,
        distilled: bool = False,
        in_chans: int = 3,
        block: Callable[..., nn.Module] = LadderBlock,
    ) -> None:
        check_pair("PSLT", "img_size", img_size, 1)
        if as_int("PSLT", num_classes=num_classes) < 0:
            raise ValueError(f"PSLT: num_classes must be at least 0, got {num_classes}")
        sizes = (embed_dim, conv_depths, depths, num_heads, window_size, mlp_ratio, reduce_scale)
        super().__init__(img_size, *sizes, qkv_bias, drop_path, in_chans, block)
        self.num_classes = num_classes
        self.norm = nn.LayerNorm(self.channels[-1])
        self.head = nn.Linear(self.channels[-1], num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(self.channels[-1], num_classes) if distilled and num_classes else None
        self.apply(init_linear)

    def forward_features(self, input: Tensor) -> Tensor:
        """The normalised map before pooling: ``(B, in_chans, H, W)`` to ``(B, H', W', C')``."""
        return self.norm(self.maps(input)[-1])

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled = self.forward_features(input).mean((1, 2))
        if self.head_dist is None:
            return self.head(pooled)
        outputs = self.head(pooled), self.head_dist(pooled)
        return outputs if self.training else (outputs[0] + outputs[1]) / 2


class PSLTBackbone(Trunk):
    """The feature pyramid for detection: ladder blocks for maps of any size, see ``input_resolution=None`` there.

    A map is given for each group of convolution blocks and each ladder stage, normalised over its channels by a layer
    norm of its own, ``norm0`` and so on, as Swin's backbones do; the published names of these norms are not known.
    Odd grids get a row or column of zeros before a merging, as in Swin. Weights of a classifier load with
    ``strict=False``.

    Args:
        out_indices: which of the maps are given; their ``strides`` are 4, 8, 16 and 32, with :attr:`out_channels`.

    The other arguments are those of :class:`PSLT`.

    Shape:
        ``(B, in_chans, H, W)`` to a list of ``(B, C', H', W')`` with ``H' = ceil(H / stride)``, in channels-last
        memory.

    Raises:
        TypeError, ValueError: options that do not fit each other, or an input of another shape or dtype.

    Source: Wu et al., arXiv 2304.03481.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        embed_dim: int = 36,
        conv_depths: Sequence[int] = (3, 3),
        depths: Sequence[int] = (10, 3),
        num_heads: Sequence[int] = (4, 8),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        reduce_scale: float = 4,
        qkv_bias: bool = True,
        drop_path: float = 0.2,
        in_chans: int = 3,
        block: Callable[..., nn.Module] = LadderBlock,
    ) -> None:
        sizes = (embed_dim, conv_depths, depths, num_heads, window_size, mlp_ratio, reduce_scale)
        super().__init__(None, *sizes, qkv_bias, drop_path, in_chans, block)
        self.out_indices = tuple(as_int("PSLTBackbone", out_indices=index) for index in out_indices)
        if not self.out_indices or not all(0 <= index < len(self.channels) for index in self.out_indices):
            raise ValueError(
                f"PSLTBackbone: out_indices must be from 0 to {len(self.channels) - 1} and at least one, "
                f"got {out_indices}"
            )
        self.out_channels = [self.channels[index] for index in self.out_indices]
        self.strides = [4 * 2**index for index in self.out_indices]
        for index, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f"norm{index}", nn.LayerNorm(channels))
        self.apply(init_linear)

    def forward(self, input: Tensor) -> list[Tensor]:
        maps = self.maps(input)
        norms = [(self.get_submodule(f"norm{index}"), maps[index]) for index in self.out_indices]
        return [norm(map).permute(0, 3, 1, 2) for norm, map in norms]


def pslt_tiny(**options: Any) -> PSLT:
    """PSLT_tiny: 4.30 M parameters, 0.90 G multiply-adds at 224 x 224; options as :class:`PSLT`."""
    return PSLT(**VARIANTS["pslt_tiny"] | options)


def pslt_base(**options: Any) -> PSLT:
    """PSLT: 9.26 M parameters, 1.97 G multiply-adds at 224 x 224; options as :class:`PSLT`."""
    return PSLT(**VARIANTS["pslt_base"] | options)


def pslt_large(**options: Any) -> PSLT:
    """PSLT_large: 16.10 M parameters, 3.46 G multiply-adds at 224 x 224; options as :class:`PSLT`."""
    return PSLT(**VARIANTS["pslt_large"] | options)


def pslt_backbone(variant: str = "pslt_base", **options: Any) -> PSLTBackbone:
    """The :class:`PSLTBackbone` of a variant, ``"pslt_tiny"``, ``"pslt_base"`` or ``"pslt_large"``."""
    if variant not in VARIANTS:
        raise ValueError(f"pslt_backbone: variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    return PSLTBackbone(**VARIANTS[variant] | options)
