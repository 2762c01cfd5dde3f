"""How good denoisers are on the test regions, non-local means with its best strength, and the eager way's steps."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import skimage.restoration
import torch
from torch import Tensor

from tersor.models._denoise_train import SIGMA, UNTIMED, Config, Run, with_noise
from tersor.models._photos import PEAK, Quality, colour_psnr_and_ssim, photographs, to_uint8
from tersor.models.eager_uformer import EagerLeWinBlock
from tersor.models.uformer import LeWinBlock, Uformer, pad_and_run

NOISE_SEED = 2106_03106  # of the noise to judge denoisers by, the same for all of them
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)  # of non-local means: h in standard deviations of the noise
TUNED_SIDE = 256  # pixels, in the middle of every training region
COMPARED = 25  # steps
WAYS = {"tersor": LeWinBlock, "eager": EagerLeWinBlock}


@functools.lru_cache(maxsize=1)
def noisy_regions() -> tuple[Tensor, ...]:
    """The test regions ``(3, H, W)`` with noise, pixels in 0..1 before the noise; always the same."""
    return _noisy([region.high for region in photographs(1).test])


def _noisy(pictures: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(NOISE_SEED)
    return tuple(with_noise(picture / PEAK, generator) for picture in pictures)


def quality(outputs: list[Tensor]) -> Quality:
    """Of the test regions' uint8 pictures."""
    pairs = zip(outputs, photographs(1).test, strict=True)
    psnr, ssim = zip(*(colour_psnr_and_ssim(output, region.high) for output, region in pairs), strict=True)
    return Quality(psnr, ssim)


@torch.no_grad()
def denoise(model: Uformer) -> list[Tensor]:
    """The model's uint8 picture of every test region, each padded to whole windows and run in one piece."""
    model.eval()
    return [_picture(pad_and_run(model, noisy[None])[0]) for noisy in noisy_regions()]


def unprocessed() -> list[Tensor]:
    """The noisy test regions as pictures, which clips them."""
    return [_picture(noisy) for noisy in noisy_regions()]


def denoise_by_means(strength: float) -> list[Tensor]:
    """Non-local means' picture of every test region."""
    return [_non_local_means(noisy, strength) for noisy in noisy_regions()]


@functools.lru_cache(maxsize=1)
def tune_means() -> dict[float, float]:
    """PSNR of non-local means by its strength, on the middle of the training regions."""
    clean = [_middle(region.high) for region in photographs(1).train]
    noisy = _noisy(clean)
    return {
        strength: statistics.fmean(
            colour_psnr_and_ssim(_non_local_means(each, strength), truth)[0]
            for each, truth in zip(noisy, clean, strict=True)
        )
        for strength in STRENGTHS
    }


def _middle(picture: Tensor) -> Tensor:
    top, left = (max(0, (size - TUNED_SIDE) // 2) for size in picture.shape[1:])
    return picture[:, top : top + TUNED_SIDE, left : left + TUNED_SIDE]


def _non_local_means(noisy: Tensor, strength: float) -> Tensor:
    sizes: dict[str, Any] = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}
    output = skimage.restoration.denoise_nl_means(
        noisy.permute(1, 2, 0).numpy(), h=strength * SIGMA, sigma=SIGMA, channel_axis=2, **sizes
    )
    return _picture(torch.from_numpy(output).permute(2, 0, 1))


def _picture(output: Tensor) -> Tensor:
    return to_uint8(output * PEAK).contiguous()


def compare(config: Config) -> dict[str, Any]:
    """The first steps of a run, by tersor's blocks and by the published way in turn, on the same patches.

    Returns:
        ``steps``; by way the ``median step seconds`` and the ``loss`` of every step; ``first loss difference`` and
        ``largest loss difference``, relative.
    """
    torch.set_num_threads(config.threads)
    runs = {way: Run(config, block).epoch(0) for way, block in WAYS.items()}
    steps = min(COMPARED, config.iterations)
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(steps):  # in turn: a disturbance of the machine meets both
        for way, run in runs.items():
            taken[way] += itertools.islice(run, 1)
    untimed = min(UNTIMED, steps - 1)
    seconds = {way: statistics.median(time for time, _ in pairs[untimed:]) for way, pairs in taken.items()}
    losses = {way: [loss for _, loss in pairs] for way, pairs in taken.items()}
    differences = [abs(a - b) / b for a, b in zip(*losses.values(), strict=True)]
    return {
        "steps": steps,
        "median step seconds": seconds,
        "loss": losses,
        "first loss difference": differences[0],
        "largest loss difference": max(differences),
    }
