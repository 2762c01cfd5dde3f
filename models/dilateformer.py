"""DilateFormer (arXiv 2302.01791): dilated sliding-window attention in the early stages, global in the late ones.

The state dict has the published model's keys, so that its checkpoints load with :func:`tersor.models.load_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor import DilatedAttention
from tersor._checks import as_int, check_floating
from tersor.models.layers import AttentionBlock, GlobalAttention, init_linear

VARIANTS: dict[str, dict[str, Any]] = {
    "dilateformer_tiny": {"embed_dim": 72, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "dilateformer_small": {"embed_dim": 72, "depths": (3, 5, 8, 3), "num_heads": (3, 6, 12, 24)},
    "dilateformer_base": {"embed_dim": 96, "depths": (4, 8, 10, 3), "num_heads": (3, 6, 12, 24)},
    # Ours, for small images and for demos: 32 x 32 pixels give grids of 8, 4 and 2.
    "dilateformer_nano": {
        "embed_dim": 24,
        "depths": (2, 2, 1),
        "num_heads": (3, 6, 12),
        "dilate_attention": (True, True, False),
        "downsamples": (True, True, False),
        "patch_way": "pointconv",
        "drop_path": 0.0,
    },
}

# (kernel size, stride) of the stem's four convolutions; "overlaping" is the authors' spelling.
_STEMS = {
    "overlaping": ((3, 1), (3, 2), (3, 1), (3, 2)),
    "pointconv": ((3, 2), (1, 1), (3, 2), (1, 1)),
}
_SPELLINGS = {"overlapping": "overlaping", "nonoverlapping": "nonoverlaping"}
_PATCH = 4  # what every stem divides the image by


class DilateFormer(nn.Module):
    """The classification model: stem, stages of attention blocks with merging between them, mean, linear head.

    Args:
        num_classes: size of the output; 0 leaves the head out and returns the pooled features.
        embed_dim: channels of the first stage; every merging doubles them.
        depths, num_heads: blocks and heads of each stage.
        dilate_attention: for each stage, dilated sliding-window (True) or global (False) attention.
        downsamples: for each stage, whether merging follows it.
        kernel_size, dilation: of the dilated attention, see :func:`tersor.dilated_attention`.
        mlp_ratio: hidden channels of the MLP as a multiple of the stage's channels.
        qkv_bias, qk_scale: of all attention layers.
        drop_path: stochastic-depth rate of the last block; the rates rise from 0 in equal steps.
        drop_rate: dropout in front of the head.
        patch_way: the stem: ``"overlaping"``, ``"pointconv"`` or ``"nonoverlaping"`` (or spelled with ``pp``).
        merging_way: only ``"conv3_2"``.
        cpe_per_stage: position convolution in the first block of each stage only.
        in_chans: channels of the image.
        attention: the dilated attention layer's class, or anything called like :class:`tersor.DilatedAttention`.

    Shape:
        ``(B, in_chans, H, W)`` to ``(B, num_classes)``. Any image size: the stem divides it by 4 and every merging by
        2, rounding up. Only the ``"nonoverlaping"`` stem needs multiples of 4. The input is left as it is.

    Raises:
        TypeError, ValueError: options that do not fit each other, or an input of another shape or dtype.

    Source: Jiao et al., arXiv 2302.01791.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        embed_dim: int = 72,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        dilate_attention: Sequence[bool] = (True, True, False, False),
        downsamples: Sequence[bool] = (True, True, True, False),
        kernel_size: int = 3,
        dilation: int | Sequence[int] = (1, 2, 3),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_path: float = 0.1,
        drop_rate: float = 0.0,
        patch_way: str = "overlaping",
        merging_way: str = "conv3_2",
        cpe_per_stage: bool = False,
        in_chans: int = 3,
        attention: Callable[..., nn.Module] = DilatedAttention,
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("dilate_attention", dilate_attention)):
            _check_per_stage(name, value, depths)
        _check_per_stage("downsamples", downsamples, depths)
        if not depths or min(as_int("DilateFormer", depths=depth) for depth in depths) < 1:
            raise ValueError(f"DilateFormer: depths must be positive and at least one, got {depths}")
        if as_int("DilateFormer", num_classes=num_classes) < 0:
            raise ValueError(f"DilateFormer: num_classes must be at least 0, got {num_classes}")
        if merging_way != "conv3_2":
            raise ValueError(f"DilateFormer: merging_way must be 'conv3_2', got {merging_way!r}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_way)
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path * block / last for block in range(sum(depths))])
        dim, stages = embed_dim, []
        for depth, heads, dilated, merge in zip(depths, num_heads, dilate_attention, downsamples, strict=True):
            blocks = []
            for index in range(depth):
                options: dict[str, Any] = {"num_heads": heads, "qkv_bias": qkv_bias, "qk_scale": qk_scale}
                if dilated:
                    layer = attention(dim, kernel_size=kernel_size, dilation=dilation, **options)
                else:
                    layer = GlobalAttention(dim, **options)
                position = index == 0 or not cpe_per_stage
                blocks.append(AttentionBlock(dim, layer, mlp_ratio, next(rates), position))
            stages.append(Stage(blocks, Merging(dim) if merge else nn.Identity()))
            dim *= 2 if merge else 1
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_linear)

    def forward_features(self, input: Tensor) -> Tensor:
        """The normalised map before pooling: ``(B, in_chans, H, W)`` to ``(B, H', W', C')``."""
        x = self.patch_embed(input)
        for stage in self.stages:
            x = stage(x)
        return self.norm(x.permute(0, 2, 3, 1))

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.head_drop(self.forward_features(input).mean((1, 2))))


