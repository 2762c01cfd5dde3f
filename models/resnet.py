"""ResNets (arXiv 1512.03385) for CIFAR and ImageNet, in full precision and with the quantised layers of LTS.

The layers are passed in, so that every family of operators uses this one definition. The quantised networks have the
published keys of LTS (arXiv 2211.08544), see :func:`tersor.freezing.authors_state_dict`; those in full precision for
ImageNet have torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tersor.freezing import FreezeSchedule
from tersor.models._classification import check_images, init_convolution, lts_layers
from tersor.models._super_resolution import check_sizes
from tersor.models.layers import Layer
from tersor.sparsity import NMConv2d

STEMS = ("cifar", "imagenet")
POOLS = {"cifar": "mean", "imagenet": "7x7"}


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), with 3x3 convolutions, the first one of the given stride.

    Args:
        before: channels of the input.
        width: channels of the block; its output has ``expansion`` times as many.
        stride: of the block.
        conv: called like ``torch.nn.Conv2d``.
        shortcut: name of the shortcut's 1x1 convolution and norm, which are there only if the shape changes.
    """

    expansion = 1

    def __init__(
        self, before: int, width: int, stride: int = 1, conv: Layer = nn.Conv2d, shortcut: str = "shortcut"
    ) -> None:
        super().__init__()
        self.conv1 = conv(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut_name = _add_shortcut(self, shortcut, before, width, stride, conv)

    def forward(self, input: Tensor) -> Tensor:
        x = _relu(self.conv1, self.bn1(self.conv1(input)))
        return _added(self.conv2, self.bn2, x, _shortcut(self, input))

    def norm_pairs(self) -> Iterator[tuple[str, str, bool]]:
        """For conversions: convolution, its norm, and whether a ReLU comes next."""
        yield "conv1", "bn1", True
        yield "conv2", "bn2", False

    def residual_convs(self) -> Iterator[str]:
        """For :func:`tersor.compress.convert_`: where a residual and a ReLU come after the norm."""
        yield "conv2"


class Bottleneck(nn.Module):
    """As :class:`BasicBlock`, with convolutions of 1x1, 3x3 (which has the stride) and 1x1 to four times the width."""

    expansion = 4

    def __init__(
        self, before: int, width: int, stride: int = 1, conv: Layer = nn.Conv2d, shortcut: str = "shortcut"
    ) -> None:
        super().__init__()
        after = width * self.expansion
        self.conv1 = conv(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.shortcut_name = _add_shortcut(self, shortcut, before, after, stride, conv)

    def forward(self, input: Tensor) -> Tensor:
        x = _relu(self.conv1, self.bn1(self.conv1(input)))
        x = _relu(self.conv2, self.bn2(self.conv2(x)))
        return _added(self.conv3, self.bn3, x, _shortcut(self, input))

    def norm_pairs(self) -> Iterator[tuple[str, str, bool]]:
        """As :meth:`BasicBlock.norm_pairs`."""
        yield "conv1", "bn1", True
        yield "conv2", "bn2", True
        yield "conv3", "bn3", False

    def residual_convs(self) -> Iterator[str]:
        """As :meth:`BasicBlock.residual_convs`."""
        yield "conv3"


def _relu(convolution: nn.Module, x: Tensor) -> Tensor:
    """Of what came from the convolution, unless a packed one has done it."""
    return x if getattr(convolution, "activation", None) == "relu" else F.relu(x)


def _added(convolution: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """relu(norm(convolution(x)) + residual); in one pass by a packed convolution that can."""
    if getattr(convolution, "adds_residual", False):
        return convolution(x, residual)
    return F.relu(norm(convolution(x)) + residual)


def _add_shortcut(block: nn.Module, name: str, before: int, after: int, stride: int, conv: Layer) -> str | None:
    if stride == 1 and before == after:
        return None
    layers = conv(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
    block.add_module(name, nn.Sequential(*layers))
    return name


def _shortcut(block: Any, input: Tensor) -> Tensor:
    return input if block.shortcut_name is None else getattr(block, block.shortcut_name)(input)


def _same(x: Tensor) -> Tensor:
    return x


class ResNet(nn.Module):
    """Stem, stages of residual blocks, average, maybe a norm, classifier.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck` or what is called like them; the channels of a block's output
            are its width times its ``expansion``.
        depths: blocks of each stage; every stage after the first halves the map and doubles the channels.
        width: channels of the stem and, without the block's expansion, of the first stage.
        num_classes: size of the output.
        in_chans: channels of the image.
        stem: ``"cifar"``: a 3x3 convolution; ``"imagenet"``: a 7x7 convolution of stride 2 and max pooling.
        conv, linear: called like ``torch.nn.Conv2d`` and ``torch.nn.Linear``, for all layers.
        first: called like ``torch.nn.Conv2d`` for the stem's; None for ``conv``.
        widths: channels of every stage, without the block's expansion; None doubles from ``width`` on.
        shortcut, classifier: names of these parts in the state dict.
        stem_names: names of the stem's convolution and norm.
        stem_activation: of a map, in the stem; None for none.
        activation_first: the stem's activation comes before its norm.
        pool: ``"mean"`` over the last map, or ``"7x7"``: over this part of it, for images of 224 x 224 (193 to 416 have
            such a map, of which it takes the upper left); None: the former for ``"cifar"``, the latter for
            ``"imagenet"``.
        norm: name of a ``BatchNorm1d`` in front of the classifier; None for none.
        norm_last: it comes behind the classifier in the state dict.
        norm_weight: what the weights of every ``BatchNorm2d`` start at.

    Shape:
        ``(N, in_chans, H, W)`` to ``(N, num_classes)``.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: He et al., arXiv 1512.03385.
    """

    def __init__(
        self,
        block: Layer,
        depths: Sequence[int],
        width: int = 64,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        stem: str = "imagenet",
        conv: Layer = nn.Conv2d,
        linear: Layer = nn.Linear,
        first: Layer | None = None,
        widths: Sequence[int] | None = None,
        shortcut: str = "downsample",
        classifier: str = "fc",
        stem_names: tuple[str, str] = ("conv1", "bn1"),
        stem_activation: Callable[[Tensor], Tensor] | None = F.relu,
        activation_first: bool = False,
        pool: str | None = None,
        norm: str | None = None,
        norm_last: bool = False,
        norm_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_sizes("ResNet", stages=len(depths), width=width, num_classes=num_classes, in_chans=in_chans)
        if stem not in STEMS:
            raise ValueError(f"ResNet: stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if pool not in (None, *POOLS.values()):
            raise ValueError(f"ResNet: pool must be one of {', '.join(POOLS.values())} or None, got {pool!r}")
        self.in_chans, self.stem, self.pool = in_chans, stem, pool or POOLS[stem]
        self.stem_names, self.stem_activation, self.activation_first = stem_names, stem_activation, activation_first
        self.classifier_name, self.norm_name = classifier, norm
        window = {"stride": 1, "padding": 1} if stem == "cifar" else {"stride": 2, "padding": 3}
        opening = (first or conv)(in_chans, width, 3 if stem == "cifar" else 7, bias=False, **window)
        self.add_module(stem_names[0], opening)
        self.add_module(stem_names[1], nn.BatchNorm2d(width))
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        widths = [width * 2**i for i in range(len(depths))] if widths is None else widths
        if len(widths) != len(depths) or min(widths) < 1:
            raise ValueError(f"ResNet: widths must be {len(depths)} sizes of at least 1, got {widths}")
        channels = width
        for i, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            blocks: list[Any] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, widths[i], stride, conv=conv, shortcut=shortcut))
                channels = widths[i] * blocks[-1].expansion
            self.add_module(name, nn.Sequential(*blocks))
        closing = [(classifier, linear(channels, num_classes))]
        if norm is not None:
            closing.insert(int(norm_last), (norm, nn.BatchNorm1d(channels)))
        for name, layer in closing:
            self.add_module(name, layer)
        self.apply(init_convolution)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, norm_weight)

    def forward(self, input: Tensor) -> Tensor:
        check_images("ResNet", input, self.in_chans)
        x = self._stem(input)
        for name in self.stages:
            x = getattr(self, name)(x)
        x = self._pooled(x)
        x = x if self.norm_name is None else getattr(self, self.norm_name)(x)
        return getattr(self, self.classifier_name)(x)

    def norm_pairs(self) -> Iterator[tuple[str, str, bool]]:
        """The stem's, as :meth:`BasicBlock.norm_pairs`; its ReLU, if any, stays."""
        if not self.activation_first:
            yield *self.stem_names, False

    def _stem(self, input: Tensor) -> Tensor:
        conv, norm = (getattr(self, name) for name in self.stem_names)
        activation = self.stem_activation or _same
        x = conv(input)
        x = norm(activation(x)) if self.activation_first else activation(norm(x))
        return x if self.stem == "cifar" else F.max_pool2d(x, 3, stride=2, padding=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "mean":
            return x.mean((2, 3))
        height, width = x.shape[2:]
        if height // 7 != 1 or width // 7 != 1:
            raise ValueError(
                "ResNet: input must be of a size whose last map is 7 to 13 high and wide, as 224 x 224 is, got one "
                f"that makes it {height} x {width}"
            )
        return F.avg_pool2d(x, 7).flatten(1)


def resnet20(num_classes: int = 100, width: int = 16, in_chans: int = 3, **options: Any) -> ResNet:
    """For CIFAR: 3 stages of 3 blocks, 0.28 M parameters; options (``conv``, ``linear``) as for :class:`ResNet`."""
    options = {"stem": "cifar", "shortcut": "shortcut"} | options
    return ResNet(BasicBlock, (3, 3, 3), width, num_classes, in_chans, **options)


def resnet18(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """For ImageNet: 11.7 M parameters, 1.8 G multiply-adds; options (``conv``, ``linear``) as for :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, num_classes, in_chans, **options)


def resnet50(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """For ImageNet: 25.6 M parameters, 4.1 G multiply-adds; options (``conv``, ``linear``) as for :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), width, num_classes, in_chans, **options)


def resnet20_quant(
    bits: int = 4,
    schedule: FreezeSchedule | None = None,
    saved: bool = True,
    frozen_step: bool = False,
    num_classes: int = 100,
    width: int = 16,
    in_chans: int = 3,
) -> ResNet:
    """:func:`resnet20` with every convolution and the classifier quantised, 0.28 M parameters.

    Run :func:`tersor.freezing.initialize_` on a batch before the first step.

    Args:
        bits, schedule, saved, frozen_step: see :class:`tersor.freezing.LtsConv2d`.
        num_classes, width, in_chans: see :class:`ResNet`.
    """
    layers = lts_layers(bits, schedule, saved, frozen_step)
    return resnet20(num_classes, width, in_chans, **layers)


def resnet18_quant(
    bits: int = 4,
    schedule: FreezeSchedule | None = None,
    saved: bool = True,
    frozen_step: bool = False,
    num_classes: int = 1000,
    width: int = 64,
    in_chans: int = 3,
) -> ResNet:
    """:func:`resnet18` quantised like :func:`resnet20_quant`; the classifier's published name is ``linear``."""
    layers = lts_layers(bits, schedule, saved, frozen_step)
    return resnet18(num_classes, width, in_chans, classifier="linear", **layers)


def resnet50_quant(
    bits: int = 4,
    schedule: FreezeSchedule | None = None,
    saved: bool = True,
    frozen_step: bool = False,
    num_classes: int = 1000,
    width: int = 64,
    in_chans: int = 3,
) -> ResNet:
    """:func:`resnet50` quantised like :func:`resnet20_quant`; the classifier's published name is ``linear``."""
    layers = lts_layers(bits, schedule, saved, frozen_step)
    return resnet50(num_classes, width, in_chans, classifier="linear", **layers)


def resnet18_nm(n: int = 2, m: int = 4, num_classes: int = 1000, in_chans: int = 3) -> ResNet:
    """:func:`resnet18` with N:M sparse convolutions (:class:`tersor.NMConv2d`); stem and classifier stay dense.

    The state dict has the published keys of LBC (arXiv 2206.06662).
    """
    return resnet18(num_classes, 64, in_chans, conv=partial(NMConv2d, n=n, m=m), first=nn.Conv2d)


def resnet50_nm(n: int = 2, m: int = 4, num_classes: int = 1000, in_chans: int = 3) -> ResNet:
    """:func:`resnet50` sparse like :func:`resnet18_nm`: 23.4 M of its 25.6 M parameters are in N:M layers."""
    return resnet50(num_classes, 64, in_chans, conv=partial(NMConv2d, n=n, m=m), first=nn.Conv2d)
