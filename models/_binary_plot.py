"""The picture of ``train_binary``. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tersor.models._binary_measure import BATCHES, Speeds
from tersor.models._binary_train import METHODS, Progress

TITLES = {"float": "float32", "ste": "STE", "recu": "ReCU", "reste": "ReSTE"}
COLORS = {"float": "#666666", "ste": "#ff7f0e", "recu": "#1f77b4", "reste": "#d62728"}
TRAINED, OTHER, PACKED = "#aec7e8", "#ffbb78", "#2ca02c"

Groups = Mapping[str, Sequence[Progress]]  # of every method, a run for each seed


def draw(folder: Path, groups: Groups, speeds: Speeds) -> list[Path]:
    """``binary.png`` in the folder."""
    path = folder / "binary.png"
    figure, (left, middle, *right) = plt.subplots(1, 2 + len(BATCHES), figsize=(13, 3.6), layout="constrained")
    _accuracy(left, groups)
    _bytes(middle, groups)
    for axis, size in zip(right, BATCHES, strict=True):
        _speed(axis, speeds, size)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _accuracy(axis: Axes, groups: Groups) -> None:
    """Mean and standard deviation of the seeds, with a small dot for each."""
    for place, (method, runs) in enumerate(groups.items()):
        found = [run.accuracy for run in runs]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        axis.errorbar(place, statistics.fmean(found), spread, fmt="s", capsize=4, color=COLORS[method])
        axis.plot([place + 0.2] * len(found), found, ".", color=COLORS[method], alpha=0.5)
    _name(axis)
    axis.set_ylabel("patches told right (%)")


def _bytes(axis: Axes, groups: Groups) -> None:
    sizes = [runs[0].bytes for runs in groups.values()]
    colors = [TRAINED if method == "float" else PACKED for method in groups]
    bars = axis.bar(range(len(sizes)), [size / 1e6 for size in sizes], color=colors)
    axis.bar_label(bars, [f"{size / sizes[0]:.1%}" for size in sizes], fontsize=8)
    _name(axis)
    axis.set_ylabel("model's file (MB)")
    axis.margins(y=0.12)


def _speed(axis: Axes, speeds: Speeds, size: int) -> None:
    """Two bars for each: as trained, and in float32 the other memory format, of a binary network the packed one."""
    for shift, ending, color, label in (
        (-0.2, "", TRAINED, "as trained"),
        (0.2, " channels-last", OTHER, "channels-last"),
        (0.2, " packed", PACKED, "packed"),
    ):
        places = [place for place, method in enumerate(METHODS) if method + ending in speeds]
        heights = [speeds[METHODS[place] + ending][size] for place in places]
        axis.bar([place + shift for place in places], heights, 0.4, color=color, label=label)
    _name(axis)
    axis.set_ylabel(f"patches a second, batch {size}")
    axis.margins(y=0.3)  # room for the legend
    axis.legend(fontsize=8, loc="upper left")


def _name(axis: Axes) -> None:
    axis.set_xticks(range(len(METHODS)), [TITLES[method] for method in METHODS])
    axis.set_xlim(-0.6, len(METHODS) - 0.4)
