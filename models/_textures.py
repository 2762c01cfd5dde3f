"""Patches of ten photographs as a classification task: which photograph is it from?

Every photograph comes with scikit-image or scikit-learn, inside their wheels: nothing is downloaded. It is cut into
cells; a fifth of the cells is for testing only, and no patch crosses a cell's border. Brightness and contrast are
evened out, so that the texture decides. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import skimage.color
import skimage.data
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

NAMES = (
    "brick",
    "chelsea",
    "china",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
)
CELL, PATCH, FOLD = 48, 24, 3  # pixels of a cell and of a patch; a network sees FOLD x FOLD pixels as channels
PEAK = 255


@dataclasses.dataclass(frozen=True)
class Picture:
    """Grey values ``(H, W)``, and the top left corners of the cells to train on and to test on."""

    values: Tensor
    train: tuple[tuple[int, int], ...]
    test: tuple[tuple[int, int], ...]


@functools.lru_cache(maxsize=2)
def pictures(cell: int = CELL) -> tuple[Picture, ...]:
    """In the order of ``NAMES``, with cells of so many pixels; always the same."""
    found = []
    for name in NAMES:
        values = load_sample_images().images[0] if name == "china" else getattr(skimage.data, name)()
        if values.ndim == 3:
            values = skimage.color.rgb2gray(values) * PEAK
        grey = torch.from_numpy(np.ascontiguousarray(values)).float()
        cells = [(row, column) for row in range(grey.shape[0] // cell) for column in range(grey.shape[1] // cell)]
        test = [at for at in cells if (at[0] + 2 * at[1]) % 5 == 0]
        train = [at for at in cells if at not in test]
        corners = [tuple((row * cell, column * cell) for row, column in part) for part in (train, test)]
        found.append(Picture(grey, *corners))
    return tuple(found)


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training patches, turned and mirrored at random, and the numbers of their photographs.

    Returns:
        float32 ``(count, FOLD**2, PATCH / FOLD, PATCH / FOLD)``, and int64 ``(count,)``.
    """
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    return folded([_cut(pictures()[label], True, generator) for label in labels.tolist()]), labels


@functools.lru_cache(maxsize=2)
def test_set(per_class: int) -> tuple[Tensor, Tensor]:
    """As many test patches of each photograph, as :func:`draw` returns them; always the same."""
    generator = torch.Generator().manual_seed(2211_08544)
    labels = torch.arange(len(NAMES)).repeat_interleave(per_class)
    return folded([_cut(pictures()[label], False, generator) for label in labels.tolist()]), labels


def _cut(picture: Picture, train: bool, generator: torch.Generator) -> Tensor:
    patch = cut(picture.values, picture.train if train else picture.test, CELL, PATCH, generator)
    return turned(patch, generator) if train else patch


def cut(values: Tensor, corners: Sequence[tuple[int, int]], cell: int, side: int, generator: torch.Generator) -> Tensor:
    """``(side, side)`` pixels at random from one of the cells with these corners."""
    top, left = corners[int(torch.randint(len(corners), (), generator=generator))]
    down, right = torch.randint(cell - side + 1, (2,), generator=generator).tolist()
    return values[top + down : top + down + side, left + right : left + right + side]


def turned(patch: Tensor, generator: torch.Generator) -> Tensor:
    """By a random number of right angles, and mirrored or not."""
    turns, mirrored = torch.randint(8, (), generator=generator).item() % 4, torch.rand((), generator=generator) < 0.5
    patch = patch.rot90(int(turns))
    return patch.flip(1) if mirrored else patch


def evened(patches: Tensor) -> Tensor:
    """Zero mean and unit deviation of each ``(..., H, W)``."""
    centred = patches - patches.mean((-2, -1), keepdim=True)
    return centred / (centred.std((-2, -1), keepdim=True) + 4)  # 4: flat patches stay flat


def folded(patches: list[Tensor]) -> Tensor:
    """Patches ``(H, W)`` as a network's input ``(N, FOLD**2, H / FOLD, W / FOLD)``, evened and from 0 to 1."""
    return F.pixel_unshuffle((evened(torch.stack(patches)) / 4 + 0.5).clamp(0, 1)[:, None], FOLD)
