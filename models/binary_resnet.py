"""ResNets with binary weights and activations: ReCU (arXiv 2103.12369) and ReSTE (arXiv 2308.06689).

They are :class:`ResNet` with other blocks; stem, shortcuts and classifier stay in full precision. The state dicts have
the published keys. ``conv`` of every factory makes the blocks' convolutions: with ``torch.nn.Conv2d`` the same network
in full precision, with ``functools.partial(BinaryConv2d, estimator="ste")`` the plain straight-through estimator.

:func:`tersor.binary.convert_` packs a trained network for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import BinaryStep, ChannelBias, ReCUConv2d, ReSTEConv2d, binary_step
from tersor.models.layers import Hardtanh, Layer, hardtanh
from tersor.models.resnet import ResNet

Reshape = Callable[[int, int, int], nn.Module]  # a shortcut's module for channels before, channels after, and stride


class PaddedShortcut(nn.Module):
    """A smaller map, with channels of zeros added, half of them in front and half behind.

    Args:
        before, after: channels; their difference is even.
        stride: of the smaller map.
        mean: over windows of ``stride`` x ``stride``, which the map must divide into; else every ``stride``-th element.
    """

    def __init__(self, before: int, after: int, stride: int, mean: bool = False) -> None:
        super().__init__()
        if after < before or (after - before) % 2:
            raise ValueError(
                "PaddedShortcut: after must be before plus an even number, so that as many channels are added in "
                f"front as behind, got {before} and {after}"
            )
        self.added, self.stride, self.mean = (after - before) // 2, stride, mean

    def forward(self, input: Tensor) -> Tensor:
        if self.mean:
            _check_divides(input, self.stride)
            x = F.avg_pool2d(input, self.stride)
        else:
            x = input[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.added, self.added))

    def extra_repr(self) -> str:
        return f"added={2 * self.added}, stride={self.stride}, mean={self.mean}"


def _check_divides(input: Tensor, stride: int) -> None:
    if input.shape[2] % stride or input.shape[3] % stride:
        raise ValueError(
            f"ResNet: input must be of a size whose maps divide by {stride} where a stage begins, got one that makes "
            f"a map of {input.shape[2]} x {input.shape[3]}"
        )


def projected(before: int, after: int, stride: int) -> nn.Sequential:
    """A 1x1 convolution in full precision and a norm."""
    return nn.Sequential(nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after))


class BinaryBlock(nn.Module):
    """Two 3x3 convolutions with norms; one shortcut around each of them, or one around both.

    In ReCU's order the step from x is hardtanh(norm(conv(x)) + shortcut), in ReSTE's norm(relu(conv(x))) + shortcut.

    Args:
        before: channels of the input.
        width: channels of the block.
        stride: of the first convolution.
        conv: called like ``torch.nn.Conv2d``.
        shortcut: name of the module on the shortcut past a change of shape; there is none without one.
        relu: ReSTE's order.
        each: a shortcut around each convolution.
        reshape: makes that module from the channels before, after, and the stride.
    """

    expansion = 1

    def __init__(
        self,
        before: int,
        width: int,
        stride: int = 1,
        conv: Layer = ReCUConv2d,
        shortcut: str = "shortcut",
        *,
        relu: bool = False,
        each: bool = True,
        reshape: Reshape = projected,
    ) -> None:
        super().__init__()
        self.conv1 = conv(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu, self.each, self.shortcut_name = relu, each, shortcut
        reshaped = stride != 1 or before != width
        self.add_module(shortcut, reshape(before, width, stride) if reshaped else nn.Identity())
        if not relu:
            self.act1, self.act2 = Hardtanh(), Hardtanh()

    def binary_steps(self) -> Iterator[BinaryStep]:
        """For :func:`tersor.binary.convert_`."""
        first, second = (None, None) if self.relu else ("act1", "act2")
        yield BinaryStep("conv1", "bn1", self.relu, first, next=None if self.each else "conv2")
        yield BinaryStep("conv2", "bn2", self.relu, second)

    def forward(self, input: Tensor) -> Tensor:
        first, second = self.binary_steps()
        shortcut = getattr(self, self.shortcut_name)(input)
        x = binary_step(self, first, input, shortcut if self.each else None)
        return binary_step(self, second, x, x if self.each else shortcut)


class ShiftedBlock(nn.Module):
    """ReActNet's block (arXiv 2003.03488): prelu(norm(conv(x + b0)) + shortcut + b1) + b2, with a shortcut from x.

    Past a change of shape the shortcut is a mean over 2x2, a 1x1 convolution and a norm.

    Args:
        before, width, stride, conv, shortcut: as for :class:`BinaryBlock`.
    """

    expansion = 1

    def __init__(
        self, before: int, width: int, stride: int = 1, conv: Layer = ReCUConv2d, shortcut: str = "downsample"
    ) -> None:
        super().__init__()
        self.move0 = ChannelBias(before)
        self.conv = conv(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.move1 = ChannelBias(width)
        self.nonlinear = nn.PReLU(width)
        self.move2 = ChannelBias(width)
        self.stride, self.shortcut_name = stride, shortcut
        reshaped = stride != 1 or before != width
        layers = [nn.AvgPool2d(stride), *projected(before, width, 1)] if reshaped else []
        self.add_module(shortcut, nn.Sequential(*layers))

    def binary_steps(self) -> Iterator[BinaryStep]:
        """For :func:`tersor.binary.convert_`."""
        yield BinaryStep("conv", "bn", activation=("move1", "nonlinear", "move2"), before="move0")

    def forward(self, input: Tensor) -> Tensor:
        (step,) = self.binary_steps()
        _check_divides(input, self.stride)
        return binary_step(self, step, input, getattr(self, self.shortcut_name)(input))


CIFAR: dict[str, Any] = {"stem": "cifar", "shortcut": "shortcut", "classifier": "linear", "norm": "bn2"}
IMAGENET: dict[str, Any] = {"stem": "imagenet", "norm": "bn2"}
RECU: dict[str, Any] = {"conv": ReCUConv2d, "first": nn.Conv2d, "stem_activation": hardtanh}
RESTE: dict[str, Any] = {"conv": ReSTEConv2d, "first": nn.Conv2d, "activation_first": True}
TWO_STAGE: dict[str, Any] = {
    "conv": ReCUConv2d,
    "first": nn.Conv2d,
    "stem_names": ("conv", "bn"),
    "stem_activation": None,
    "pool": "mean",
}
NORM_WEIGHT = 1e-8  # of ReCU's networks for ImageNet at first, spec recu.md 3

recu_block = partial(BinaryBlock, reshape=partial(PaddedShortcut, mean=True))
reste_block = partial(BinaryBlock, relu=True, each=False, reshape=PaddedShortcut)
bireal_block = partial(BinaryBlock, relu=True, reshape=PaddedShortcut)


def resnet20_recu(num_classes: int = 10, width: int = 16, in_chans: int = 3, **options: Any) -> ResNet:
    """ReCU for CIFAR: a shortcut around each convolution, 0.27 M parameters; options as for :class:`ResNet`."""
    return ResNet(recu_block, (3, 3, 3), width, num_classes, in_chans, **CIFAR | RECU | options)


def resnet18_cifar_recu(num_classes: int = 10, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReCU for CIFAR: one shortcut around two convolutions, 11.0 M parameters; options as for :class:`ResNet`."""
    options = CIFAR | RECU | {"stem_activation": None, "norm_last": True} | options
    return ResNet(partial(recu_block, each=False), (2, 2, 2, 2), width, num_classes, in_chans, **options)


