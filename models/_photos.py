"""Photographs for super-resolution and denoising, split into regions to train on and regions to test on.

Seven colour photographs that come with scikit-image and scikit-learn, inside their wheels: nothing is downloaded. Of
each, the lowest quarter is for testing and the rest, less a margin, for training.
Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import skimage.color
import skimage.data
import skimage.metrics
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor

# Of the stereo pair "motorcycle" only the left view: the right one shows the same things once more.
FROM_SKIMAGE = ("astronaut", "chelsea", "coffee", "motorcycle", "rocket")
FROM_SKLEARN = ("china", "flower")
NAMES = FROM_SKIMAGE + FROM_SKLEARN
TEST_SHARE = 0.25  # of the rows
MARGIN = 16  # rows between the regions, in neither: no pixel near the cut is seen from both sides
PEAK = 255


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a photograph in both resolutions, uint8: ``low`` ``(3, H, W)``, ``high`` ``(3, scale H, scale W)``.

    At scale 1 both are the photograph itself.
    """

    name: str
    low: Tensor
    high: Tensor


@dataclasses.dataclass(frozen=True)
class Photographs:
    train: tuple[Region, ...]
    test: tuple[Region, ...]


@functools.lru_cache(maxsize=4)
def photographs(scale: int = 2) -> Photographs:
    """Both regions of every photograph; always the same.

    A region's low resolution is computed from that region alone.
    """
    train: list[Region] = []
    test: list[Region] = []
    for name, picture in originals().items():
        above, below = split_rows(picture.shape[1], scale)
        width = picture.shape[2] // scale * scale
        for rows, regions in ((above, train), (below, test)):
            high = picture[:, rows, :width].contiguous()
            regions.append(Region(name, downscale(high, scale), high))
    return Photographs(tuple(train), tuple(test))


def originals() -> dict[str, Tensor]:
    """The photographs as they are shipped, uint8 ``(3, H, W)``."""
    pictures = {name: getattr(skimage.data, name)() for name in FROM_SKIMAGE if name != "motorcycle"}
    pictures["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    samples = load_sample_images()
    pictures |= {Path(name).stem: image for name, image in zip(samples.filenames, samples.images, strict=True)}
    return {name: torch.from_numpy(np.ascontiguousarray(pictures[name].transpose(2, 0, 1))) for name in NAMES}


def split_rows(height: int, scale: int) -> tuple[slice, slice]:
    """The rows to train on and to test on, each a multiple of ``scale`` many."""
    tested = int(height * TEST_SHARE) // scale * scale
    trained = (height - tested - MARGIN) // scale * scale
    return slice(0, trained), slice(height - tested, height)


def downscale(high: Tensor, scale: int) -> Tensor:
    """Antialiased bicubic reduction of uint8 ``(..., 3, H, W)``, rounded to uint8."""
    return to_uint8(_resize(high, 1 / scale))


def upscale(low: Tensor, scale: int) -> Tensor:
    """Bicubic enlargement of uint8 ``(..., 3, H, W)``, rounded to uint8: what a network has to beat."""
    return to_uint8(_resize(low, scale))


def _resize(picture: Tensor, factor: float) -> Tensor:
    # With antialias torch's cubic is the usual one, a = -1/2, for enlarging too; without it is a = -3/4.
    batch = picture.reshape(-1, *picture.shape[-3:]).float()
    resized = F.interpolate(batch, scale_factor=factor, mode="bicubic", antialias=True)
    return resized.reshape(*picture.shape[:-2], *resized.shape[-2:])


def to_uint8(picture: Tensor) -> Tensor:
    return picture.round().clamp(0, PEAK).to(torch.uint8)


class Patches:
    """Random aligned patches of the training regions, turned and mirrored."""

    def __init__(self, regions: tuple[Region, ...], size: int, scale: int) -> None:
        self.regions, self.size, self.scale = regions, size, scale
        # A photograph is as likely as it is large, so that all its patches are as likely as any other's.
        self._share = torch.tensor([float(region.low[0].numel()) for region in regions])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Low ``(count, 3, size, size)`` and high ``(count, 3, scale size, scale size)``, float32 in 0..255."""
        chosen = torch.multinomial(self._share, count, replacement=True, generator=generator).tolist()
        places = torch.rand(count, 2, generator=generator).tolist()
        turns = torch.randint(8, (count,), generator=generator).tolist()
        pairs = [
            self._cut(self.regions[which], place, turn)
            for which, place, turn in zip(chosen, places, turns, strict=True)
        ]
        return torch.stack([low for low, _ in pairs]).float(), torch.stack([high for _, high in pairs]).float()

    def _cut(self, region: Region, place: list[float], turn: int) -> tuple[Tensor, Tensor]:
        top, left = (int(p * (extent - self.size + 1)) for p, extent in zip(place, region.low.shape[1:], strict=True))
        pair = []
        for picture, factor in ((region.low, 1), (region.high, self.scale)):
            rows, columns = (slice(factor * at, factor * (at + self.size)) for at in (top, left))
            patch = picture[:, rows, columns].rot90(turn % 4, (1, 2))
            pair.append(patch.flip(2) if turn >= 4 else patch)
        return pair[0], pair[1]


@dataclasses.dataclass(frozen=True)
class Quality:
    """PSNR in dB and SSIM of every test region, in the order of :data:`NAMES`."""

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        return statistics.fmean(self.psnr)

    @property
    def mean_ssim(self) -> float:
        return statistics.fmean(self.ssim)

    def as_dict(self) -> dict[str, Any]:
        return {
            "psnr": self.mean_psnr,
            "ssim": self.mean_ssim,
            "psnr of each": dict(zip(NAMES, self.psnr, strict=True)),
            "ssim of each": dict(zip(NAMES, self.ssim, strict=True)),
        }


def psnr_and_ssim(output: Tensor, truth: Tensor, border: int) -> tuple[float, float]:
    """PSNR in dB and SSIM of two uint8 pictures ``(3, H, W)``, as in the field's tables.

    Both on the luma Y of ITU-R BT.601 alone, with ``border`` pixels cut off each side; SSIM with a Gaussian window of
    sigma 1.5. Computed by scikit-image.
    """
    ours, theirs = (_luma(picture)[border:-border, border:-border] for picture in (output, truth))
    return _scores(ours, theirs)


def colour_psnr_and_ssim(output: Tensor, truth: Tensor) -> tuple[float, float]:
    """The same of all three channels and without a border, as in tables of denoising; SSIM is the channels' mean."""
    ours, theirs = (picture.permute(1, 2, 0).numpy() for picture in (output, truth))
    return _scores(ours, theirs, channel_axis=2)


def _scores(ours: np.ndarray, theirs: np.ndarray, channel_axis: int | None = None) -> tuple[float, float]:
    psnr = skimage.metrics.peak_signal_noise_ratio(theirs, ours, data_range=PEAK)
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = skimage.metrics.structural_similarity(theirs, ours, data_range=PEAK, channel_axis=channel_axis, **options)
    return float(psnr), float(ssim)


def _luma(picture: Tensor) -> np.ndarray:
    return skimage.color.rgb2ycbcr(picture.permute(1, 2, 0).numpy())[..., 0]
