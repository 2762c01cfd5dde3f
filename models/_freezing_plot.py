"""The pictures of ``train_freezing``. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tersor.models._freezing_train import Progress

COLORS = {"full": "#666666", "qat": "#1f77b4", "element": "#ff7f0e", "tile": "#2ca02c", "channel": "#9467bd"}
TITLES = {
    "full": "full precision",
    "qat": "quantised, nothing freezes",
    "element": "LTS, single weights",
    "tile": "LTS, tiles",
    "channel": "LTS, channels",
}

Groups = Mapping[tuple[str, int], Sequence[Progress]]


def draw(folder: Path, groups: Groups) -> list[Path]:
    """``accuracy.png`` and ``freezing.png`` in the folder."""
    return [_accuracy(folder / "accuracy.png", groups), _over_time(folder / "freezing.png", groups)]


def _accuracy(path: Path, groups: Groups) -> Path:
    """A bar per method with a dot per seed."""
    bits = sorted({b for _, b in groups}, reverse=True)
    figure, axes = plt.subplots(
        1, len(bits), figsize=(4 * len(bits), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, each in zip(axes[0], bits, strict=True):
        methods = [m for m, b in groups if b == each]
        for place, method in enumerate(methods):
            values = [run.accuracy for run in groups[method, each]]
            axis.bar(place, statistics.fmean(values), color=COLORS[method], alpha=0.6)
            axis.plot([place] * len(values), values, "o", color=COLORS[method], markeredgecolor="white")
        axis.set_xticks(range(len(methods)), [TITLES[m].replace(", ", ",\n") for m in methods], fontsize=7)
        axis.set_title("32-bit" if each == 32 else f"{each}-bit")
    every = [run.accuracy for runs in groups.values() for run in runs]
    axes[0][0].set_ylim(min(every) - 3, max(every) + 2)
    axes[0][0].set_ylabel("test patches told right (%)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _over_time(path: Path, groups: Groups) -> Path:
    """What is frozen, and how long the backward pass takes, epoch after epoch."""
    bits = sorted({b for _, b in groups if b != 32}, reverse=True)
    figure, axes = plt.subplots(2, len(bits), figsize=(4.5 * len(bits), 5.4), squeeze=False, layout="constrained")
    for column, each in enumerate(bits):
        for (method, own), runs in groups.items():
            if own == each:
                label = {"color": COLORS[method], "label": TITLES[method]}
                axes[0][column].plot([100 * v for v in _mean(runs, "frozen")], **label)
                axes[1][column].plot(_mean(runs, "backward"), **label)
        axes[0][column].set_title(f"{each}-bit")
        axes[1][column].set_ylim(0)
        axes[1][column].set_xlabel("epoch")
    axes[0][0].set_ylabel("weights frozen (%)")
    axes[1][0].set_ylabel("backward passes of an epoch (s)")
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _mean(runs: Sequence[Any], name: str) -> list[float]:
    """Of the seeds, epoch by epoch: the median, which a busy moment of the machine does not move."""
    return [statistics.median(values) for values in zip(*(getattr(run, name) for run in runs), strict=True)]
