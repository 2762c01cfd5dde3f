"""The plots of a results folder: the speed-ups, where each measurement lies under the machine's limits, and from which
frozen share on a weight gradient is faster than the dense one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

# One colour per implementation in both plots; tersor's own are the blues.
_COLOURS = {
    "tersor": "#0b5cad",
    "tersor_packed": "#4aa3df",
    "native": "#1f9e89",
    "triton": "#7ad151",
    "eager": "#c44e52",
    "compiled": "#dd8452",
    "compiled_with_graph": "#e8b07a",
    "flex_attention": "#8172b3",
    "natten": "#937860",
    "natten_raw": "#b8a48f",
    "reference": "#9a9a9a",
    "fused": "#6b4c9a",
    "where": "#b5a642",
}
_SPARE = ["#da8bc3", "#64b5cd", "#5a5a2a", "#2a5a5a"]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
# Operators whose groups are named by what is frozen and its share in per cent; they have a plot of their own.
_CURVES = ("frozen_linear", "frozen_conv2d")
_GRANULARITIES = {
    "tile": ("tiles of 64 x 64 channels", "#0b5cad", "o"),
    "channel": ("output channels", "#1f9e89", "s"),
    "element": ("single weights", "#c44e52", "^"),
}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Writes what the results allow; the names of the files."""
    drawn = []
    with plt.rc_context(_STYLE):
        plots = {"speedup.png": _speedup, "roofline.png": _roofline, "crossover.png": _crossover}
        for name, plot in plots.items():
            (folder / name).unlink(missing_ok=True)
            if figure := plot(results):
                # Without the software's version in it, the file changes only where the picture does.
                figure.savefig(folder / name, bbox_inches="tight", metadata={"Software": None})
                plt.close(figure)
                drawn.append(name)
    return drawn


def _colour(impl: str, used: dict[str, str]) -> str:
    if impl not in used:
        used[impl] = _COLOURS.get(impl) or _SPARE[len(used) % len(_SPARE)]
    return used[impl]


def _direction(record: dict[str, Any]) -> str:
    return {"forward_backward": "forward + backward"}.get(record["direction"], record["direction"].replace("_", " "))


def _label(group: dict[str, Any], operators: int) -> str:
    parts = [group["size"].replace("_b", ", batch "), group["dtype"], _direction(group)]
    return "  ".join([group["operator"], *parts] if operators > 1 else parts)