class PatchEmbed(nn.Module):
    """The stem: ``(B, in_chans, H, W)`` to ``(B, dim, ceil(H / 4), ceil(W / 4))`` in channels-last memory."""

    def __init__(self, in_chans: int, dim: int, patch_way: str) -> None:
        super().__init__()
        way = _SPELLINGS.get(patch_way, patch_way)
        if way not in (*_STEMS, "nonoverlaping"):
            raise ValueError(
                f"DilateFormer: patch_way must be 'overlaping', 'pointconv' or 'nonoverlaping', got {patch_way!r}"
            )
        self.in_chans, self.whole_patches = in_chans, way == "nonoverlaping"
        if self.whole_patches:
            self.proj: nn.Module = nn.Conv2d(in_chans, dim, _PATCH, _PATCH)  # its published key is not known
            return
        widths = (in_chans, 16, 32, 64, dim)
        layers: list[nn.Module] = []
        for index, (kernel_size, stride) in enumerate(_STEMS[way]):
            before, after = widths[index : index + 2]
            conv = nn.Conv2d(before, after, kernel_size, stride, kernel_size // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-2])  # neither norm nor activation after the last convolution

    def forward(self, input: Tensor) -> Tensor:
        check_floating("DilateFormer", input=input)
        if input.dim() != 4 or input.shape[1] != self.in_chans:
            raise ValueError(f"DilateFormer: input must be (B, {self.in_chans}, H, W), got {tuple(input.shape)}")
        height, width = input.shape[2:]
        if height < 1 or width < 1:
            raise ValueError(f"DilateFormer: the image must have at least one pixel, got {height} x {width}")
        if self.whole_patches and (height % _PATCH or width % _PATCH):
            raise ValueError(
                f"DilateFormer: the 'nonoverlaping' stem needs H and W to be multiples of {_PATCH}, "
                f"got {height} x {width}"
            )
        return self.proj(input.contiguous(memory_format=torch.channels_last))


class Stage(nn.Module):
    """Blocks on one grid, then what leads to the next: ``(B, dim, H, W)`` maps."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, input: Tensor) -> Tensor:
        return self.downsample(self.blocks(input))


class Merging(nn.Module):
    """Half the grid, twice the channels: ``(B, dim, H, W)`` to ``(B, 2 * dim, ceil(H / 2), ceil(W / 2))``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, 2, 1), nn.BatchNorm2d(2 * dim))

    def forward(self, input: Tensor) -> Tensor:
        return self.proj(input)


def dilateformer_tiny(**options: Any) -> DilateFormer:
    """DilateFormer-T: 17.24 M parameters, 3.16 G multiply-adds at 224 x 224; options as :class:`DilateFormer`."""
    return DilateFormer(**VARIANTS["dilateformer_tiny"] | options)


def dilateformer_small(**options: Any) -> DilateFormer:
    """DilateFormer-S: 24.06 M parameters, 4.59 G multiply-adds at 224 x 224; options as :class:`DilateFormer`."""
    return DilateFormer(**VARIANTS["dilateformer_small"] | options)


def dilateformer_base(**options: Any) -> DilateFormer:
    """DilateFormer-B: 47.43 M parameters, 9.92 G multiply-adds at 224 x 224; options as :class:`DilateFormer`."""
    return DilateFormer(**VARIANTS["dilateformer_base"] | options)


def dilateformer_nano(**options: Any) -> DilateFormer:
    """Three stages of 24, 48 and 96 channels for small images; options as :class:`DilateFormer`."""
    return DilateFormer(**VARIANTS["dilateformer_nano"] | options)


def _check_per_stage(name: str, values: Sequence[Any], depths: Sequence[int]) -> None:
    if len(values) != len(depths):
        raise ValueError(
            f"DilateFormer: {name} must have one entry per stage ({len(depths)} in depths), got {len(values)}"
        )