def resnet18_recu(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReCU for ImageNet: 11.7 M parameters, 1.68 G binary multiply-adds; options as for :class:`ResNet`."""
    options = IMAGENET | RECU | {"norm_weight": NORM_WEIGHT} | options
    return ResNet(BinaryBlock, (2, 2, 2, 2), width, num_classes, in_chans, **options)


def resnet34_recu(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReCU for ImageNet: 21.8 M parameters, 3.53 G binary multiply-adds; options as for :class:`ResNet`."""
    options = IMAGENET | RECU | {"norm_weight": NORM_WEIGHT} | options
    return ResNet(BinaryBlock, (3, 4, 6, 3), width, num_classes, in_chans, **options)


def resnet18_recu_two_stage(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReCU in ReActNet's blocks, for ImageNet: 11.7 M parameters; options as for :class:`ResNet`."""
    return ResNet(ShiftedBlock, (4, 4, 4, 4), width, num_classes, in_chans, **TWO_STAGE | options)


def resnet34_recu_two_stage(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """As :func:`resnet18_recu_two_stage`, of 32 blocks and 21.8 M parameters."""
    return ResNet(ShiftedBlock, (6, 8, 12, 6), width, num_classes, in_chans, **TWO_STAGE | options)


def resnet20_reste(num_classes: int = 10, width: int = 16, in_chans: int = 3, **options: Any) -> ResNet:
    """ReSTE for CIFAR: one shortcut around two convolutions, 0.27 M parameters; options as for :class:`ResNet`."""
    return ResNet(reste_block, (3, 3, 3), width, num_classes, in_chans, **CIFAR | RESTE | options)


def resnet20_bireal_reste(num_classes: int = 10, width: int = 16, in_chans: int = 3, **options: Any) -> ResNet:
    """As :func:`resnet20_reste`, with a shortcut around each convolution as in Bi-Real Net (arXiv 1808.00278)."""
    return ResNet(bireal_block, (3, 3, 3), width, num_classes, in_chans, **CIFAR | RESTE | options)


def resnet18_cifar_reste(num_classes: int = 10, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReSTE for CIFAR: projected shortcuts, 11.2 M parameters; options as for :class:`ResNet`."""
    block, options = partial(BinaryBlock, relu=True, each=False), CIFAR | RESTE | {"norm_last": True} | options
    return ResNet(block, (2, 2, 2, 2), width, num_classes, in_chans, **options)


def resnet18_reste(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReSTE for ImageNet: 11.7 M parameters, 1.68 G binary multiply-adds; options as for :class:`ResNet`."""
    block = partial(BinaryBlock, relu=True)
    return ResNet(block, (2, 2, 2, 2), width, num_classes, in_chans, **IMAGENET | RESTE | options)


def resnet34_reste(num_classes: int = 1000, width: int = 64, in_chans: int = 3, **options: Any) -> ResNet:
    """ReSTE for ImageNet: 21.8 M parameters, 3.53 G binary multiply-adds; options as for :class:`ResNet`."""
    block = partial(BinaryBlock, relu=True)
    return ResNet(block, (3, 4, 6, 3), width, num_classes, in_chans, **IMAGENET | RESTE | options)
