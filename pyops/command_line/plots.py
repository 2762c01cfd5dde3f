"""The pictures of ``tersor compress``. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

DENSE, COMPRESSED = "#888888", "#d62728"
MOST_LAYERS = 40  # the largest ones


def draw(found: Any, output: Path) -> list[Path]:
    """Accuracy, bytes and latency of a :class:`tersor.command_line.results.Found`; returns the paths."""
    paths = []
    for name, function in (("accuracy", _accuracy), ("bytes", _bytes), ("latency", _latency)):
        figure = function(found)
        paths.append(output / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def _accuracy(found: Any) -> Any:
    """Of both trainings, one after the other, with what is sparse and frozen."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    begin = 0
    if found.dense is not None:
        begin = len(found.dense.accuracy)
        axis.plot(range(1, begin + 1), found.dense.accuracy, ".-", color=DENSE, label="dense")
    epochs = [begin + 1 + number for number in range(len(found.compressed.accuracy))]
    axis.plot(epochs, found.compressed.accuracy, ".-", color=COMPRESSED, label="compressed")
    axis.axhline(found.dense_accuracy, color=DENSE, linestyle=":", linewidth=1)
    shares = {"sparse": found.compressed.sparse, "frozen": found.compressed.frozen}
    for (name, values), style in zip(shares.items(), ("--", "-."), strict=True):
        if any(values):
            axis.plot(epochs, [100 * v for v in values], style, color="#1f77b4", linewidth=1, label=f"weights {name}")
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("test images told right, and\nshare of all weights (%)")
    axis.legend(fontsize=8)
    return figure


def _bytes(found: Any) -> Any:
    """Of each layer, dense and as it is stored."""
    rows = sorted(found.layers.rows, key=lambda row: row.float_bytes, reverse=True)[:MOST_LAYERS]
    rows = [row for row in found.layers.rows if row in rows][::-1]
    figure, axis = plt.subplots(figsize=(6.5, 1.2 + 0.26 * len(rows)), layout="constrained")
    places = range(len(rows))
    axis.barh([p + 0.2 for p in places], [r.float_bytes / 1e3 for r in rows], 0.4, color=DENSE, label="float32")
    axis.barh([p - 0.2 for p in places], [r.bytes / 1e3 for r in rows], 0.4, color=COMPRESSED, label="stored")
    axis.set_yticks(places, [row.layer for row in rows], fontsize=7)
    axis.set_xlabel("kB")
    axis.legend(fontsize=8)
    return figure


def _latency(found: Any) -> Any:
    """Of each batch size."""
    figure, axes = plt.subplots(1, len(found.seconds), figsize=(6.5, 3.2), layout="constrained", squeeze=False)
    for axis, (batch, (before, after)) in zip(axes[0], found.seconds.items(), strict=True):
        bars = axis.bar(("dense", "compressed"), (1e3 * before, 1e3 * after), color=(DENSE, COMPRESSED))
        axis.bar_label(bars, ("", f"{before / after:.2f}x"))
        axis.set_title(f"{batch} image{'s' * (batch > 1)}", fontsize=9)
        axis.set_ylabel("ms")
        axis.margins(y=0.12)
    return figure
