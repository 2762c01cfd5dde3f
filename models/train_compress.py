"""Trains a network on photographs, and on with 2:4 sparsity, 4 bits and freezing: smaller, faster, as good?

    python -m tersor.models.train_compress --output demo_compress

A dense ResNet is trained. From its weights two go on, over the same batches with the same schedule: the dense one, and
one that :mod:`tersor.compress` prepares, trains and converts. Both are written as files, read back and tested on
patches from parts of the photographs that neither has seen; their forward passes are timed in batches of 1 and 64.
Writes a table (``results.md``), all figures (``results.json``), pictures, the models, and the states that ``--resume``
goes on from. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tersor.models._command import (
    PHOTOGRAPHS,
    between,
    difference,
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

    from tersor.models._compress_train import Config, Progress

CAPTION = (
    "Accuracy: of test patches, mean and standard deviation of the seeds, of the models read back from their files; "
    "change: mean of the seeds' differences and its standard error. Frozen: share of all weights at the end of the "
    "training. Same: test patches that the file's network tells as the trained one did. Bytes: of the file. Times: "
    "medians of forward passes on the CPU that take turns."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_compress", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the table, the results and the pictures."""
    from rich.console import Console

    from tersor import compress
    from tersor.models import _compress_plot
    from tersor.models._compress_train import PHASES, Config, load_model, measure

    console, output = Console(), options.output
    shared = ("epochs", "iterations", "batch_size", "width", "test_patches", "threads")
    common = {name: getattr(options, name) for name in shared}
    groups: dict[str, list[Progress]] = {phase: [] for phase in PHASES}
    for seed in range(options.seeds):
        start, progress = _train(console, Config("start", seed, **common), output, None, options.resume)
        groups["start"].append(progress)
        for phase in PHASES[1:]:
            config = Config(phase, seed, **common)
            groups[phase].append(_train(console, config, output, start.state_dict(), options.resume)[1])
    config = Config("dense", 0, **common)
    latencies = measure(config, output, options.rounds, options.latency_threads)
    models = {phase: load_model(dataclasses.replace(config, phase=phase), output) for phase in PHASES[1:]}
    layers = compress.report(models["compressed"], torch.zeros(1, 1, 24, 24))
    rows = _rows(groups, latencies, options)
    print_table(console, "Which photograph is it? Dense, and 2:4 + 4 bits + frozen", rows, CAPTION)
    console.print(_verdict(groups, latencies), highlight=False)
    pictures = [_compress_plot.draw(output, groups, latencies), _compress_plot.draw_samples(output, models)]
    below = ["", CAPTION, "", _verdict(groups, latencies), ""]
    below += ["![accuracy, size and time](compress.png)", "", "![samples](samples.png)", "", layers.to_markdown()]
    more = {"latencies": latencies, "layers": [dataclasses.asdict(row) for row in layers.rows]}
    named = {phase: groups[phase] for phase in PHASES}
    written = [
        write_results(output / "results.json", options, named, more),
        write_page(output / "results.md", "A network with 2:4 sparsity, 4 bits and frozen weights", rows, below),
    ]
    for path in (*written, *pictures):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_compress", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(1, 10_000), default=10, help="of each of the two phases (default 10)")
    add("--iterations", type=between(1, 1_000_000), default=100, help="steps per epoch (default 100)")
    add("--batch-size", type=between(2, 4096), default=32, help="patches per step (default 32)")
    add("--width", type=between(4, 512), default=32, help="channels of the first stage, a multiple of 4 (default 32)")
    add("--seeds", type=between(1, 100), default=3, help="runs of everything (default 3)")
    add("--test-patches", type=between(64, 1_000_000), default=10_000, help="in all (default 10000)")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads in training (default 1)")
    add("--latency-threads", type=between(1, 4096), default=2, help="CPU threads when timing (default 2)")
    add("--rounds", type=between(1, 100_000), default=51, help="of the timing (default 51)")
    add("--output", type=folder, default=Path("demo_compress"), help="folder of all files (default demo_compress)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")
    make_output(parser, options.output)
    return options


def _train(
    console: Console, config: Config, output: Path, start: Mapping[str, torch.Tensor] | None, resume: bool
) -> tuple[torch.nn.Module, Progress]:
    """One run under a progress bar."""
    from tersor.models._compress_train import train

    with training_bar(console, f"{config.phase} seed {config.seed}", config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"loss {progress.loss[-1]:.2f}, frozen {progress.frozen[-1]:.0%}" if progress.loss else ""
            show(len(progress.loss), step + 1, note)

        found: dict[str, Any] | None = None if start is None else dict(start)
        model, progress = train(config, output, found, resume, report)
        value = progress.validation[-1] if config.phase == "start" else progress.accuracy
        show(config.epochs, 0, f"accuracy {value:.2f} %")
    return model, progress


def _rows(
    groups: Mapping[str, Sequence[Progress]], latencies: Mapping[str, Mapping[str, float]], options: argparse.Namespace
) -> list[list[str]]:
    """The table: a header, then both networks."""
    header = ["", "accuracy (%)", "change", "frozen", "same", "bytes", "batch of 1", "batch of 64", "of each seed (%)"]
    rows = [header]
    dense = [run.accuracy for run in groups["dense"]]
    for phase in ("dense", "compressed"):
        found = [run.accuracy for run in groups[phase]]
        mean, noise = difference(found, dense)
        change = "" if phase == "dense" else f"{mean:+.2f}" + (f" +- {noise:.2f}" if noise == noise else "")
        same = sum(run.same for run in groups[phase])
        times = [f"{latencies[phase][size]:.3g} ms" for size in ("1", "64")]
        count = f"{same}/{options.test_patches * len(found)}"
        size = f"{groups[phase][0].bytes:,}"
        frozen = statistics.fmean(run.frozen[-1] for run in groups[phase])
        rows.append(
            [
                phase,
                mean_and(found),
                change,
                f"{frozen:.1%}" if frozen else "",
                count,
                size,
                *times,
                " ".join(f"{v:.2f}" for v in found),
            ]
        )
    return rows


def _verdict(groups: Mapping[str, Sequence[Progress]], latencies: Mapping[str, Mapping[str, float]]) -> str:
    sizes = [groups[phase][0].bytes for phase in ("dense", "compressed")]
    one, many = (latencies["dense"][size] / latencies["compressed"][size] for size in ("1", "64"))
    change = statistics.fmean(
        after.accuracy - before.accuracy for before, after in zip(groups["dense"], groups["compressed"], strict=True)
    )
    faster = f"{one:.2f} times faster one by one and {many:.2f} times in batches of 64"
    return f"{sizes[0] / sizes[1]:.1f} times smaller, {faster}, {change:+.2f} points of accuracy."


if __name__ == "__main__":
    sys.exit(main())
