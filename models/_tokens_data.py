"""Handwritten digits of many sizes among clutter, as Mnih et al. (arXiv 1406.6247) clutter theirs.

scikit-learn's digits, nothing is downloaded: each is enlarged, turned a little and placed at random on a dark canvas,
over fragments of other digits. A large one is read in a small picture, a small one is not. Needs ``tersor[demo]``.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.models._digits import digits

CLASSES = 10
SMALLEST, LARGEST = 0.28, 0.75  # side of a digit as a share of the canvas
TURN = 0.2  # radian, at most
FRAGMENTS, FRAGMENT = 6, 3  # per picture, and the side of one in the digits' own pixels
CELLS = 24  # the clutter's canvas in its own pixels: as fine as those of the digits below a third of the canvas
PARTS = ("train", "validation", "test")


@functools.lru_cache(maxsize=1)
def _parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Digits ``(N, 1, 8, 8)`` in 0..1 and labels; a sixth of those for training validates."""
    data = digits()
    images, labels = (data.train_images + 1) / 2, data.train_labels
    held = torch.arange(len(labels)) % 6 == 5  # train_test_split has shuffled them
    return {
        "train": (images[~held], labels[~held]),
        "validation": (images[held], labels[held]),
        "test": ((data.test_images + 1) / 2, data.test_labels),
    }


def draw(count: int, side: int, generator: torch.Generator, part: str = "train") -> tuple[Tensor, Tensor]:
    """Pictures ``(count, 1, side, side)`` of about zero mean and unit deviation, and what digit each shows.

    ``part`` is one of PARTS: no digit, and no fragment of one, is in two of them.
    """
    images, labels = _parts()[part]
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return _render(images[chosen], images, side, generator), labels[chosen]


@functools.lru_cache(maxsize=2)
def fixed_set(part: str, count: int, side: int) -> tuple[Tensor, Tensor]:
    """As :func:`draw` returns them, every digit as often as any other (but for one); always the same."""
    images, labels = _parts()[part]
    generator = torch.Generator().manual_seed(1406_6247)
    chosen = torch.arange(count) % len(labels)
    return _render(images[chosen], images, side, generator), labels[chosen]


def _render(digits: Tensor, sources: Tensor, side: int, generator: torch.Generator) -> Tensor:
    foreground = F.grid_sample(digits, _places(len(digits), side, generator), align_corners=False)
    clutter = F.interpolate(_clutter(len(digits), sources, generator), size=(side, side), mode="bilinear")
    return torch.maximum(foreground, clutter) * 4 - 0.7


def _places(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Sampling grids that put each digit, turned, somewhere inside of the canvas."""
    size, angle, right, down = torch.rand(4, count, generator=generator)
    size = SMALLEST + (LARGEST - SMALLEST) * size
    right, down = ((2 * place - 1) * (1 - size) for place in (right, down))  # of the centre, -1..1
    angle = TURN * (2 * angle - 1)
    cosine, sine = angle.cos() / size, angle.sin() / size
    rows = [cosine, -sine, sine * down - cosine * right, sine, cosine, -sine * right - cosine * down]
    matrix = torch.stack(rows, dim=1).view(-1, 2, 3)
    return F.affine_grid(matrix, [count, 1, side, side], align_corners=False)


def _clutter(count: int, sources: Tensor, generator: torch.Generator) -> Tensor:
    """``(count, 1, CELLS, CELLS)``: fragments of digits at random places."""
    canvas = torch.zeros(count, CELLS, CELLS)
    pixels = torch.arange(FRAGMENT)
    picture = torch.arange(count)[:, None, None]
    for _ in range(FRAGMENTS):
        source = torch.randint(len(sources), (count, 1, 1), generator=generator)
        corner = torch.randint(8 - FRAGMENT + 1, (2, count, 1), generator=generator) + pixels
        place = torch.randint(CELLS - FRAGMENT + 1, (2, count, 1), generator=generator) + pixels
        piece = sources[source, 0, corner[0][:, :, None], corner[1][:, None, :]]
        at = (picture, place[0][:, :, None], place[1][:, None, :])
        canvas[at] = torch.maximum(canvas[at], piece)
    return canvas[:, None]
