"""The picture of :mod:`tersor.models.train_digits`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from tersor.models._digits import Progress

matplotlib.use("Agg")  # draws to a file; needs no screen
import matplotlib.pyplot as plt

COLOURS = {"tersor": "#0f7b6c", "eager": "#c96f2e"}
SAMPLES = 18
INK, PALE = "#22303c", "#d9dee3"
Sample = tuple[Tensor, int, int]  # 8 x 8 image, label, prediction


def draw(path: Path, progress: dict[str, Progress], kernels: dict[str, Any], samples: list[Sample]) -> None:
    """Writes the PNG: learning curves of both runs, bars of the kernel comparison, digits with predictions.

    Args:
        path: the file.
        progress: of each way's run.
        kernels: what :func:`tersor.models._digits_measure.measure_kernels` returned.
        samples: the digits to show, see :func:`choose_samples`.
    """
    style: Any = {
        "font.size": 10,
        "axes.edgecolor": PALE,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
    }
    style |= {"ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12.5, 8.2), facecolor="white")
        grid = figure.add_gridspec(
            2, 3, height_ratios=(1.25, 1), hspace=0.5, wspace=0.3, left=0.06, right=0.975, top=0.845, bottom=0.03
        )
        _title(figure, progress)
        _accuracy(figure.add_subplot(grid[0, 0]), progress)
        _loss(figure.add_subplot(grid[0, 1]), progress)
        _bars(figure.add_subplot(grid[0, 2]), kernels)
        _digits(figure, grid[1, :], samples)
        unfinished = path.with_name("unfinished_" + path.name)
        figure.savefig(unfinished, dpi=130)
        plt.close(figure)
    unfinished.replace(path)


def _title(figure: Any, progress: dict[str, Progress]) -> None:
    ours, theirs = progress["tersor"], progress["eager"]
    figure.text(0.06, 0.945, "DilateFormer reads handwritten digits", fontsize=19, weight="bold")
    figure.text(
        0.06,
        0.905,
        f"{ours.accuracy[-1]:.1%} of 450 test digits right after {ours.epoch} epochs; a training step takes "
        f"{1e3 * ours.median_step:.0f} ms with tersor, {1e3 * theirs.median_step:.0f} ms with the eager attention",
        fontsize=11.5,
        color="#5b6875",
    )


def _accuracy(axes: Any, progress: dict[str, Progress]) -> None:
    _curves(axes, {name: [100 * a for a in run.accuracy] for name, run in progress.items()})
    axes.set_ylim(min(90, 100 * min(run.accuracy[min(2, run.epoch - 1)] for run in progress.values())), 100.4)
    _label(axes, "Test accuracy (%)")
    axes.legend(frameon=False, loc="lower right")


def _loss(axes: Any, progress: dict[str, Progress]) -> None:
    _curves(axes, {name: run.test_loss for name, run in progress.items()})
    axes.set_yscale("log")
    _label(axes, "Test loss (cross entropy)")


def _curves(axes: Any, curves: dict[str, list[float]]) -> None:
    """The eager run as a wide pale line below: where the two agree, both stay visible."""
    for name in ("eager", "tersor"):
        wide = name == "eager"
        epochs = range(1, len(curves[name]) + 1)
        axes.plot(
            epochs,
            curves[name],
            color=COLOURS[name],
            linewidth=6 if wide else 1.8,
            alpha=0.35 if wide else 1,
            solid_capstyle="round",
            marker=None if wide else "o",
            markersize=3.5,
            label=name,
        )
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=PALE, linewidth=0.7)


def _bars(axes: Any, kernels: dict[str, Any]) -> None:
    kinds = ("forward", "forward + backward")
    for row, kind in enumerate(kinds):
        for offset, name in ((-0.2, "tersor"), (0.2, "eager")):
            milliseconds = 1e3 * kernels[name][kind]
            axes.barh(row + offset, milliseconds, 0.36, color=COLOURS[name])
            ratio = kernels["eager"][kind] / kernels[name][kind]
            note = f"  {milliseconds:.3g} ms" + (f", {ratio:.3g}x faster" if name == "tersor" and ratio > 1 else "")
            axes.text(milliseconds, row + offset, note, va="center", fontsize=9.5)
    axes.set_yticks(range(len(kinds)), [kind.replace(" + ", "\n+ ") for kind in kinds])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * 1e3 * max(kernels[name][kind] for name in kernels for kind in kinds))
    axes.set_xlabel("milliseconds, batch 4, 56 x 56, 3 heads of 24")
    _label(axes, "Dilated attention alone")


def _digits(figure: Any, place: Any, samples: list[Sample]) -> None:
    top = place.get_position(figure).y1
    figure.text(0.06, top + 0.04, "Test digits and what the model reads", fontsize=12, weight="bold")
    cells = place.subgridspec(2, SAMPLES // 2, hspace=0.36, wspace=0.1)
    for cell, (image, label, prediction) in zip(cells, samples, strict=False):
        axes = figure.add_subplot(cell)
        axes.imshow(image.numpy(), cmap="Greys", interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        right = label == prediction
        for spine in axes.spines.values():
            spine.set(visible=True, color=COLOURS["tersor"] if right else "#b3261e", linewidth=1 if right else 2.5)
        axes.set_title(
            f"read as {prediction}" + ("" if right else f", is {label}"),
            fontsize=9.5,
            color=INK if right else "#b3261e",
            weight="normal" if right else "bold",
            pad=4,
        )


def _label(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, weight="bold", pad=10)


def choose_samples(images: Tensor, labels: Tensor, predictions: Tensor) -> list[Sample]:
    """What to show: the misread digits first (up to a third of the places), then the first ones of every class."""
    wrong = (labels != predictions).nonzero().flatten().tolist()[: SAMPLES // 3]
    first = [int(torch.nonzero(labels == digit)[0]) for digit in range(10)]
    rest = [i for i in [*first, *range(len(labels))] if i not in wrong]
    chosen = [*wrong, *dict.fromkeys(rest)][:SAMPLES]
    return [(images[i].view(8, 8).cpu(), int(labels[i]), int(predictions[i])) for i in chosen]
