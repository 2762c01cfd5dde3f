"""Trains networks of 2 and 3 bits on photographs' textures, and freezes what has settled: what does that cost and save?

    python -m tersor.models.train_freezing --output demo_freezing

For every number of bits: quantisation-aware training, and LTS freezing single weights, tiles and channels, all from the
same weights in full precision. Writes a table (``results.md``), all figures (``results.json``), pictures of the
accuracies and of the backward pass over time, and the states that ``--resume`` goes on from. Needs the extra
``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tersor.models._command import (
    PHOTOGRAPHS,
    between,
    folder,
    make_output,
    run_command,
    training_bar,
    write_page,
    write_results,
)

if TYPE_CHECKING:
    from rich.console import Console

    from tersor.models._freezing_train import Config, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_freezing", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the table, the results and the pictures."""
    from rich.console import Console

    from tersor.models import _freezing_plot, _textures
    from tersor.models._freezing_train import METHODS, Config

    console, output = Console(), options.output
    shared = ("epochs", "iterations", "batch_size", "width", "test_patches", "threads")
    common = {name: getattr(options, name) for name in shared}
    console.print(
        f"torch {torch.__version__}, cpu, threads: {options.threads}; {len(_textures.NAMES)} photographs, "
        f"{options.test_patches} test patches of each",
        highlight=False,
    )
    groups: dict[tuple[str, int], list[Progress]] = {}
    for seed in range(options.seeds):
        model, progress = _train(console, Config("full", 32, seed, **common), output, None, options.resume)
        groups.setdefault(("full", 32), []).append(progress)
        start = model.state_dict()
        for bits in options.bits:
            for method in METHODS[1:]:
                config = Config(method, bits, seed, **common)
                groups.setdefault((method, bits), []).append(_train(console, config, output, start, options.resume)[1])
    groups = dict(sorted(groups.items(), key=lambda item: (-item[0][1], METHODS.index(item[0][0]))))
    rows = _rows(groups)
    _print_table(console, rows)
    named = {f"{method} {bits}-bit": runs for (method, bits), runs in groups.items()}
    below = ["", "![accuracy](accuracy.png)", "", "![freezing over time](freezing.png)"]
    title = "Freezing during quantisation-aware training"
    written = [
        write_results(output / "results.json", options, named),
        write_page(output / "results.md", title, rows, below),
    ]
    for path in (*written, *_freezing_plot.draw(output, groups)):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_freezing", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(3, 10_000), default=15, help="of every run (default 15)")
    add("--iterations", type=between(1, 1_000_000), default=40, help="steps per epoch (default 40)")
    add("--batch-size", type=between(2, 4096), default=32, help="patches per step (default 32)")
    add("--width", type=between(1, 512), default=64, help="channels of the first stage (default 64)")
    add("--bits", type=between(2, 8), nargs="+", default=[3, 2], help="of the quantised runs (default 3 2)")
    add("--seeds", type=between(1, 100), default=3, help="runs of everything (default 3)")
    add("--test-patches", type=between(1, 4096), default=1024, help="of each photograph (default 1024)")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add("--output", type=folder, default=Path("demo_freezing"), help="folder of all files (default demo_freezing)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    options.bits = sorted(set(options.bits), reverse=True)
    make_output(parser, options.output)
    return options


def _train(
    console: Console, config: Config, output: Path, start: dict[str, torch.Tensor] | None, resume: bool
) -> tuple[torch.nn.Module, Progress]:
    """One run under a progress bar."""
    from tersor.models._freezing_train import train

    title = f"{config.method} {config.bits}-bit seed {config.seed}"
    with training_bar(console, title, config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"loss {progress.loss[-1]:.2f}, frozen {progress.frozen[-1]:.0%}" if progress.loss else ""
            show(len(progress.loss), step + 1, note)

        model, progress = train(config, output, start, resume, report)
        show(config.epochs, 0, f"accuracy {progress.accuracy:.2f} %, frozen {progress.frozen[-1]:.0%}")
    return model, progress


def _rows(groups: dict[tuple[str, int], list[Progress]]) -> list[list[str]]:
    """The table: a header, then a row for every method and number of bits."""
    rows = [["", "bits", "accuracy", "of each seed", "updates left out", "backward", "whole run", "against plain"]]
    for (method, bits), runs in groups.items():
        seconds = statistics.median(run.seconds for run in runs)
        plain = groups.get(("qat", bits))
        faster = statistics.median(run.seconds for run in plain) / seconds if plain else None
        rows.append(
            [
                method,
                str(bits),
                f"{statistics.fmean(run.accuracy for run in runs):.2f} %",
                " ".join(f"{run.accuracy:.2f}" for run in runs),
                f"{statistics.fmean(v for run in runs for v in run.eliminated):.1%}",
                f"{statistics.median(sum(run.backward) for run in runs):.2f} s",
                f"{seconds:.2f} s",
                f"{faster:.2f}x" if faster else "",
            ]
        )
    return rows


def _print_table(console: Console, rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title="Which photograph is it? Accuracy, and what freezing leaves out", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right" if name else "left")
    for row in rows[1:]:
        table.add_row(*row)
    table.caption = (
        "Accuracy after the last epoch, mean of the seeds. Backward, whole run: seconds of all steps, median of the "
        "seeds; the whole run against that of plain quantisation-aware training (qat) with as many bits."
    )
    table.caption_justify = "left"
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
