"""Trains CF-ViT and SuperViT on windows of photographs, and compares them with plain vision transformers.

    python -m tersor.models.train_tokens --output demo_tokens

Of the same width and depth, on the same images: CF-ViT, which takes a second, finer look at images it is not sure of;
SuperViT, one network for four image sizes that drops tokens; and a plain network for each of the sizes. Then their
accuracy against the images that they do a second, over thresholds, sizes and keep rates. Writes a table
(``results.md``), all figures (``results.json``), pictures (``tokens.png``; ``samples.png``: which tokens were split)
and the states that ``--resume`` goes on from; where all have finished, it measures the speed again. Needs the extra
``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tersor
from tersor.models._command import (
    PHOTOGRAPHS,
    between,
    device,
    folder,
    make_output,
    mean_and,
    print_table,
    run_command,
    training_bar,
    write_page,
    write_results,
)

if TYPE_CHECKING:
    from rich.console import Console

    from tersor.models._tokens_measure import Groups
    from tersor.models._tokens_train import Config, Progress

PRINTED = 7  # columns of the table on the screen; the page has all
Networks = dict[str, list[tuple["Config", Any]]]

CAPTION = (
    "Accuracy: of the test images, mean and standard deviation of the seeds. Fine: share of the images that took the "
    "second look. Images/s: in batches of 256, resizing included. MACs: multiply-adds of an image's matrix products. "
    "Against plain: accuracy less that of the best plain network, or mixture of two, that takes no more time for an "
    "image (by MACs: no more of these), mean of the seeds' differences and its standard error."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_tokens", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the measurements, the table, the results and the pictures."""
    from rich.console import Console

    from tersor.models import _tokens_measure

    console = Console()
    _say_what_runs(console, options)
    networks, groups = _train_all(console, options)
    with console.status("images a second, all networks and settings in turn"):
        _tokens_measure.measure(networks, groups, options.rounds, options.threads)
    _tokens_measure.compare(groups)
    covered = [_tokens_measure.coverage(config, model) for config, model in networks["CF-ViT"]]
    rows, remarks = _rows(groups), _remarks(groups, covered)
    title = "Which photograph is it? Accuracy, and what an image takes"
    print_table(console, title, [row[:PRINTED] for row in rows], CAPTION)
    for line in remarks:
        console.print(line, highlight=False)
    _write(console, options, networks, groups, rows, remarks, covered)


def _train_all(console: Console, options: argparse.Namespace) -> tuple[Networks, Groups]:
    from tersor.models._tokens_train import METHODS, Config

    shared = ("epochs", "iterations", "batch_size", "width", "depth", "test_images", "threads", "device")
    common = {name: getattr(options, name) for name in shared}
    groups: Groups = {method: [] for method in METHODS}
    networks: Networks = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        for method in METHODS:
            config = Config(method, seed, **common)
            model, progress = _train(console, config, options.output, options.resume)
            groups[method].append(progress)
            networks[method].append((config, model))
    return networks, groups


def _write(
    console: Console,
    options: argparse.Namespace,
    networks: Networks,
    groups: Groups,
    rows: list[list[str]],
    remarks: list[str],
    covered: list[float],
) -> None:
    """All files but the states."""
    from tersor.models import _tokens_measure, _tokens_plot

    output, points = options.output, groups["CF-ViT"][0].points
    half = min(range(len(points)), key=lambda place: abs(points[place]["fine"] - 0.5))  # of the images go each way
    threshold = _tokens_measure.THRESHOLDS[half]
    samples = _tokens_measure.samples(*networks["CF-ViT"][0], threshold)
    pictures = ["![accuracy and images a second](tokens.png)", "", "![split tokens](samples.png)"]
    below = [line for remark in (CAPTION, *remarks) for line in ("", remark)]
    more = {"backends": _backends(options), "threshold of the samples": threshold, "coverage": covered}
    written = [
        write_results(output / "results.json", options, groups, more),
        write_page(output / "results.md", "Tokens by need: CF-ViT and SuperViT", rows, [*below, "", *pictures]),
    ]
    for path in (*written, *_tokens_plot.draw(output, groups, samples, threshold)):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_tokens", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(1, 10_000), default=6, help="of every run (default 6)")
    add("--iterations", type=between(1, 1_000_000), default=100, help="steps per epoch (default 100)")
    add("--batch-size", type=between(2, 4096), default=64, help="images per step (default 64)")
    add("--width", type=between(4, 1024), default=64, help="channels, a multiple of 4, the heads (default 64)")
    add("--depth", type=between(4, 100), default=7, help="blocks; tokens are dropped in the fourth, seventh, tenth")
    add("--seeds", type=between(1, 100), default=3, help="runs of everything (default 3)")
    add("--test-images", type=between(1, 100_000), default=2000, help="also for validation (default 2000)")
    add("--rounds", type=between(1, 1000), default=4, help="in which the speed is measured (default 4)")
    add("--threads", type=between(1, 4096), default=2, help="CPU threads, to train and to measure (default 2)")
    add("--device", type=device, default="cpu", help="cpu (default), cuda or cuda:N")
    add("--output", type=folder, default=Path("demo_tokens"), help="folder of all files (default demo_tokens)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")
    make_output(parser, options.output)
    return options


