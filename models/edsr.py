"""EDSR (arXiv 1707.02921) with the low-bit residual blocks of DDTB (arXiv 2203.03844), and in full precision.

The state dict has the published keys of both; :func:`tersor.models.load_full_precision` takes the one into the other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tersor.models._super_resolution import (
    RGB_MEAN,
    LayerFactory,
    SuperResolution,
    activated,
    activated_sum,
    check_scale,
    check_sizes,
    upsampler,
)


class EDSR(SuperResolution):
    """Mean shift, head, residual blocks under a global skip, upsampler, output convolution, mean shift back.

    Only the blocks are quantised. Full precision needs no quantisers: ``EDSR(quantized=False)`` is the teacher.

    Args:
        scale: 2, 3 or 4.
        blocks, channels: of the body; 16 and 64 are the published baseline.
        bits: of the blocks' weights and activations, 2 to 8; 32 keeps the quantisers and lets everything pass.
        res_scale: factor on each block's branch.
        quantized: False for plain convolutions, without activation quantisers.
        **activation: options of :class:`tersor.BoundedActivation`.

    Shape:
        ``(N, 3, H, W)`` of values 0 to 255 to ``(N, 3, scale * H, scale * W)`` and the feature ``(N, channels, H, W)``
        in front of the tail.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Lim et al., arXiv 1707.02921; its low-bit blocks Zhong et al., arXiv 2203.03844.
    """

    def __init__(
        self,
        scale: int = 2,
        blocks: int = 16,
        channels: int = 64,
        bits: int = 2,
        res_scale: float = 1.0,
        quantized: bool = True,
        **activation: Any,
    ) -> None:
        super().__init__()
        self.scale = check_scale("EDSR", scale, (2, 3, 4))
        check_sizes("EDSR", blocks=blocks, channels=channels)
        factory = LayerFactory(quantized, bits, "percentile", activation)
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        body: list[nn.Module] = [EDSRBlock(channels, factory, res_scale) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(channels, channels, 3, padding=1))
        self.tail = nn.Sequential(
            nn.Sequential(*upsampler(channels, channels, self.scale)), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(input)
        x = self.head(self.sub_mean(input))
        feature = self.body(x) + x
        return self.add_mean(self.tail(feature)), feature

    @staticmethod
    def student_key(key: str) -> str:
        """The second convolution moves one place on, as an activation quantiser comes before it."""
        return re.sub(r"^(body\.\d+\.body)\.2\.", r"\1.3.", key)


class EDSRBlock(nn.Module):
    """out = act3(res_scale * conv2(act2(relu(conv1(x))))) + act1(x); both convolutions' weights are quantised.

    The first convolution takes x itself, not act1(x), so that only the second one's input is of few bits.
    ``quant_act2`` is registered twice, in ``body`` too, as in the published state dict.
    """

    pairs: tuple[tuple[str, str, bool], ...] = (("quant_act2", "body.3", True),)

    def __init__(self, channels: int, factory: LayerFactory, res_scale: float = 1.0) -> None:
        super().__init__()
        self.res_scale = float(res_scale)
        self.quant_act1, self.quant_act2, self.quant_act3 = (factory.activation(channels) for _ in range(3))
        layers = [factory.conv(channels, channels), nn.ReLU(), factory.conv(channels, channels)]
        if factory.quantized:
            layers.insert(2, self.quant_act2)
        else:
            self.pairs = ()
        self.body = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        # Not self.body(...): the ReLU goes into the activation's pass, and the activation into a converted layer.
        branch = activated(self.quant_act2, self.body[-1], self.body[0](input), relu=True)
        if self.res_scale != 1:
            branch = branch * self.res_scale
        return activated_sum(self.quant_act3, branch, self.quant_act1, input)


class MeanShift(nn.Conv2d):
    """Adds ``sign`` times the mean colour; a frozen 1x1 convolution, for the sake of its published keys."""

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, 1, bias=False)
        self.bias = nn.Parameter(sign * 255 * torch.tensor(RGB_MEAN))
        self.weight.data.copy_(torch.eye(3).view(3, 3, 1, 1))
        self.requires_grad_(False)


def edsr_baseline(scale: int = 2, **options: Any) -> EDSR:
    """16 blocks of 64 channels: 1.37 M parameters at x2, 1.52 M at x4 in full precision; options as :class:`EDSR`."""
    return EDSR(scale, **{"blocks": 16, "channels": 64} | options)


def edsr_tiny(scale: int = 2, **options: Any) -> EDSR:
    """4 blocks of 16 channels, ours, for demos on a CPU; options as :class:`EDSR`."""
    return EDSR(scale, **{"blocks": 4, "channels": 16} | options)
