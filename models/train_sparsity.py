"""Trains N:M sparse networks on photographs' textures with LBC and with SR-STE, packs them, and compares.

    python -m tersor.models.train_sparsity --output demo_sparsity

From the same initial weights and on the same batches: a dense network, and for every pattern one whose weights SR-STE
chooses by magnitude and one for which LBC learns the combinations. The sparse ones are packed, written, read back and
tested again. Writes a table (``results.md``), all figures (``results.json``), a picture (``sparsity.png``), the
models, and the states that ``--resume`` goes on from. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tersor.models._command import (
    PHOTOGRAPHS,
    between,
    difference,
    folder,
    make_output,
    print_table,
    run_command,
    training_bar,
    write_page,
    write_results,
)
from tersor.sparsity.nm_pattern import check_pattern

if TYPE_CHECKING:
    from rich.console import Console

    from tersor.models._sparsity_train import Config, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_sparsity", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the table, the results and the picture."""
    from rich.console import Console

    from tersor.models import _sparsity_plot, _textures
    from tersor.models._sparsity_train import Config

    console, output = Console(), options.output
    shared = ("epochs", "iterations", "batch_size", "width", "test_patches", "threads")
    common = {name: getattr(options, name) for name in shared}
    console.print(
        f"torch {torch.__version__}, cpu, threads: {options.threads}; {len(_textures.NAMES)} photographs, "
        f"{options.test_patches} test patches of each",
        highlight=False,
    )
    kinds = [("dense", ""), *((method, pattern) for pattern in options.patterns for method in ("srste", "lbc"))]
    groups: dict[tuple[str, str], list[Progress]] = {kind: [] for kind in kinds}
    for seed in range(options.seeds):
        for method, pattern in kinds:
            config = Config(method, pattern, seed, **common)
            groups[method, pattern].append(_train(console, config, output, options.resume))
    rows = _rows(groups, options.test_patches * len(_textures.NAMES))
    title = "Which photograph is it? N:M sparse networks, and what they take"
    print_table(console, title, [row[:PRINTED] for row in rows], CAPTION)
    named = {f"{method} {pattern}".strip(): runs for (method, pattern), runs in groups.items()}
    steps = f"{CAPTION} Steps: seconds of all training steps, median of the seeds."
    below = ["", steps, "", "![accuracy and size](sparsity.png)"]
    title = "N:M sparsity: LBC and SR-STE"
    written = [
        write_results(output / "results.json", options, named),
        write_page(output / "results.md", title, rows, below),
    ]
    for path in (*written, *_sparsity_plot.draw(output, groups)):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_sparsity", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(2, 10_000), default=20, help="of every run (default 20)")
    add("--iterations", type=between(1, 1_000_000), default=160, help="steps per epoch (default 160)")
    add("--batch-size", type=between(2, 4096), default=32, help="patches per step (default 32)")
    add("--width", type=between(1, 512), default=32, help="channels of the first stage (default 32)")
    add("--patterns", type=nm_pattern, nargs="+", default=["2:4", "1:4", "1:16"], help="(default 2:4 1:4 1:16)")
    add("--seeds", type=between(1, 100), default=3, help="runs of everything (default 3)")
    add("--test-patches", type=between(1, 4096), default=1024, help="of each photograph (default 1024)")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add("--output", type=folder, default=Path("demo_sparsity"), help="folder of all files (default demo_sparsity)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    options.patterns = list(dict.fromkeys(options.patterns))
    for pattern in options.patterns:
        if options.width % int(pattern.partition(":")[2]):
            parser.error(f"--width must be a multiple of m for --patterns {pattern}, got {options.width}")
    make_output(parser, options.output)
    return options


def nm_pattern(text: str) -> str:
    try:
        n, m = (int(part) for part in text.split(":"))
        check_pattern("--patterns", n, m)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be like 2:4, got {text!r} ({error})") from None
    return f"{n}:{m}"


def _train(console: Console, config: Config, output: Path, resume: bool) -> Progress:
    """One run under a progress bar."""
    from tersor.models._sparsity_train import train

    title = " ".join(filter(None, (config.method, config.pattern, f"seed {config.seed}")))
    with training_bar(console, title, config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"loss {progress.loss[-1]:.2f}, weights kept {progress.kept[-1]:.0%}" if progress.loss else ""
            show(len(progress.loss), step + 1, note)

        _, progress = train(config, output, resume, report)
        show(config.epochs, 0, f"accuracy {progress.accuracy:.2f} %, kept {progress.kept[-1]:.0%}")
    return progress


def _rows(groups: dict[tuple[str, str], list[Progress]], patches: int) -> list[list[str]]:
    """The table: a header, then a row for every method and pattern."""
    header = ["", "pattern", "accuracy (%)", "LBC - SR-STE", "packed same", "logits", "bytes", "of dense"]
    rows = [[*header, "of each seed (%)", "steps"]]
    for (method, pattern), runs in groups.items():
        found = [run.accuracy for run in runs]
        spread = f" +- {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        ahead = ""
        if method == "lbc":
            mean, noise = difference(found, [run.accuracy for run in groups["srste", pattern]])
            ahead = f"{mean:+.2f}" + ("" if math.isnan(noise) else f" +- {noise:.2f}")
        packed = [f"{sum(run.same for run in runs)}/{patches * len(runs)}", f"{max(run.gap for run in runs):.0e}"]
        rows.append(
            [
                method,
                pattern,
                f"{statistics.fmean(found):.2f}{spread}",
                ahead,
                *(packed if pattern else ["", ""]),
                str(runs[0].bytes),
                f"{runs[0].bytes / groups['dense', ''][0].bytes:.1%}",
                " ".join(f"{value:.2f}" for value in found),
                f"{statistics.median(sum(run.seconds) for run in runs):.1f} s",
            ]
        )
    return rows


PRINTED = 8  # columns of the table on the screen; the page has all
CAPTION = (
    "Accuracy: mean and standard deviation of the seeds. LBC - SR-STE: mean of the seeds' differences and its standard "
    "error. Packed same: test patches that the packed model, read from its file, puts into the same class as the "
    "trained one; logits: their largest difference. Bytes: of the model's file in float32."
)


if __name__ == "__main__":
    sys.exit(main())
