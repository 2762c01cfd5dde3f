"""Masks of frozen weights: tiles, output channels or single elements, chosen at random, up to the whole layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TILE = 64  # output and input channels of a tile, freeze_plan's default


def _blocks(shape: Sequence[int], granularity: str) -> tuple[int, ...]:
    """How many blocks freeze as one, along the weight's leading dimensions."""
    return {
        "none": (1,),
        "tile": (-(-shape[0] // TILE), -(-shape[1] // TILE)),
        "channel": (shape[0],),
        "element": tuple(shape),
        "layer": (1,),
    }[granularity]


def percent(shape: Sequence[int], granularity: str, share: float) -> int:
    """What part of the blocks is frozen where ``share`` per cent are asked for: blocks are whole."""
    blocks = math.prod(_blocks(shape, granularity))
    return round(100 * round(blocks * share / 100) / blocks)


def frozen_mask(shape: Sequence[int], granularity: str, share: float, generator: torch.Generator) -> Tensor:
    """Bool, True where frozen: ``share`` per cent of the blocks of a weight ``(O, I, ...)``."""
    grid = _blocks(shape, granularity)
    blocks = math.prod(grid)
    mask = torch.zeros(blocks, dtype=torch.bool)
    mask[torch.randperm(blocks, generator=generator)[: round(blocks * share / 100)]] = True
    mask = mask.view(grid)
    if granularity == "tile":
        mask = mask.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: shape[0], : shape[1]]
    mask = mask.view(*mask.shape, *[1] * (len(shape) - mask.dim()))
    return mask.expand(tuple(shape)).contiguous()


def touched(granularity: str, share: float) -> float:
    """Share of the weights that has to be read and written: next to any frozen element of a line lies a free one."""
    return 1.0 if granularity == "element" else 1 - share / 100
