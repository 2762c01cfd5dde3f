"""The picture of :mod:`tersor.models.train_sr`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from tersor.models._photos import Region

matplotlib.use("Agg")  # draws to a file; needs no screen
import matplotlib.pyplot as plt

COLOURS = {"bicubic": "#8a96a1", "full": "#22303c", "ddtb": "#0f7b6c", "symmetric": "#c96f2e"}
INK, PALE = "#22303c", "#d9dee3"
SHOWN = ("motorcycle", "coffee", "astronaut")
CROP, STRIDE = 64, 8  # pixels of the high resolution


def draw(
    path: Path,
    summary: str,
    columns: dict[str, list[Tensor]],
    regions: tuple[Region, ...],
    dots: list[tuple[str, str, list[float]]],
    curves: list[tuple[str, str, list[float]]],
) -> None:
    """Writes the PNG: crops of the test regions in every version, PSNR of every run, losses over the epochs.

    Args:
        path: the file.
        summary: one line below the title.
        columns: by their title, uint8 pictures of all test regions.
        regions: the test regions.
        dots: label, key of :data:`COLOURS` and PSNR of each seed, for every method.
        curves: label, key of :data:`COLOURS` and L1 loss of every epoch.
    """
    style: Any = {"font.size": 10, "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"font.family": "DejaVu Sans"}):
        count = len(columns) + 2
        figure = plt.figure(figsize=(1.72 * count + 0.5, 10.2), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, height_ratios=(1.75, 1), hspace=0.2, wspace=0.25, left=0.1, right=0.985, top=0.885, bottom=0.06
        )
        figure.text(0.025, 0.955, "Twice the resolution in few bits", fontsize=19, weight="bold")
        figure.text(0.025, 0.928, summary, fontsize=11.5, color="#5b6875")
        _crops(figure, grid[0, :], columns, regions)
        _dots(figure.add_subplot(grid[1, 0]), dots)
        _curves(figure.add_subplot(grid[1, 1]), curves)
        unfinished = path.with_name("unfinished_" + path.name)
        figure.savefig(unfinished, dpi=110)
        plt.close(figure)
    unfinished.replace(path)


def _crops(figure: Any, place: Any, columns: dict[str, list[Tensor]], regions: tuple[Region, ...]) -> None:
    shown = [i for i, region in enumerate(regions) if region.name in SHOWN]
    cells = place.subgridspec(len(shown), len(columns) + 2, hspace=0.04, wspace=0.04)
    for row, index in enumerate(shown):
        region = regions[index]
        scale = region.high.shape[1] // region.low.shape[1]
        top, left = most_detailed(region.high, CROP, STRIDE)
        small = region.low[:, top // scale : (top + CROP) // scale, left // scale : (left + CROP) // scale]
        crops = {"low resolution": small}
        for title, pictures in (columns | {"original": [r.high for r in regions]}).items():
            crops[title] = pictures[index][:, top : top + CROP, left : left + CROP]
        for column, (title, crop) in enumerate(crops.items()):
            axes = figure.add_subplot(cells[row, column])
            axes.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=10, weight="bold", pad=6)
            if column == 0:
                axes.set_ylabel(region.name)


def most_detailed(picture: Tensor, size: int, stride: int) -> tuple[int, int]:
    """Top and left of the window of ``(3, H, W)`` where neighbours differ most: where there is something to see."""
    gray = picture.float().mean(0)
    size = min(size, *gray.shape)
    change = gray.diff(dim=0)[:, 1:].abs() + gray.diff(dim=1)[1:].abs()
    windows = change.unfold(0, size - 1, stride).unfold(1, size - 1, stride)
    best = int(torch.argmax(windows.mean((2, 3))))
    return best // windows.shape[1] * stride, best % windows.shape[1] * stride


def _dots(axes: Any, dots: list[tuple[str, str, list[float]]]) -> None:
    for row, (_, key, values) in enumerate(dots):
        mean = sum(values) / len(values)
        axes.plot(values, [row] * len(values), "o", color=COLOURS[key], markersize=7, alpha=0.55)
        axes.plot([mean, mean], [row - 0.3, row + 0.3], color=COLOURS[key], linewidth=2.5)
        axes.annotate(f"{mean:.2f}", (max(values), row), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(dots)), [label for label, _, _ in dots])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.set_title("PSNR on the test regions (dB): seeds and their mean", loc="left", weight="bold", pad=10)


def _curves(axes: Any, curves: list[tuple[str, str, list[float]]]) -> None:
    for label, key, values in curves:
        style = "--" if "4-bit" in label else "-"
        axes.plot(range(1, len(values) + 1), values, style, color=COLOURS[key], linewidth=1.8, label=label)
    axes.set_xlabel("epoch, each of other patches; the first one of a student only records")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_title("L1 loss in training (of 255), first seed", loc="left", weight="bold", pad=10)
    axes.legend(frameon=False)
