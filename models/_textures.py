"""Patches of ten photographs as a classification task: which photograph is it from?

Every photograph comes with scikit-image or scikit-learn, inside their wheels: nothing is downloaded. It is cut into
cells; a fifth of the cells is for testing only, and no patch crosses a cell's border. Brightness and contrast are
evened out, so that the texture decides. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import functools

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


@functools.lru_cache(maxsize=1)
def pictures() -> tuple[Picture, ...]:
    """In the order of ``NAMES``; always the same."""
    found = []
    for name in NAMES:
        values = load_sample_images().images[0] if name == "china" else getattr(skimage.data, name)()
        if values.ndim == 3:
            values = skimage.color.rgb2gray(values) * PEAK
        grey = torch.from_numpy(np.ascontiguousarray(values)).float()
        cells = [(row, column) for row in range(grey.shape[0] // CELL) for column in range(grey.shape[1] // CELL)]
        test = [cell for cell in cells if (cell[0] + 2 * cell[1]) % 5 == 0]
        train = [cell for cell in cells if cell not in test]
        corners = [tuple((row * CELL, column * CELL) for row, column in part) for part in (train, test)]
        found.append(Picture(grey, *corners))
    return tuple(found)


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training patches, turned and mirrored at random, and the numbers of their photographs.

    Returns:
        float32 ``(count, FOLD**2, PATCH / FOLD, PATCH / FOLD)``, and int64 ``(count,)``.
    """
    labels = torch.randint(len(NAMES), (count,), generator=generator)
    return _folded([_cut(pictures()[label], True, generator) for label in labels.tolist()]), labels


@functools.lru_cache(maxsize=2)
def test_set(per_class: int) -> tuple[Tensor, Tensor]:
    """As many test patches of each photograph, as :func:`draw` returns them; always the same."""
    generator = torch.Generator().manual_seed(2211_08544)
    labels = torch.arange(len(NAMES)).repeat_interleave(per_class)
    return _folded([_cut(pictures()[label], False, generator) for label in labels.tolist()]), labels


def _cut(picture: Picture, train: bool, generator: torch.Generator) -> Tensor:
    corners = picture.train if train else picture.test
    top, left = corners[int(torch.randint(len(corners), (), generator=generator))]
    down, right = torch.randint(CELL - PATCH + 1, (2,), generator=generator).tolist()
    patch = picture.values[top + down : top + down + PATCH, left + right : left + right + PATCH]
    if not train:
        return patch
    turns, mirrored = torch.randint(8, (), generator=generator).item() % 4, torch.rand((), generator=generator) < 0.5
    patch = patch.rot90(int(turns))
    return patch.flip(1) if mirrored else patch


def _folded(patches: list[Tensor]) -> Tensor:
    stacked = torch.stack(patches)
    stacked = stacked - stacked.mean((1, 2), keepdim=True)
    stacked = stacked / (stacked.std((1, 2), keepdim=True) + 4)  # 4: flat patches stay flat
    return F.pixel_unshuffle((stacked / 4 + 0.5).clamp(0, 1)[:, None], FOLD)
