"""MobileNet v1 (arXiv 1704.04861) and v2 (arXiv 1801.04381), in full precision and with the quantised layers of LTS.

The state dicts have the published keys of LTS (arXiv 2211.08544), see :func:`tersor.freezing.authors_state_dict`; its
activation is a plain ReLU in both. Strides are the usual ones of ImageNet.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from tersor.freezing import FreezeSchedule
from tersor.models._classification import check_images, init_convolution, lts_layers
from tersor.models._super_resolution import check_sizes
from tersor.models.layers import Layer


class Stage(NamedTuple):
    """Output channels, layers, stride of the first layer, and how many times as many channels it has within."""

    channels: int
    layers: int
    stride: int
    expansion: int = 1


V1 = (Stage(64, 1, 1), Stage(128, 2, 2), Stage(256, 2, 2), Stage(512, 6, 2), Stage(1024, 2, 2))
V2 = (
    Stage(16, 1, 1),
    Stage(24, 2, 2, 6),
    Stage(32, 3, 2, 6),
    Stage(64, 4, 2, 6),
    Stage(96, 3, 1, 6),
    Stage(160, 3, 2, 6),
    Stage(320, 1, 1, 6),
)


class SeparableLayer(nn.Module):
    """v1: a depth-wise 3x3 and a 1x1 convolution, with norm and ReLU after each.

    Args:
        before, stage: channels of the input; channels of the output and the rest.
        stride: of the depth-wise convolution.
        conv: called like ``torch.nn.Conv2d``.
    """

    def __init__(self, before: int, stage: Stage, stride: int, conv: Layer = nn.Conv2d) -> None:
        super().__init__()
        depthwise = _unit(conv, before, before, 3, stride, groups=before)
        self.body = nn.Sequential(*depthwise, *_unit(conv, before, stage.channels))

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input)


class InvertedResidual(nn.Module):
    """v2: 1x1 to more channels (unless the expansion is 1), depth-wise 3x3, 1x1 without a ReLU; plus x where it fits.

    Args:
        before, stage, stride, conv: as for :class:`SeparableLayer`.
    """

    def __init__(self, before: int, stage: Stage, stride: int, conv: Layer = nn.Conv2d) -> None:
        super().__init__()
        within = before * stage.expansion
        expand = _unit(conv, before, within) if stage.expansion > 1 else []
        depthwise = _unit(conv, within, within, 3, stride, groups=within)
        self.body = nn.Sequential(*expand, *depthwise, *_unit(conv, within, stage.channels)[:-1])
        self.residual = stride == 1 and before == stage.channels

    def forward(self, input: Tensor) -> Tensor:
        output = self.body(input)
        return input + output if self.residual else output


def _unit(conv: Layer, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, norm, ReLU."""
    window = {"stride": stride, "padding": kernel // 2, "groups": groups}
    return [conv(before, after, kernel, bias=False, **window), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


class MobileNet(nn.Module):
    """Head, stages, a 1x1 convolution in v2, mean over the map, classifier.

    Args:
        version: 1 or 2.
        num_classes: size of the output.
        width: factor on all channels, which then become multiples of 8; v2's 1280 last ones only grow.
        in_chans: channels of the image.
        conv, linear: called like ``torch.nn.Conv2d`` and ``torch.nn.Linear``, for all layers.

    Shape:
        ``(N, in_chans, H, W)`` to ``(N, num_classes)``; any image size, which the stages divide by 32, rounding up.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: arXiv 1704.04861 (v1), arXiv 1801.04381 (v2).
    """

    def __init__(
        self,
        version: int = 2,
        num_classes: int = 1000,
        width: float = 1.0,
        in_chans: int = 3,
        *,
        conv: Layer = nn.Conv2d,
        linear: Layer = nn.Linear,
    ) -> None:
        super().__init__()
        check_sizes("MobileNet", num_classes=num_classes, in_chans=in_chans)
        if version not in (1, 2):
            raise ValueError(f"MobileNet: version must be 1 or 2, got {version!r}")
        if not 0 < width < 100:
            raise ValueError(f"MobileNet: width must be above 0 and below 100, got {width}")
        self.in_chans = in_chans
        layer = (SeparableLayer, InvertedResidual)[version - 1]
        channels = _scaled(32, width)
        self.head = nn.Sequential(*_unit(conv, in_chans, channels, 3, 2))
        self.layers: list[str] = []
        for i, stage in enumerate((V1, V2)[version - 1]):
            stage = stage._replace(channels=_scaled(stage.channels, width))
            for j in range(stage.layers):
                self.layers.append(f"stage_{i}_layer_{j}")
                self.add_module(self.layers[-1], layer(channels, stage, stage.stride if j == 0 else 1, conv))
                channels = stage.channels
        self.tail: nn.Module = nn.Identity()
        if version == 2:
            last = _scaled(1280, max(width, 1.0))
            self.tail = nn.Sequential(*_unit(conv, channels, last))
            channels = last
        classifier = linear(channels, num_classes)
        self.classifier = classifier if version == 1 else nn.Sequential(classifier)  # the published keys
        self.apply(init_convolution)

    def forward(self, input: Tensor) -> Tensor:
        check_images("MobileNet", input, self.in_chans)
        x = self.head(input)
        for name in self.layers:
            x = getattr(self, name)(x)
        return self.classifier(self.tail(x).mean((2, 3)))


def _scaled(channels: int, width: float) -> int:
    """The multiple of 8 next to ``channels * width``, but not less than nine tenths of it, as the authors of v2 do."""
    exact = channels * width
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * exact else rounded


def mobilenet_v1(num_classes: int = 1000, width: float = 1.0, in_chans: int = 3, **layers: Any) -> MobileNet:
    """4.2 M parameters, 0.57 G multiply-adds at 224 x 224; ``conv`` and ``linear`` as for :class:`MobileNet`."""
    return MobileNet(1, num_classes, width, in_chans, **layers)


def mobilenet_v2(num_classes: int = 1000, width: float = 1.0, in_chans: int = 3, **layers: Any) -> MobileNet:
    """3.5 M parameters, 0.30 G multiply-adds at 224 x 224; ``conv`` and ``linear`` as for :class:`MobileNet`."""
    return MobileNet(2, num_classes, width, in_chans, **layers)


def mobilenet_v1_quant(
    bits: int = 4,
    schedule: FreezeSchedule | None = None,
    saved: bool = True,
    frozen_step: bool = False,
    num_classes: int = 1000,
    width: float = 1.0,
    in_chans: int = 3,
) -> MobileNet:
    """:func:`mobilenet_v1` with every convolution and the classifier quantised.

    Run :func:`tersor.freezing.initialize_` on a batch before the first step.

    Args:
        bits, schedule, saved, frozen_step: see :class:`tersor.freezing.LtsWeight`.
        num_classes, width, in_chans: see :class:`MobileNet`.
    """
    return mobilenet_v1(num_classes, width, in_chans, **lts_layers(bits, schedule, saved, frozen_step))


def mobilenet_v2_quant(
    bits: int = 4,
    schedule: FreezeSchedule | None = None,
    saved: bool = True,
    frozen_step: bool = False,
    num_classes: int = 1000,
    width: float = 1.0,
    in_chans: int = 3,
) -> MobileNet:
    """:func:`mobilenet_v2` quantised like :func:`mobilenet_v1_quant`."""
    return mobilenet_v2(num_classes, width, in_chans, **lts_layers(bits, schedule, saved, frozen_step))
