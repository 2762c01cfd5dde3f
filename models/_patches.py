"""Patches of ten photographs, which photograph is each from, with cells to train on, to choose by and to test on.

Those of :mod:`tersor.models._textures`, from the cells of :mod:`tersor.models._tokens_data`: no patch crosses a cell's
border, so that the three parts have no pixel in common. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tersor.models._textures import FOLD, NAMES, PATCH, cut, folded, pictures, turned
from tersor.models._tokens_data import CELL, corners

CLASSES, CHANNELS = len(NAMES), FOLD**2


def draw(count: int, generator: torch.Generator, part: str = "train") -> tuple[Tensor, Tensor]:
    """Patches ``(count, CHANNELS, PATCH / FOLD, PATCH / FOLD)`` and int64 labels; to train on, turned and mirrored.

    ``part`` is ``"train"``, ``"validation"`` or ``"test"``.
    """
    labels = torch.randint(CLASSES, (count,), generator=generator)
    patches = []
    for label in labels.tolist():
        patch = cut(pictures(CELL)[label].values, corners()[part][label], CELL, PATCH, generator)
        patches.append(turned(patch, generator) if part == "train" else patch)
    return folded(patches), labels


@functools.lru_cache(maxsize=2)
def fixed_set(part: str, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`draw` returns them; always the same."""
    return draw(count, torch.Generator().manual_seed(2308_06689), part)