def _speedup(results: dict[str, Any]) -> Any:
    """Horizontal bars: how many times longer each rival takes than tersor, group by group."""
    chosen = {}
    for name, group in results["groups"].items():
        rivals = [m for m in results["measurements"] if m["group"] == name and not m["ours"] and "times_tersor" in m]
        rivals = [m for m in rivals if m["times_tersor"]]
        if rivals and group["operator"] not in ("dispatch", *_CURVES):
            chosen[name] = sorted(rivals, key=lambda m: m["times_tersor"])
    if not chosen:
        return None
    colours: dict[str, str] = {}
    bars = sum(len(rivals) for rivals in chosen.values())
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.24 * bars + 0.34 * len(chosen)))
    operators = len({results["groups"][name]["operator"] for name in chosen})
    place, ticks = 0.0, []
    for name, rivals in chosen.items():
        start = place
        for m in rivals:
            value = m["times_tersor"]
            axes.barh(place, value - 1, left=1, height=0.86, color=_colour(m["impl"], colours))
            axes.annotate(
                f"{value:.3g}x", (max(value, 1), place), xytext=(4, 0), textcoords="offset points", va="center", size=8
            )
            place += 1
        ticks.append(((start + place - 1) / 2, _label(results["groups"][name], operators)))
        place += 1.4
    axes.set_xscale("log")
    axes.axvline(1, color=_COLOURS["tersor"], linewidth=1.5)
    axes.set_yticks([t[0] for t in ticks], [t[1] for t in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    _plain_ticks(axes, [m["times_tersor"] for rivals in chosen.values() for m in rivals])
    axes.grid(axis="x")
    axes.set_xlabel("time as a multiple of tersor's (log scale; 1 = tersor, further right = slower)")
    axes.set_title(f"Time relative to tersor\n{_place(results)}", size=11)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    axes.legend(handles, list(colours), loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _plain_ticks(axes: Axes, values: list[float]) -> None:
    low, high = min([1.0, *values]), max([1.5, *values])
    steps = [a * 10.0**e for e in range(-3, 6) for a in (1, 2, 5)]
    shown = [s for s in steps if low * 0.8 <= s <= high * 1.4]
    axes.set_xticks(shown, [f"{s:g}x" for s in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low * 0.9, high * 1.35)


def _roofline(results: dict[str, Any]) -> Any:
    """FLOP/s over FLOPs per byte that must move; the roofs are the copy bandwidth and the matrix product."""
    points = [m for m in results["measurements"] if "gflop_per_s" in m and "bytes" in m]
    limits = results["limits"]
    if not points or not limits:
        return None
    figure, axes = plt.subplots(figsize=(9, 5.6))
    colours: dict[str, str] = {}
    markers: dict[str, str] = {}
    for m in points:
        kind = f"{m['dtype']}, {_direction(m)}"
        marker = markers.setdefault(kind, _MARKERS[len(markers) % len(_MARKERS)])
        style: dict[str, Any] = {"marker": marker, "s": 44, "alpha": 0.85, "linewidths": 0.6, "edgecolors": "white"}
        axes.scatter(m["flops"] / m["bytes"], m["gflop_per_s"], color=_colour(m["impl"], colours), zorder=3, **style)
    intensities = [m["flops"] / m["bytes"] for m in points]
    low, high = min(intensities) / 2.5, max(intensities) * 8
    copy = limits["copy_bytes_per_second"] / 1e9
    hot = max(group.get("copy_bytes_per_second", 0) for group in results["groups"].values()) / 1e9
    _roof(axes, low, high, copy, limits, f"copy, {limits['copy_bytes'] >> 20} MiB: {copy:.3g} GB/s", "-")
    if hot > 1.15 * copy:
        _roof(axes, low, high, hot, None, f"copy, as many bytes as a case: up to {hot:.3g} GB/s", "--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(top=2.5 * max([high * copy, *(rate / 1e9 for rate in limits["matmul_flops_per_second"].values())]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(which="major")
    axes.set_xlabel("FLOPs per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"Measurements under the machine's limits\n{_place(results)}", size=11)
    entries = [Line2D([], [], marker="o", linestyle="", color=c, label=impl) for impl, c in colours.items()]
    entries += [Line2D([], [], marker=k, linestyle="", color="#555555", label=kind) for kind, k in markers.items()]
    axes.legend(handles=entries, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _roof(
    axes: Axes, low: float, high: float, copy: float, limits: dict[str, Any] | None, text: str, line: str
) -> None:
    """The slope of one bandwidth and, with ``limits``, the flat roofs of the matrix products."""
    axes.plot([low, high], [low * copy, high * copy], line, color="#444444", linewidth=1.3)
    x = low * (high / low) ** 0.03
    # The angle of y = copy * x in data coordinates, which matplotlib turns into that on the log-log page.
    options: dict[str, Any] = {
        "rotation": math.degrees(math.atan(copy)),
        "rotation_mode": "anchor",
        "transform_rotates_text": True,
    }
    axes.text(x, 1.25 * copy * x, text, size=8, color="#444444", **options)
    for dtype, rate in (limits or {}).get("matmul_flops_per_second", {}).items():
        axes.axhline(rate / 1e9, color="#999999", linewidth=1, linestyle=":")
        label = f"matrix product, {dtype}: {rate / 1e9:,.0f} GFLOP/s"
        axes.annotate(label, (high, rate / 1e9), xytext=(-4, 3), textcoords="offset points", ha="right", size=8)


def _crossover(results: dict[str, Any]) -> Any:
    """Time relative to the dense gradient's over the frozen share: a line per granularity, a panel per operator."""
    curves = {operator: _curves(results, operator) for operator in _CURVES}
    curves = {operator: lines for operator, lines in curves.items() if lines}
    if not curves:
        return None
    figure, panels = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 4.2), sharey=True, squeeze=False)
    for axes, (operator, lines) in zip(panels[0], curves.items(), strict=True):
        axes.axhline(1, color="#444444", linewidth=1.3, label="dense: all is computed")
        axes.plot([0, 100], [1, 0], ":", color="#999999", linewidth=1.3, label="in proportion to what is free")
        for granularity, points in lines.items():
            label, colour, marker = _GRANULARITIES[granularity]
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=f"tersor, {label} frozen")
        axes.set_xticks(range(0, 101, 25))
        axes.grid()
        axes.set_xlabel(f"{operator}: frozen weights in per cent")
    panels[0][0].set_ylabel("time of the weight gradient, dense = 1")
    panels[0][0].set_ylim(bottom=0)  # ends the automatic scaling of all panels, so after the last line
    panels[0][0].set_title(f"Weight gradient with frozen weights\n{_place(results)}", size=11)
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _curves(results: dict[str, Any], operator: str) -> dict[str, list[tuple[int, float]]]:
    """Per granularity the shares and the times relative to dense; nothing and all frozen are points of every line."""
    medians = {(m["group"], m["impl"]): m["median"] for m in results["measurements"]}
    points: dict[str, dict[int, float]] = {}
    for name, group in results["groups"].items():
        own, dense = medians.get((name, "tersor")), medians.get((name, "dense"))
        if group["operator"] == operator and own and dense:
            kind, share = group["size"].rsplit("_", 1)
            points.setdefault(kind, {})[int(share)] = own / dense
    ends = points.get("none", {}) | points.get("layer", {})
    return {kind: sorted((ends | points[kind]).items()) for kind in _GRANULARITIES if kind in points}


def _place(results: dict[str, Any]) -> str:
    machine = results["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {machine['torch']}" + (", a quick run" if machine["quick"] else "")
