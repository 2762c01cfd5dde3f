"""The pictures of ``train_tokens``. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tersor.models._textures import NAMES
from tersor.models._tokens_data import SIDE
from tersor.models._tokens_measure import KEEP_RATES, Groups, Sample

COLORS = {"CF-ViT": "#d62728", "SuperViT": "#1f77b4", "plain": "#666666"}
LINES = {1.0: "-", 0.7: "--", 0.5: ":"}
SURE, UNSURE, COARSE = "#2ca02c", "#ff7f0e", 32  # colours, and pixels of a coarse token


def draw(folder: Path, groups: Groups, samples: Sequence[Sample], threshold: float) -> list[Path]:
    """``tokens.png`` and ``samples.png`` in the folder."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, layout="constrained")
    _curves(axes[0], groups, "speed", 1.0)
    axes[0].set_xlabel("images a second (batches of 256)")
    axes[0].set_ylabel("test images told right (%)")
    _curves(axes[1], groups, "macs", 1e-6)
    axes[1].set_xlabel("million multiply-adds per image")
    axes[1].legend(fontsize=8)
    return [_save(figure, folder / "tokens.png"), _samples(folder / "samples.png", samples, threshold)]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(axis: Axes, groups: Groups, key: str, unit: float) -> None:
    """Means of the seeds with standard deviations; SuperViT has a curve for every keep rate."""
    settings = [list(zip(*(run.points for run in runs), strict=True)) for runs in groups.values()]
    found = dict(zip(groups, settings, strict=True))
    plain = [points for method, group in found.items() if method.startswith("ViT") for points in group]
    _curve(axis, plain, key, unit, {"color": COLORS["plain"], "fmt": "s-", "label": "plain ViT, one for each size"})
    for number, rate in enumerate(KEEP_RATES):
        style = {"color": COLORS["SuperViT"], "fmt": "o", "linestyle": LINES[rate]}
        label = f"SuperViT, four sizes, keeps {rate:g}"
        _curve(axis, found["SuperViT"][number :: len(KEEP_RATES)], key, unit, style | {"label": label})
    style = {"color": COLORS["CF-ViT"], "fmt": "D-", "label": "CF-ViT, by threshold"}
    _curve(axis, found["CF-ViT"], key, unit, style)
    axis.grid(color="#dddddd", linewidth=0.6)


def _curve(
    axis: Axes, settings: Sequence[Sequence[Mapping[str, Any]]], key: str, unit: float, style: dict[str, Any]
) -> None:
    across = [[unit * point[key] for point in points] for points in settings]
    up = [[point["test"] for point in points] for points in settings]
    (x, y) = ([statistics.fmean(each) for each in values] for values in (across, up))
    (dx, dy) = ([statistics.stdev(each) if len(each) > 1 else 0.0 for each in values] for values in (across, up))
    axis.errorbar(x, y, dy, dx, capsize=2, markersize=4, elinewidth=0.8, **style)


def _samples(path: Path, samples: Sequence[Sample], threshold: float) -> Path:
    columns = max(1, sum(not sample.unsure for sample in samples), sum(sample.unsure for sample in samples))
    figure, axes = plt.subplots(2, columns, figsize=(2 * columns, 5.2), squeeze=False, layout="constrained")
    for row, wanted in zip(axes, (False, True), strict=True):
        chosen: list[Sample | None] = [sample for sample in samples if sample.unsure is wanted]
        for axis, sample in zip(row, chosen + [None] * (columns - len(chosen)), strict=True):
            axis.set_axis_off()
            if sample is not None:
                _sample(axis, sample)
    figure.suptitle(
        f"Above: left after the coarse pass (surer than {threshold:g}). Below: not sure; "
        "the marked coarse tokens were split in four",
        fontsize=10,
    )
    return _save(figure, path)


def _sample(axis: Axes, sample: Sample) -> None:
    axis.imshow(sample.image.numpy(), cmap="gray", vmin=-2.5, vmax=2.5)
    for place in range(0, SIDE + 1, COARSE):
        for line in (axis.axhline, axis.axvline):
            line(place - 0.5, color="white", linewidth=0.4, alpha=0.6)
    for token in sample.split:
        row, column = divmod(token, SIDE // COARSE)
        for down in range(2):
            for right in range(2):
                corner = (COARSE * column + COARSE // 2 * right - 0.5, COARSE * row + COARSE // 2 * down - 0.5)
                axis.add_patch(Rectangle(corner, COARSE / 2, COARSE / 2, fill=False, edgecolor=UNSURE, linewidth=1.2))
    answer = f"{NAMES[sample.first]} ({sample.confidence:.2f})"
    if sample.unsure:
        answer += f"\nthen {NAMES[sample.last]}"
    right = sample.last == sample.label
    title = f"{answer}\n" + ("right" if right else f"is {NAMES[sample.label]}")
    axis.set_title(title.replace("immunohistochemistry", "immunohist."), fontsize=7, color=SURE if right else "#b3261e")
