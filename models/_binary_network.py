"""Stand-in for the networks of ``train_binary``, until models/binary_resnet.py is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import BinaryConv2d, BinaryStep, ReCUConv2d, ReSTEConv2d, binary_step

LAYERS: dict[str, Any] = {"float": nn.Conv2d, "ste": BinaryConv2d, "recu": ReCUConv2d, "reste": ReSTEConv2d}


class _Shortcut(nn.Module):
    def __init__(self, stride: int, more: int, pool: bool) -> None:
        super().__init__()
        self.stride, self.more, self.pool = stride, more, pool

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            x = F.avg_pool2d(x, 2) if self.pool else x[:, :, ::2, ::2]
        return F.pad(x, (0, 0, 0, 0, self.more // 2, self.more // 2)) if self.more else x


class _Unit(nn.Module):
    def __init__(self, before: int, after: int, stride: int, conv: Any, block: str) -> None:
        super().__init__()
        recu = block == "recu"
        self.conv, self.bn = conv(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after)
        self.act = nn.Hardtanh() if recu else nn.Identity()
        self.shortcut = _Shortcut(stride, after - before, recu)
        self.step = BinaryStep("conv", "bn", relu=not recu, activation="act" if recu else None)

    def binary_steps(self) -> Iterator[BinaryStep]:
        yield self.step

    def forward(self, x: Tensor) -> Tensor:
        return binary_step(self, self.step, x, self.shortcut(x))


class _Network(nn.Module):
    def __init__(self, conv: Any, block: str, width: int, classes: int, channels: int) -> None:
        super().__init__()
        self.block = block
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        units, before = [], width
        for stage in range(3):
            for number in range(6):
                after = width * 2**stage
                units.append(_Unit(before, after, 2 if stage and not number else 1, conv, block))
                before = after
        self.units, self.bn2, self.fc = nn.Sequential(*units), nn.BatchNorm1d(before), nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.hardtanh(self.bn1(x)) if self.block == "recu" else self.bn1(F.relu(x))
        return self.fc(self.bn2(self.units(x).mean((2, 3))))


def network(method: str, block: str, width: int, classes: int, channels: int) -> nn.Module:
    return _Network(LAYERS[method], block, width, classes, channels)
