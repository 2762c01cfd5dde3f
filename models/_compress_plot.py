"""The pictures of ``train_compress``. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import nn

from tersor.models._compress_train import Progress, fixed_set
from tersor.models._textures import NAMES

COLORS = {"dense": "#666666", "compressed": "#d62728"}
SAMPLES = 12

Latencies = Mapping[str, Mapping[str, float]]  # of every phase and batch size: milliseconds


def draw(folder: Path, groups: Mapping[str, Sequence[Progress]], latencies: Latencies) -> Path:
    """``compress.png`` in the folder: accuracy, size and time, before and after."""
    path = folder / "compress.png"
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained", width_ratios=(2, 1, 1, 1))
    _epochs(axes[0], groups)
    sizes = {phase: groups[phase][0].bytes / 1e6 for phase in COLORS}
    _bars(axes[1], sizes, "file (MB)")
    for axis, size in zip(axes[2:], ("1", "64"), strict=True):
        _bars(axis, {phase: latencies[phase][size] for phase in COLORS}, f"time of a batch of {size} (ms)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_samples(folder: Path, models: Mapping[str, nn.Module]) -> Path:
    """``samples.png``: test patches, and what both networks take them for."""
    path = folder / "samples.png"
    images, labels = fixed_set("test", 64)
    chosen = [int((labels == label).nonzero()[0]) for label in labels.unique().tolist()][:SAMPLES]
    with torch.no_grad():
        told = {phase: model(images).argmax(1).tolist() for phase, model in models.items()}
    figure, axes = plt.subplots(2, (len(chosen) + 1) // 2, figsize=(9, 4.4), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, place in zip(axes.flat, chosen, strict=False):
        axis.imshow(images[place, 0], cmap="gray", vmin=0, vmax=1)
        lines = [f"{phase}: {NAMES[told[phase][place]]}" for phase in models]
        right = all(told[phase][place] == int(labels[place]) for phase in models)
        axis.set_title(
            "\n".join([NAMES[int(labels[place])], *lines]), fontsize=6, color="black" if right else "#d62728"
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _epochs(axis: Axes, groups: Mapping[str, Sequence[Progress]]) -> None:
    """Validation accuracy over the epochs, mean of the seeds; a dot for the test accuracy of each."""
    for phase, color in COLORS.items():
        curves = [run.validation for run in groups[phase]]
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axis.plot(range(1, len(means) + 1), means, color=color, label=phase)
        tests = [run.accuracy for run in groups[phase]]
        axis.plot([len(means) + 0.5] * len(tests), tests, ".", color=color)
    axis.set_xlabel("epoch of the second phase; dots: test")
    axis.set_ylabel("patches told right (%)")
    axis.legend(fontsize=8)


def _bars(axis: Axes, values: Mapping[str, float], label: str) -> None:
    bars = axis.bar(list(values), list(values.values()), color=[COLORS[phase] for phase in values])
    axis.bar_label(bars, [f"{value:.3g}" for value in values.values()])
    axis.set_title(label, fontsize=9)
    axis.margins(y=0.12)
