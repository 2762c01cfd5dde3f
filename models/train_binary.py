"""Trains a ResNet-20 on photographs' textures in float32 and with three kinds of binary convolutions, and packs these.

    python -m tersor.models.train_binary --output demo_binary

From the same initial weights, on the same patches and at the same learning rates: float32, the plain straight-through
estimator (STE), ReCU and ReSTE. The binary networks are packed into bits, written, read back, judged again and timed.
Writes a table (``results.md``), all figures (``results.json``), a picture (``binary.png``), the models, and the states
that ``--resume`` goes on from; where all have finished, it measures the speed again. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tersor
from tersor.models._command import (
    PHOTOGRAPHS,
    between,
    difference,
    folder,
    make_output,
    markdown_table,
    mean_and,
    print_table,
    run_command,
    training_bar,
    write_page,
    write_results,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from tersor.models._binary_measure import Speeds
    from tersor.models._binary_plot import Groups
    from tersor.models._binary_train import Config, Progress

PRINTED = 6  # columns of the table on the screen; the page has all
CAPTION = (
    "Accuracy: mean and standard deviation of the seeds. Against STE: mean of the seeds' differences and its standard "
    "error. Packed differs: patches, of all seeds', that the packed model, read from its file, puts into another class "
    "than the trained one; signs: patches whose logits differ by more than roundings, because a number so close to 0 "
    "fell on its other side somewhere. Bytes: of the model's file, packed for the binary ones."
)
SPEED_CAPTION = (
    "Patches a second: medians of the rounds, of the first seed's networks in eval mode. In brackets: against the "
    "faster of float32's two memory formats."
)
BLOCK_TITLES = {"bireal": "Bi-Real Net, norm(relu(conv)) + shortcut", "recu": "ReCU, hardtanh(norm(conv) + shortcut)"}
OPERATORS = ("binary_", "pack_signs", "recu_")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_binary", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the measurement, the tables, the results and the picture."""
    from rich.console import Console

    from tersor.models import _binary_plot
    from tersor.models._binary_measure import measure

    console, output = Console(), options.output
    backends = _say_what_runs(console, options)
    groups, networks = _train_all(console, options)
    with console.status("patches a second, all networks in turn"):
        speeds = measure(networks, options.rounds, options.threads)
    rows, speed_rows = _rows(groups, options.patches), _speed_rows(speeds)
    title = f"Which photograph is it? Judged by {options.part} patches"
    print_table(console, title, [row[:PRINTED] for row in rows], CAPTION)
    print_table(console, "Patches a second", speed_rows, SPEED_CAPTION)
    below = ["", f"{_recipe(options)} {CAPTION}", "", *markdown_table(speed_rows), "", SPEED_CAPTION]
    below += ["", "![accuracy, size and speed](binary.png)"]
    more = {"backends": backends, "patches a second": speeds}
    written = [
        write_results(output / "results.json", options, groups, more),
        write_page(output / "results.md", "Binary networks: STE, ReCU and ReSTE", rows, below),
    ]
    for path in (*written, *_binary_plot.draw(output, groups, speeds)):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _train_all(console: Console, options: argparse.Namespace) -> tuple[Groups, dict[str, nn.Module]]:
    """All runs of each method; and the networks of the first seed that are timed."""
    from tersor.models._binary_train import METHODS, Config, load_model

    shared = ("epochs", "iterations", "batch_size", "width", "block", "rate", "decay", "part", "patches", "threads")
    common = {name: getattr(options, name) for name in shared}
    groups: dict[str, list[Progress]] = {method: [] for method in METHODS}
    networks: dict[str, nn.Module] = {}
    for seed in range(options.seeds):
        for method in METHODS:
            config = Config(method, seed, **common)
            model, progress = _train(console, config, options.output, options.resume)
            groups[method].append(progress)
            if seed == 0:
                networks[method] = model
                if method == "float":
                    networks["float channels-last"] = _channels_last(model)
                else:
                    networks[f"{method} packed"] = load_model(config, options.output)
    return groups, networks


