"""DeiT (arXiv 2012.12877), dense and with the N:M sparse layers of LBC (arXiv 2206.06662).

The linear layers of the blocks are passed in. The state dict has timm's keys, those of LBC beside them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.models._classification import check_images
from tersor.models._super_resolution import check_sizes
from tersor.models._tokens import PatchEmbedding, TokenBlock
from tersor.models.layers import Layer, init_linear
from tersor.sparsity import NMLinear


class DeiT(nn.Module):
    """A vision transformer that classifies by its class token.

    Args:
        image_size: height and width of the images, a multiple of ``patch_size``.
        patch_size: of the square patches.
        dim, depth, num_heads, mlp_ratio: of the blocks, see ``TokenBlock``.
        num_classes: size of the output.
        in_chans: channels of the image.
        drop_path: stochastic-depth rate of the last block; those before have evenly less.
        linear: called like ``torch.nn.Linear``, for the layers of the blocks; the rest is dense.

    Shape:
        ``(B, in_chans, image_size, image_size)`` to ``(B, num_classes)``.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Touvron et al., arXiv 2012.12877.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
        linear: Layer = nn.Linear,
    ) -> None:
        super().__init__()
        check_sizes("DeiT", image_size=image_size, patch_size=patch_size, dim=dim, depth=depth, num_classes=num_classes)
        if image_size % patch_size:
            raise ValueError(f"DeiT: image_size must be a multiple of patch_size ({patch_size}), got {image_size}")
        self.image_size, self.in_chans = image_size, in_chans
        self.patch_embed = PatchEmbedding(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(TokenBlock(dim, num_heads, mlp_ratio, rate, linear=linear) for rate in rates))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.apply(init_linear)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, input: Tensor) -> Tensor:
        check_images("DeiT", input, self.in_chans)
        if input.shape[2] != self.image_size or input.shape[3] != self.image_size:
            raise ValueError(
                f"DeiT: input must be {self.image_size} high and wide, got {input.shape[2]} x {input.shape[3]}"
            )
        tokens = self.patch_embed(input)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1) + self.pos_embed
        blocks: list[Any] = list(self.blocks)
        for block in blocks[:-1]:
            x = block(x)
        return self.head(self.norm(blocks[-1].class_token(x))[:, 0])  # no other token has a head


def deit_tiny(**options: Any) -> DeiT:
    """192 channels, 3 heads: 5.7 M parameters; options as for :class:`DeiT`."""
    return DeiT(**({"dim": 192, "num_heads": 3} | options))


def deit_small(**options: Any) -> DeiT:
    """384 channels, 6 heads: 22.1 M parameters; options as for :class:`DeiT`."""
    return DeiT(**({"dim": 384, "num_heads": 6} | options))


def deit_tiny_nm(n: int = 2, m: int = 4, **options: Any) -> DeiT:
    """:func:`deit_tiny` with N:M sparse layers (:class:`tersor.NMLinear`) in its blocks."""
    return deit_tiny(**({"linear": partial(NMLinear, n=n, m=m)} | options))


def deit_small_nm(n: int = 2, m: int = 4, **options: Any) -> DeiT:
    """:func:`deit_small` sparse like :func:`deit_tiny_nm`: 21.2 M of its parameters are in N:M layers."""
    return deit_small(**({"linear": partial(NMLinear, n=n, m=m)} | options))
