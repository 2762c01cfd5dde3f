"""What a mask of frozen weights lets a weight gradient leave out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tersor import _backends
from tersor.freezing.mask import check_mask, unpack_mask

LEVELS = ("dense", "tiles", "rows", "columns", "layer")
# Time against the dense gradient's, (fixed, per share of the weight that is computed), by the weight's dimensions:
# measured on 2026-11-21 on two cores of a Xeon with AVX-512, shapes as in bench/freezing.
COST = {
    2: {"tiles": (0.13, 1.13), "rows": (0.03, 1.4), "columns": (0.2, 0.9)},
    4: {"tiles": (0.12, 1.0), "rows": (0.09, 1.0), "columns": (0.09, 1.0)},
}


class FreezePlan(NamedTuple):
    """Which parts of a weight gradient are computed; made by :func:`freeze_plan`.

    Attributes:
        level: ``"dense"`` all, ``"tiles"`` those listed, ``"rows"`` or ``"columns"`` the output or input channels
            listed, ``"layer"`` nothing: the whole layer is frozen, and no input is kept for it.
        listed: int64 ``(count,)`` channels, or int32 ``(count, 2)`` tiles by row and column; None for the others.
        tile: output channels and input channels of a tile.
        work: share of the weight gradient that is computed.
        shape: output and input channels of the weight that it was made for; None for any.
    """

    level: str
    listed: Tensor | None
    tile: tuple[int, int]
    work: float
    shape: tuple[int, int] | None = None


DENSE = FreezePlan("dense", None, (1, 1), 1.0)


def freeze_plan(
    frozen: Tensor,
    shape: Sequence[int],
    tile: tuple[int, int] = (64, 64),
    *,
    groups: int = 1,
    level: str | None = None,
) -> FreezePlan:
    """Finds what may be skipped, and the level of skipping that is fastest.

    Since frozen weights stay frozen, a plan stays right when more of them freeze, and only computes more than needed:
    make a new one every so many steps. Reading the mask waits for the device.

    Args:
        frozen: packed mask of the weight, see :func:`pack_mask`.
        shape: of the weight, ``(O, I)`` or ``(O, I / groups, KH, KW)``.
        tile: output channels and input channels of a tile.
        groups: of the convolution; with more than one only ``"dense"`` and ``"layer"`` apply.
        level: forces that level instead of choosing, unless all is frozen.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "freeze_plan"
    check_mask(name, frozen, shape)
    if len(shape) not in (2, 4) or math.prod(shape) == 0:
        raise ValueError(f"{name}: shape must be (O, I) or (O, I, KH, KW) without a zero, got {tuple(shape)}")
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"{name}: tile must be two sizes of at least 1, got {tile}")
    if level is not None and (level not in LEVELS or (groups > 1 and level not in ("dense", "layer"))):
        raise ValueError(f"{name}: level must be one of {', '.join(LEVELS)} that groups={groups} allows, got {level!r}")
    free = ~unpack_mask(frozen, shape).reshape(shape[0], shape[1], -1).all(2)  # by output and input channel
    plans = {p.level: p for p in _plans(free, tile if groups == 1 else None)}
    if level == "layer" and "layer" not in plans:
        raise ValueError(f"{name}: level 'layer' needs a mask with all elements frozen")
    if level is None:
        operator = "frozen_linear_backward" if len(shape) == 2 else "frozen_conv2d_backward"
        if _backends.running(operator, frozen.device.type) == "reference":
            plans.pop("tiles", None)  # which computes the dense product and masks it
        level = min(plans, key=lambda each: _cost(plans[each], len(shape)))
    plan = plans[level] if level in plans else plans["layer"]  # of rows, columns and tiles none is left
    return plan._replace(shape=(shape[0], shape[1]))


def _plans(free: Tensor, tile: tuple[int, int] | None) -> list[FreezePlan]:
    plans = [DENSE]
    if not free.any():
        return [FreezePlan("layer", None, (1, 1), 0.0), *plans]
    if tile is None:
        return plans
    for level, channels in (("rows", free.any(1)), ("columns", free.any(0))):
        index = channels.nonzero().flatten()
        plans.append(FreezePlan(level, index, (1, 1), len(index) / len(channels)))
    tile = min(tile[0], free.shape[0]), min(tile[1], free.shape[1])
    padded = torch.nn.functional.pad(free, (0, -free.shape[1] % tile[1], 0, -free.shape[0] % tile[0]))
    tiles = padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).any(3).any(1)
    index = tiles.nonzero().to(torch.int32)
    rows = (free.shape[0] - index[:, 0] * tile[0]).clamp(max=tile[0])
    columns = (free.shape[1] - index[:, 1] * tile[1]).clamp(max=tile[1])
    plans.append(FreezePlan("tiles", index, tile, (rows * columns).sum().item() / free.numel()))
    return plans


def _cost(plan: FreezePlan, dimensions: int) -> float:
    """Expected time against the dense gradient's."""
    fixed, slope = COST[dimensions].get(plan.level, (0.0, 1.0))
    return fixed + slope * plan.work
