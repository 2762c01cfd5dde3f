"""RDN (arXiv 1802.08797), residual dense network, with the low-bit layers of DDTB (arXiv 2203.03844).

The state dict has the published keys of both; :func:`tersor.models.load_full_precision` takes the one into the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersor.models._super_resolution import (
    LayerFactory,
    SuperResolution,
    activated,
    activated_and_kept,
    check_scale,
    check_sizes,
    upsampler,
)

CONFIGS = {"A": {"blocks": 20, "layers": 6, "growth": 32}, "B": {"blocks": 16, "layers": 8, "growth": 64}}


class RDN(SuperResolution):
    """Two shallow convolutions, dense blocks in sequence, the fusion of all of them under a global skip, upsampler.

    The dense blocks and the fusion are quantised. ``RDN(quantized=False)`` is the full-precision teacher.

    Args:
        scale: 2, 3 or 4.
        config: ``"A"`` (20 blocks of 6 layers, growth 32) or ``"B"`` (16 of 8, growth 64).
        channels: between the blocks; 64 is published.
        bits: of the quantised weights and activations, 2 to 8; 32 keeps the quantisers and lets everything pass.
        quantized: False for plain convolutions, without activation quantisers.
        blocks, layers, growth: each instead of ``config``'s.
        **activation: options of :class:`tersor.BoundedActivation`; ``percentile`` is 95 if not given.

    Shape:
        ``(N, 3, H, W)`` of values 0 to 255 to ``(N, 3, scale * H, scale * W)`` and the feature ``(N, channels, H, W)``
        in front of the tail. There is no mean shift.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Zhang et al., arXiv 1802.08797; its low-bit blocks Zhong et al., arXiv 2203.03844.
    """

    pairs = (("act", "GFF.0", False),)  # GFF.1 has no activation of its own

    def __init__(
        self,
        scale: int = 2,
        config: str = "B",
        channels: int = 64,
        bits: int = 2,
        quantized: bool = True,
        *,
        blocks: int | None = None,
        layers: int | None = None,
        growth: int | None = None,
        **activation: Any,
    ) -> None:
        super().__init__()
        self.scale = check_scale("RDN", scale, (2, 3, 4))
        if config not in CONFIGS:
            raise ValueError(f"RDN: config must be one of {', '.join(CONFIGS)}, got {config!r}")
        given = {"blocks": blocks, "layers": layers, "growth": growth}
        sizes = CONFIGS[config] | {name: size for name, size in given.items() if size is not None}
        check_sizes("RDN", channels=channels, **sizes)
        factory = LayerFactory(quantized, bits, "minmax", {"percentile": 95} | activation)
        fused = sizes["blocks"] * channels  # the published global gate is fixed to B's 1024
        self.SFENet1 = nn.Conv2d(3, channels, 3, padding=1)
        self.SFENet2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.RDBs = nn.ModuleList(
            DenseBlock(channels, sizes["layers"], sizes["growth"], factory) for _ in range(sizes["blocks"])
        )
        self.act = factory.activation(fused)
        self.GFF = nn.Sequential(factory.conv(fused, channels, 1), factory.conv(channels, channels))
        self.UPNet = nn.Sequential(
            *upsampler(channels, sizes["growth"], self.scale), nn.Conv2d(sizes["growth"], 3, 3, padding=1)
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(input)
        first = self.SFENet1(input)
        x = self.SFENet2(first)
        outputs = []
        for block in self.RDBs:
            x = block(x)
            outputs.append(x)
        feature = self.GFF[1](activated(self.act, self.GFF[0], torch.cat(outputs, 1))) + first
        return self.UPNet(feature), feature


class DenseBlock(nn.Module):
    """Layers that each add ``growth`` channels to what they see, a 1x1 fusion, and a skip from the quantised input."""

    def __init__(self, channels: int, layers: int, growth: int, factory: LayerFactory) -> None:
        super().__init__()
        widths = [channels + i * growth for i in range(layers + 1)]
        self.convs = nn.ModuleList(DenseLayer(width, growth, factory) for width in widths[:-1])
        self.act1, self.act2 = factory.activation(channels), factory.activation(widths[-1])
        self.LFF = factory.conv(widths[-1], channels, 1)
        self.pairs = (
            ("act1", "convs.0.conv.0", False),
            *((f"convs.{i}.act", f"convs.{i}.conv.0", False) for i in range(1, layers)),
            ("act2", "LFF", False),
        )

    def forward(self, input: Tensor) -> Tensor:
        skip, output = self.convs[0](input, self.act1)
        output = torch.cat((skip, output), 1)
        for layer in self.convs[1:]:
            output = torch.cat(layer(output, layer.act), 1)
        return activated(self.act2, self.LFF, output) + skip


class DenseLayer(nn.Module):
    """The activated input, which goes on beside the output, and the output relu(conv(activated input)).

    The first layer of a block has the published ``act`` too, but its block's ``act1`` takes the place.
    """

    def __init__(self, channels: int, growth: int, factory: LayerFactory) -> None:
        super().__init__()
        self.conv = nn.Sequential(factory.conv(channels, growth), nn.ReLU())
        self.act = factory.activation(channels)

    def forward(self, input: Tensor, activation: nn.Module) -> tuple[Tensor, Tensor]:
        kept, output = activated_and_kept(activation, self.conv[0], input)
        return kept, self.conv[1](output)


def rdn_a(scale: int = 2, **options: Any) -> RDN:
    """20 blocks of 6 layers, growth 32; options as :class:`RDN`."""
    return RDN(scale, "A", **options)


def rdn_b(scale: int = 2, **options: Any) -> RDN:
    """16 blocks of 8 layers, growth 64: 22.27 M parameters at x4 in full precision; options as :class:`RDN`."""
    return RDN(scale, "B", **options)


def rdn_tiny(scale: int = 2, **options: Any) -> RDN:
    """2 blocks of 3 layers, 16 channels, growth 16, ours, for demos on a CPU; options as :class:`RDN`."""
    return RDN(scale, **{"channels": 16, "blocks": 2, "layers": 3, "growth": 16} | options)
