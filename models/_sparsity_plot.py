"""The picture of ``train_sparsity``. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tersor.models._sparsity_train import Progress

COLORS = {"dense": "#666666", "srste": "#1f77b4", "lbc": "#d62728"}
TITLES = {"dense": "dense", "srste": "SR-STE", "lbc": "LBC"}

Groups = Mapping[tuple[str, str], Sequence[Progress]]


def draw(folder: Path, groups: Groups) -> list[Path]:
    """``sparsity.png`` in the folder."""
    path = folder / "sparsity.png"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    _accuracy(left, groups)
    _bytes(right, groups)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def _patterns(groups: Groups) -> list[str]:
    return list(dict.fromkeys(pattern for _, pattern in groups if pattern))


def _accuracy(axis: Axes, groups: Groups) -> None:
    """Mean and standard deviation of the seeds, with a small dot for each."""
    patterns = _patterns(groups)
    dense = statistics.fmean(run.accuracy for run in groups["dense", ""])
    axis.axhline(dense, color=COLORS["dense"], linestyle="--", label=TITLES["dense"])
    for shift, method in ((-0.1, "srste"), (0.1, "lbc")):
        values = [[run.accuracy for run in groups[method, pattern]] for pattern in patterns]
        places = [place + shift for place in range(len(patterns))]
        means = [statistics.fmean(each) for each in values]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
        style = {"color": COLORS[method], "label": TITLES[method]}
        axis.errorbar(places, means, spreads, fmt="s", capsize=4, **style)  # type: ignore[arg-type]
        for place, each in zip(places, values, strict=True):
            axis.plot([place + shift / 2] * len(each), each, ".", color=COLORS[method], alpha=0.5)
    axis.set_xticks(range(len(patterns)), patterns)
    axis.set_xlim(-0.5, len(patterns) - 0.5)
    axis.set_ylabel("test patches told right (%)")
    axis.legend(fontsize=8)


def _bytes(axis: Axes, groups: Groups) -> None:
    """Of the file in float32; LBC's and SR-STE's are as large."""
    patterns = ["", *_patterns(groups)]
    sizes = [groups["lbc" if pattern else "dense", pattern][0].bytes for pattern in patterns]
    bars = axis.bar(range(len(sizes)), [size / 1e6 for size in sizes], color=["#999999", *["#2ca02c"] * len(sizes)])
    axis.bar_label(bars, [f"{size / sizes[0]:.0%}" for size in sizes])
    axis.set_xticks(range(len(sizes)), ["dense", *(f"packed {pattern}" for pattern in patterns[1:])])
    axis.set_ylabel("model's file in float32 (MB)")
    axis.margins(y=0.12)