def _channels_last(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from tersor.models._binary_train import BLOCKS, Config

    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_binary", description=(__doc__ or "").partition("\n")[0]
    )
    add, usual = parser.add_argument, Config("float")
    add("--epochs", type=between(2, 10_000), default=usual.epochs, help="of every run (default %(default)s)")
    add("--iterations", type=between(1, 1_000_000), default=usual.iterations, help="per epoch (default %(default)s)")
    add("--batch-size", type=between(2, 4096), default=usual.batch_size, help="patches per step (default %(default)s)")
    add("--width", type=between(4, 512), default=usual.width, help="channels, a multiple of 4 (default %(default)s)")
    add(
        "--block",
        choices=tuple(BLOCKS),
        default=usual.block,
        help="of all networks (default %(default)s)",
    )
    add("--rate", type=_positive, default=usual.rate, help="learning rate (default %(default)s)")
    add("--decay", type=_positive, default=usual.decay, help="weight decay (default %(default)s)")
    add("--part", choices=("test", "validation"), default="test", help="that judges; validation to choose options by")
    add("--patches", type=between(1, 100_000), default=usual.patches, help="that judge (default %(default)s)")
    add("--seeds", type=between(1, 100), default=3, help="runs of everything (default 3)")
    add("--rounds", type=between(1, 1000), default=15, help="in which the speed is measured (default 15)")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads, to train and to measure (default 1)")
    add("--output", type=folder, default=Path("demo_binary"), help="folder of all files (default demo_binary)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")
    make_output(parser, options.output)
    return options


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _say_what_runs(console: Console, options: argparse.Namespace) -> dict[str, str]:
    """Returns the backend of every binary operator."""
    from tersor.models._textures import NAMES

    console.print(
        f"torch {torch.__version__}, cpu, threads: {options.threads}; {len(NAMES)} photographs, "
        f"{options.patches} {options.part} patches",
        highlight=False,
    )
    runs = {c.operator: c.runs for c in tersor.backends() if c.operator.startswith(OPERATORS) and c.device == "cpu"}
    for backend in dict.fromkeys(runs.values()):
        operators = ", ".join(name for name, found in runs.items() if found == backend)
        console.print(f"[bold]{backend}[/]: {operators}", highlight=False)
    return runs


def _train(console: Console, config: Config, output: Path, resume: bool) -> tuple[nn.Module, Progress]:
    """One run under a progress bar."""
    from tersor.models._binary_train import train

    with training_bar(console, f"{config.method} seed {config.seed}", config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"loss {progress.loss[-1]:.2f}" if progress.loss else ""
            show(len(progress.loss), step + 1, note)

        model, progress = train(config, output, resume, report)
        show(config.epochs, 0, f"loss {progress.loss[-1]:.2f}, accuracy {progress.accuracy:.2f} %")
    return model, progress


def _rows(groups: Groups, patches: int) -> list[list[str]]:
    """The table: a header, then a row for every method."""
    from tersor.models._binary_plot import TITLES

    rows = [["", "accuracy (%)", "against STE", "packed differs", "bytes", "of float32", "signs", "of each seed (%)"]]
    plain = [run.accuracy for run in groups["ste"]]
    for method, runs in groups.items():
        found, total = [run.accuracy for run in runs], patches * len(runs)
        mean, noise = difference(found, plain)
        ahead = f"{mean:+.2f}" + ("" if math.isnan(noise) else f" +- {noise:.2f}")
        binary = method != "float"
        rows.append(
            [
                TITLES[method],
                mean_and(found),
                "" if method == "ste" else ahead,
                f"{sum(run.differ for run in runs)}/{total}" if binary else "",
                str(runs[0].bytes),
                f"{runs[0].bytes / groups['float'][0].bytes:.1%}",
                f"{sum(run.flipped for run in runs)}/{total}" if binary else "",
                " ".join(f"{value:.2f}" for value in found),
            ]
        )
    return rows


def _recipe(options: argparse.Namespace) -> str:
    return (
        f"All networks are ResNet-20s of width {options.width} with the blocks of {BLOCK_TITLES[options.block]}, each "
        f"trained for {options.epochs} epochs of {options.iterations} steps of {options.batch_size} patches, by SGD at "
        f"the rate {options.rate:g} with a decay of {options.decay:g}, and judged by {options.patches} {options.part} "
        "patches."
    )


def _speed_rows(speeds: Speeds) -> list[list[str]]:
    from tersor.models._binary_measure import BATCHES
    from tersor.models._binary_plot import TITLES

    rows = [["", *(f"batch {size}" for size in BATCHES)]]
    plain = {size: max(speeds[name][size] for name in speeds if name.startswith("float")) for size in BATCHES}
    for name, found in speeds.items():
        method, _, ending = name.partition(" ")
        row: list[Any] = [f"{TITLES[method]}{ending and ', '}{ending}"]
        for size in BATCHES:
            row.append(f"{found[size]:.0f} ({found[size] / plain[size]:.2f}x)")
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
