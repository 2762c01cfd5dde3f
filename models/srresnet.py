"""SRResNet (arXiv 1609.04802) with the low-bit residual blocks of DDTB (arXiv 2203.03844), and in full precision.

The state dict has the published keys of both; :func:`tersor.models.load_full_precision` takes the one into the other.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tersor.models._super_resolution import LayerFactory, SuperResolution, activated, check_scale, check_sizes


class SRResNet(SuperResolution):
    """9x9 head, residual blocks with batch norm under a global skip, one upsampling per factor 2, 9x9 output.

    Only the blocks are quantised. ``SRResNet(quantized=False)`` is the full-precision teacher.

    Args:
        scale: 2 or 4.
        blocks, channels: of the body; 16 and 64 are published.
        bits: of the blocks' weights and activations, 2 to 8; 32 keeps the quantisers and lets everything pass.
        quantized: False for plain convolutions, without activation quantisers.
        **activation: options of :class:`tersor.BoundedActivation`.

    Shape:
        ``(N, 3, H, W)`` of values 0 to 255 to ``(N, 3, scale * H, scale * W)`` and the feature ``(N, channels, H, W)``
        in front of the upsampling. There is no mean shift.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Ledig et al., arXiv 1609.04802; its low-bit blocks Zhong et al., arXiv 2203.03844.
    """

    def __init__(
        self,
        scale: int = 2,
        blocks: int = 16,
        channels: int = 64,
        bits: int = 2,
        quantized: bool = True,
        **activation: Any,
    ) -> None:
        super().__init__()
        self.scale = check_scale("SRResNet", scale, (2, 4))
        check_sizes("SRResNet", blocks=blocks, channels=channels)
        factory = LayerFactory(quantized, bits, "percentile", activation)
        self.conv_input = nn.Conv2d(3, channels, 9, padding=4, bias=False)
        self.relu = nn.PReLU()
        self.residual = nn.Sequential(*(SRResNetBlock(channels, factory) for _ in range(blocks)))
        self.conv_mid = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn_mid = nn.BatchNorm2d(channels)
        upscale: list[nn.Module] = []
        for _ in range(self.scale // 2):
            conv = nn.Conv2d(channels, 4 * channels, 3, padding=1, bias=False)
            upscale += [conv, nn.PixelShuffle(2), nn.PReLU()]
        self.upscale = nn.Sequential(*upscale)
        self.conv_output = nn.Conv2d(channels, 3, 9, padding=4, bias=False)
        self.apply(_init_conv)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(input)
        first = self.relu(self.conv_input(input))
        feature = self.bn_mid(self.conv_mid(self.residual(first))) + first
        return self.conv_output(self.upscale(feature)), feature


class SRResNetBlock(nn.Module):
    """out = norm2(conv2(act2(prelu(norm1(conv1(act1(x))))))) + x, the skip unquantised."""

    pairs = (("act1", "conv1", False), ("act2", "conv2", False))

    def __init__(self, channels: int, factory: LayerFactory) -> None:
        super().__init__()
        self.conv1 = factory.conv(channels, channels, bias=False)
        self.in1 = nn.BatchNorm2d(channels)
        self.relu = nn.PReLU()
        self.conv2 = factory.conv(channels, channels, bias=False)
        self.in2 = nn.BatchNorm2d(channels)
        self.act1, self.act2 = factory.activation(channels), factory.activation(channels)

    def forward(self, input: Tensor) -> Tensor:
        branch = self.relu(self.in1(activated(self.act1, self.conv1, input)))
        return self.in2(activated(self.act2, self.conv2, branch)) + input


def _init_conv(module: nn.Module) -> None:
    """The published initialisation, of the gates' convolutions too."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))


def srresnet(scale: int = 2, **options: Any) -> SRResNet:
    """16 blocks of 64 channels: 1.55 M parameters at x4 in full precision; options as :class:`SRResNet`."""
    return SRResNet(scale, **{"blocks": 16, "channels": 64} | options)


def srresnet_tiny(scale: int = 2, **options: Any) -> SRResNet:
    """4 blocks of 16 channels, ours, for demos on a CPU; options as :class:`SRResNet`."""
    return SRResNet(scale, **{"blocks": 4, "channels": 16} | options)
