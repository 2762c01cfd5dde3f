"""The picture of :mod:`tersor.models.train_denoise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

from tersor.models._photos import NAMES, Quality, Region, colour_psnr_and_ssim
from tersor.models._sr_plot import most_detailed

matplotlib.use("Agg")  # draws to a file; needs no screen
import matplotlib.pyplot as plt

COLOURS = {"noisy": "#8a96a1", "non-local means": "#c96f2e", "Uformer": "#0f7b6c"}
INK, PALE = "#22303c", "#d9dee3"
SHOWN = ("astronaut", "motorcycle", "china")
CROP, STRIDE = 96, 4  # pixels


def draw(
    path: Path,
    summary: str,
    columns: dict[str, list[Tensor]],
    regions: tuple[Region, ...],
    qualities: dict[str, Quality],
    curves: dict[str, list[float]],
) -> None:
    """Writes the PNG: crops of the test regions in every version, PSNR of every photograph, losses over the epochs.

    Args:
        path: the file.
        summary: one line below the title.
        columns: by their title, uint8 pictures of all test regions.
        regions: the test regions.
        qualities: by key of :data:`COLOURS`.
        curves: training loss of every epoch, by label.
    """
    style: Any = {"font.size": 10, "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"font.family": "DejaVu Sans"}):
        figure = plt.figure(figsize=(10.6, 13), facecolor="white")
        grid = figure.add_gridspec(
            2, 2, height_ratios=(2.7, 1), hspace=0.13, wspace=0.2, left=0.1, right=0.97, top=0.915, bottom=0.065
        )
        figure.text(0.03, 0.968, "A small Uformer takes noise off photographs", fontsize=19, weight="bold")
        figure.text(0.03, 0.948, summary, fontsize=11, color="#5b6875")
        _crops(figure, grid[0, :], columns, regions)
        _photographs(figure.add_subplot(grid[1, 0]), qualities)
        _curves(figure.add_subplot(grid[1, 1]), curves)
        unfinished = path.with_name("unfinished_" + path.name)
        figure.savefig(unfinished, dpi=110)
        plt.close(figure)
    unfinished.replace(path)


def _crops(figure: Any, place: Any, columns: dict[str, list[Tensor]], regions: tuple[Region, ...]) -> None:
    shown = [i for i, region in enumerate(regions) if region.name in SHOWN]
    cells = place.subgridspec(len(shown), len(columns) + 1, hspace=0.1, wspace=0.04)
    for row, index in enumerate(shown):
        clean = regions[index].high
        top, left = most_detailed(clean, CROP, STRIDE)
        crops = {
            title: picture[:, top : top + CROP, left : left + CROP]
            for title, picture in {"clean": clean, **{t: pictures[index] for t, pictures in columns.items()}}.items()
        }
        for column, (title, crop) in enumerate(crops.items()):
            axes = figure.add_subplot(cells[row, column])
            axes.imshow(crop.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=11, weight="bold", pad=6)
            if column == 0:
                axes.set_ylabel(regions[index].name)
            else:
                axes.set_xlabel(f"{colour_psnr_and_ssim(crop, crops['clean'])[0]:.2f} dB", labelpad=3)


def _photographs(axes: Any, qualities: dict[str, Quality]) -> None:
    for key, quality in qualities.items():
        label = f"{key}: {quality.mean_psnr:.2f}"
        axes.plot(quality.psnr, range(len(NAMES)), "o", color=COLOURS[key], markersize=7, label=label)
    axes.set_yticks(range(len(NAMES)), NAMES)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_title("PSNR of each test region (dB) and mean", loc="left", weight="bold", pad=10)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.45, -0.09), ncols=3, handletextpad=0)


def _curves(axes: Any, curves: dict[str, list[float]]) -> None:
    for number, (label, values) in enumerate(curves.items()):
        axes.plot(
            range(1, len(values) + 1), values, color=COLOURS["Uformer"], alpha=max(0.3, 1 - 0.3 * number), label=label
        )
    axes.set_xlabel("epoch, each of other patches and noise")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_title("Charbonnier loss in training (pixels in 0..1)", loc="left", weight="bold", pad=10)
    axes.legend(frameon=False)