def _backends(options: argparse.Namespace) -> dict[str, str]:
    kind = torch.device(options.device).type
    names = ("class_", "compact_", "gather_", "prune_", "rank_", "resplit_", "window_")
    return {c.operator: c.runs for c in tersor.backends() if c.operator.startswith(names) and c.device == kind}


def _say_what_runs(console: Console, options: argparse.Namespace) -> None:
    from tersor.models._textures import NAMES

    console.print(
        f"torch {torch.__version__}, {options.device}, threads: {options.threads}; {len(NAMES)} photographs, "
        f"{options.test_images} test images",
        highlight=False,
    )
    runs = _backends(options)
    for backend in dict.fromkeys(runs.values()):
        operators = ", ".join(name for name, found in runs.items() if found == backend)
        console.print(f"[bold]{backend}[/]: {operators}", highlight=False)


def _train(console: Console, config: Config, output: Path, resume: bool) -> tuple[Any, Progress]:
    """One run under a progress bar."""
    from tersor.models._tokens_train import train

    with training_bar(console, f"{config.method} seed {config.seed}", config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"loss {progress.loss[-1]:.2f}" if progress.loss else ""
            show(len(progress.loss), step + 1, note)

        model, progress = train(config, output, resume, report)
        highest = max(point["test"] for point in progress.points)
        show(config.epochs, 0, f"loss {progress.loss[-1]:.2f}, accuracy {highest:.2f} %")
    return model, progress


def _against(points: Sequence[dict[str, float | None]], key: str) -> str:
    values = [point[key] for point in points]
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return ""  # cheaper than any plain one
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    return f"{statistics.fmean(found):+.2f}" + (f" +- {error:.2f}" if error is not None else "")


def _rows(groups: Groups) -> list[list[str]]:
    """The table: a header, then a row for every method and setting."""
    rows = [["", "setting", "accuracy (%)", "fine", "MACs (M)", "images/s", "against plain", "by MACs"]]
    for method, runs in groups.items():
        for points in zip(*(run.points for run in runs), strict=True):
            fine = "" if points[0]["fine"] is None else f"{statistics.fmean(p['fine'] for p in points):.0%}"
            against = ["", ""]
            if not method.startswith("ViT"):
                against = [_against(points, f"against plain by {cost}") for cost in ("seconds", "macs")]
            rows.append(
                [
                    method,
                    points[0]["setting"],
                    mean_and([p["test"] for p in points]),
                    fine,
                    f"{statistics.fmean(p['macs'] for p in points) / 1e6:.2f}",
                    f"{statistics.fmean(p['speed'] for p in points):.0f}",
                    *against,
                ]
            )
    return rows


def _remarks(groups: Groups, covered: Sequence[float]) -> list[str]:
    """Where each method is best by the validation images, and what the test images say there; what was trained."""
    from tersor.models._tokens_measure import best

    lines = []
    for method in ("CF-ViT", "SuperViT"):
        for cost, name in (("seconds", "time"), ("macs", "MACs")):
            key, place = f"against plain by {cost}", best(groups, method, cost)
            points = [run.points[place] for run in groups[method]]
            each = ", ".join("none" if point[key] is None else f"{point[key]:+.2f}" for point in points)
            lines.append(
                f"By the validation images {method} is best against plain networks of equal {name} at "
                f"{points[0]['setting']}; on the test images the difference there is "
                f"{_against(points, key)} % (each seed: {each})."
            )
    lines.append(
        f"The five of nine coarse tokens that CF-ViT splits hold {statistics.fmean(covered):.0%} of the windows' "
        "pixels; five at random would hold 56%."
    )
    lines.append(
        "All trained on the same images for the same number of steps; a step is two passes for CF-ViT and four for "
        "SuperViT."
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
