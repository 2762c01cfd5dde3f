"""When weights may freeze: the threshold's growth over a training run, and in which blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tersor._checks import as_int

GROWTHS = ("fixing", "linear", "sine")
GRANULARITIES = ("element", "tile", "channel", "layer")


@dataclasses.dataclass(frozen=True)
class FreezeSchedule:
    r"""How fast weights freeze during a run of T = ``epochs * batches_per_epoch`` training steps.

    Nothing freezes in the first W = ``warmup_epochs * batches_per_epoch`` steps. In step t > W a weight freezes once
    its running distance to its level is at most ``r / (2**bits - 1)``, with r = ``rate`` for ``growth="fixing"``,
    (t - W) / (T - W) for ``"linear"`` and sin(pi/2 (t - W) / (T - W)) for ``"sine"``.

    With a ``granularity`` other than ``"element"`` (the published one) weights freeze in blocks: all of a block as soon
    as a share of at least ``quantile`` of its weights is within the threshold. A block is a ``tile`` of output channels
    times input channels (with the whole kernel of a convolution), all that feeds one output channel, or the layer.

    Args:
        batches_per_epoch: training steps (forward passes) of an epoch.
        epochs: of the whole run; for ``"fixing"`` it has no effect.
        warmup_epochs: epochs before the first weight may freeze.
        growth: ``"fixing"``, ``"linear"`` or ``"sine"``.
        rate: the constant r of ``"fixing"``.
        momentum: of the running distance, m in ``d' = (1 - m) abs(p - y) + m d``.
        granularity: ``"element"``, ``"tile"``, ``"channel"`` or ``"layer"``.
        tile: output channels and input channels of a tile.
        quantile: above 0, up to 1.

    Raises:
        TypeError, ValueError: an argument is not as stated, or with a growing rate the warm-up is not shorter than the
            run.

    Source: Zhong et al., "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training", arXiv
    2211.08544; blocks are an extension.
    """

    batches_per_epoch: int
    epochs: int
    warmup_epochs: int = 0
    growth: str = "linear"
    rate: float = 0.1
    momentum: float = 0.99
    granularity: str = "element"
    tile: tuple[int, int] = (64, 64)
    quantile: float = 0.9

    def __post_init__(self) -> None:
        name = "FreezeSchedule"
        for field, least in (("batches_per_epoch", 1), ("epochs", 1), ("warmup_epochs", 0)):
            if as_int(name, **{field: getattr(self, field)}) < least:
                raise ValueError(f"{name}: {field} must be at least {least}, got {getattr(self, field)}")
        for field, allowed in (("growth", GROWTHS), ("granularity", GRANULARITIES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{name}: {field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")
        if self.growth != "fixing" and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{name}: warmup_epochs must be less than epochs {self.epochs} for growth {self.growth!r}, "
                f"got {self.warmup_epochs}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(f"{name}: momentum must be from 0 to below 1, got {self.momentum}")
        if not (self.rate >= 0 and math.isfinite(self.rate)):
            raise ValueError(f"{name}: rate must be a finite number of at least 0, got {self.rate}")
        if not 0 < self.quantile <= 1:
            raise ValueError(f"{name}: quantile must be above 0 and at most 1, got {self.quantile}")
        if len(self.tile) != 2 or min(as_int(name, tile=size) for size in self.tile) < 1:
            raise ValueError(f"{name}: tile must be two sizes of at least 1, got {self.tile}")

    @property
    def warmup_steps(self) -> int:
        return self.warmup_epochs * self.batches_per_epoch

    @property
    def total_steps(self) -> int:
        return self.epochs * self.batches_per_epoch

    def block(self, shape: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a block in a weight seen as a matrix (output channels, all the rest)."""
        rows, columns = max(1, shape[0]), max(1, math.prod(shape[1:]))
        return {
            "element": (1, 1),
            "tile": (min(self.tile[0], rows), min(max(1, self.tile[1] * math.prod(shape[2:])), columns)),
            "channel": (1, columns),
            "layer": (rows, columns),
        }[self.granularity]
