"""Windows of ten photographs, large and small, on grey: which photograph is it from?

A large window is told by few coarse tokens, a small one needs fine ones, and these only where it is. The photographs
are cut into cells (see :mod:`tersor.models._textures`): three fifths of them train, a fifth each validates and tests,
and no window crosses a cell's border. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tersor.models._textures import NAMES, cut, evened, pictures, turned

SIDE, PATCH = 96, 16  # pixels of an image, and of a patch of the networks
CELL = 64  # pixels of a cell, and of the largest window
SMALLEST = 24  # pixels of the smallest window
PARTS = ("train", "validation", "test")


@functools.lru_cache(maxsize=1)
def corners() -> dict[str, list[tuple[tuple[int, int], ...]]]:
    """Of every part: the cells' top left corners, by photograph."""
    found: dict[str, list[tuple[tuple[int, int], ...]]] = {part: [] for part in PARTS}
    for picture in pictures(CELL):
        held = tuple(at for at in picture.train if (at[0] // CELL + 2 * at[1] // CELL) % 5 == 1)
        found["train"].append(tuple(at for at in picture.train if at not in held))
        found["validation"].append(held)
        found["test"].append(picture.test)
    return found


def draw(count: int, generator: torch.Generator, part: str = "train") -> tuple[Tensor, Tensor]:
    """Images ``(count, 1, SIDE, SIDE)``, 0 outside of the window, and int64 labels; ``part`` is one of ``PARTS``."""
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    sides = torch.randint(SMALLEST, CELL + 1, (count,), generator=generator)
    images = torch.zeros(count, 1, SIDE, SIDE)
    for image, label, side in zip(images, labels.tolist(), sides.tolist(), strict=True):
        window = cut(pictures(CELL)[label].values, corners()[part][label], CELL, side, generator)
        top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
        image[0, top : top + side, left : left + side] = evened(turned(window, generator))
    return images, labels


@functools.lru_cache(maxsize=2)
def fixed_set(part: str, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`draw` returns them; always the same."""
    return draw(count, torch.Generator().manual_seed(2203_03821), part)
