"""The picture of ``train_compact_scores``. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tersor.models._compact_train import Found

STYLES = ("-", "--", ":", "-.")
COLORS = ("#666666", "#d62728", "#1f77b4", "#2ca02c")


def draw(folder: Path, groups: Mapping[str, Mapping[str, Sequence[Found]]]) -> Path:
    """``compact.png``: what the scores of each pattern take over the epochs, full and compact."""
    path = folder / "compact.png"
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.6 * len(groups) + 1, 3.2), layout="constrained", squeeze=False
    )
    for axis, (pattern, kinds) in zip(axes[0], groups.items(), strict=True):
        for number, (kind, runs) in enumerate(kinds.items()):
            values = runs[0].bytes
            style = {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number % len(STYLES)]}
            axis.step(range(len(values)), values, where="mid", label=kind, **style)
        axis.set_title(pattern, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("bytes per weight")
    axes[0][-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
