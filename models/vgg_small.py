"""VGG-small for CIFAR with binary weights and activations: ReCU (arXiv 2103.12369) and ReSTE (arXiv 2308.06689).

The first convolution and the classifier are in full precision. The state dicts have the published keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import BinaryStep, ReCUConv2d, ReSTEConv2d, binary_step
from tersor.models._classification import check_images, init_convolution
from tersor.models._super_resolution import check_sizes
from tersor.models.layers import Hardtanh, Layer

WIDTHS = (1, 1, 2, 2, 4, 4)  # of the convolutions, in units of the first one's
POOLED = (1, 3, 5)  # these are followed by max pooling
SIDE = 4  # of the last map


class VGGSmall(nn.Module):
    """Six 3x3 convolutions, three max poolings and a classifier.

    In ReCU's order a layer is hardtanh(norm([pool](conv(x)))), in ReSTE's [pool](norm(relu(conv(x)))).

    Args:
        num_classes: size of the output.
        width: channels of the first convolution; the last one has four times as many.
        in_chans: channels of the image.
        conv: called like ``torch.nn.Conv2d`` for all convolutions but the first.
        first: for that one.
        linear: called like ``torch.nn.Linear``.
        relu: ReSTE's order.

    Shape:
        ``(N, in_chans, H, W)`` to ``(N, num_classes)``, with H and W from 32 to 39.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: as in Xu et al., arXiv 2103.12369, and Wu et al., arXiv 2308.06689.
    """

    def __init__(
        self,
        num_classes: int = 10,
        width: int = 128,
        in_chans: int = 3,
        *,
        conv: Layer = ReCUConv2d,
        first: Layer = nn.Conv2d,
        linear: Layer = nn.Linear,
        relu: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("VGGSmall", num_classes=num_classes, width=width, in_chans=in_chans)
        self.in_chans, self.relu = in_chans, relu
        channels = in_chans
        for i, multiple in enumerate(WIDTHS):
            layer = conv if i else first
            self.add_module(f"conv{i}", layer(channels, width * multiple, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width * multiple))
            if not relu:
                self.add_module(f"act{i}", Hardtanh())
            channels = width * multiple
        self.fc = linear(channels * SIDE * SIDE, num_classes)
        self.apply(init_convolution)

    def _step(self, i: int) -> BinaryStep:
        after = None if i in POOLED else f"conv{i + 1}"
        return BinaryStep(f"conv{i}", f"bn{i}", self.relu, None if self.relu else f"act{i}", next=after)

    def binary_steps(self) -> Iterator[BinaryStep]:
        """For :func:`tersor.binary.convert_`; in ReCU's order the pooling comes between some convolutions and norms."""
        for i in range(1, len(WIDTHS)):
            if self.relu or i not in POOLED:
                yield self._step(i)

    def forward(self, input: Tensor) -> Tensor:
        check_images("VGGSmall", input, self.in_chans)
        if input.shape[2] // 8 != SIDE or input.shape[3] // 8 != SIDE:
            raise ValueError(f"VGGSmall: input must be 32 to 39 high and wide, got shape {tuple(input.shape)}")
        x: Any = input
        for i in range(len(WIDTHS)):
            if i in POOLED and not self.relu:
                norm, activation = getattr(self, f"bn{i}"), getattr(self, f"act{i}")
                x = activation(norm(F.max_pool2d(getattr(self, f"conv{i}")(x), 2)))
            else:
                x = binary_step(self, self._step(i), x)
                x = F.max_pool2d(x, 2) if i in POOLED else x
        return self.fc(torch.flatten(x, 1))


def vgg_small_recu(num_classes: int = 10, width: int = 128, in_chans: int = 3, **options: Any) -> VGGSmall:
    """ReCU for CIFAR: 4.7 M parameters, 0.60 G binary multiply-adds; options as for :class:`VGGSmall`."""
    options = {"conv": ReCUConv2d} | options
    return VGGSmall(num_classes, width, in_chans, **options)


def vgg_small_reste(num_classes: int = 10, width: int = 128, in_chans: int = 3, **options: Any) -> VGGSmall:
    """ReSTE for CIFAR: 4.7 M parameters, 0.60 G binary multiply-adds; options as for :class:`VGGSmall`."""
    defaults: dict[str, Any] = {"conv": ReSTEConv2d, "relu": True}
    return VGGSmall(num_classes, width, in_chans, **defaults | options)
