"""Trains N:M sparse networks by learned combinations (LBC) with full and with compact scores: memory and accuracy.

    python -m tersor.models.train_compact_scores --output demo_compact

From the same initial weights and on the same batches, for every pattern: a network all of whose scores stay stored, as
published, and networks whose schedule drops for good what an epoch has removed, storing less each time a share of the
scores is left. Writes a table (``compact.md``), all figures (``compact.json``) and a picture (``compact.png``). Needs
the extra ``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from tersor.models.train_sparsity import nm_pattern

if TYPE_CHECKING:
    from rich.console import Console

    from tersor.models._compact_train import Found
    from tersor.models._sparsity_train import Config

FULL = "full"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_compact_scores", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the table, the figures and the picture."""
    from rich.console import Console

    from tersor.models import _compact_plot
    from tersor.models._sparsity_train import Config

    console, output = Console(), options.output
    shared = ("epochs", "iterations", "batch_size", "width", "test_patches", "threads")
    common = {name: getattr(options, name) for name in shared}
    kinds = {FULL: None} | {f"share {share:g}": share for share in options.shares}
    groups: dict[str, dict[str, list[Found]]] = {p: {kind: [] for kind in kinds} for p in options.patterns}
    for seed in range(options.seeds):
        for pattern, found in groups.items():
            for kind, share in kinds.items():
                config = Config("lbc", pattern, seed, **common, share=share)
                found[kind].append(_train(console, config, kind))
    rows = _rows(groups)
    print_table(console, TITLE, rows, CAPTION)
    named = {f"{p} {kind}": runs for p, found in groups.items() for kind, runs in found.items()}
    written = [
        write_results(output / "compact.json", options, named),
        write_page(output / "compact.md", TITLE, rows, ["", CAPTION, "", "![bytes per weight](compact.png)"]),
        _compact_plot.draw(output, groups),
    ]
    for path in written:
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_compact_scores", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(2, 10_000), default=20, help="of every run (default 20)")
    add("--iterations", type=between(1, 1_000_000), default=80, help="steps per epoch (default 80)")
    add("--batch-size", type=between(2, 4096), default=32, help="patches per step (default 32)")
    add("--width", type=between(1, 512), default=32, help="channels of the first stage (default 32)")
    default = ["2:4", "4:8", "1:16", "2:8"]
    add("--patterns", type=nm_pattern, nargs="+", default=default, help="(default 2:4 4:8 1:16 2:8)")
    add("--shares", type=float, nargs="+", default=[0.5, 1.0], help="of NMSchedule (default 0.5 1)")
    add("--seeds", type=between(1, 100), default=2, help="runs of everything (default 2)")
    add("--test-patches", type=between(1, 4096), default=1024, help="of each photograph (default 1024)")
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add("--output", type=folder, default=Path("demo_compact"), help="folder of all files (default demo_compact)")
    options = parser.parse_args(arguments)
    options.patterns, options.shares = list(dict.fromkeys(options.patterns)), list(dict.fromkeys(options.shares))
    for each in options.patterns:
        if options.width % int(each.partition(":")[2]):
            parser.error(f"--width must be a multiple of m for --patterns {each}, got {options.width}")
    for share in options.shares:
        if not 0 <= share <= 1:
            parser.error(f"--shares must be from 0 to 1, got {share}")
    make_output(parser, options.output)
    return options


def _train(console: Console, config: Config, kind: str) -> Found:
    """One run under a progress bar."""
    from tersor.models._compact_train import train

    with training_bar(console, f"{config.pattern} {kind} seed {config.seed}", config.epochs, config.iterations) as show:
        found = train(config, lambda epoch, step: show(epoch, step + 1, ""))
        show(config.epochs, 0, f"accuracy {found.accuracy:.2f} %, {statistics.fmean(found.bytes):.1f} bytes per weight")
    return found


def _rows(groups: Mapping[str, Mapping[str, Sequence[Found]]]) -> list[list[str]]:
    """The table: a header, then a row for every pattern and way to store."""
    rows = [
        ["pattern", "scores", "bytes, first", "mean", "last", "scores of a group", "returned", "accuracy (%)", "- full"]
    ]
    for name, kinds in groups.items():
        for kind, runs in kinds.items():
            sizes = runs[0].bytes
            scores = [run.accuracy for run in runs]
            ahead = ""
            if kind != FULL:
                mean, noise = difference(scores, [run.accuracy for run in kinds[FULL]])
                ahead = f"{mean:+.2f} +- {noise:.2f}" if len(runs) > 1 else f"{mean:+.2f}"
            returned = [max(run.returned) for run in runs if run.returned]
            rows.append(
                [
                    name,
                    kind,
                    f"{sizes[0]:.1f}",
                    f"{statistics.fmean(sizes):.1f}",
                    f"{sizes[-1]:.2f}",
                    " ".join(map(str, dict.fromkeys(runs[0].stored))),
                    f"{max(returned):.2%}" if returned else "",
                    mean_and(scores),
                    ahead,
                ]
            )
    return rows


TITLE = "Compact scores: what LBC's scores take over a training run"
CAPTION = (
    "Bytes per N:M weight of the scores, their gradients, the optimiser's momentum of them and, compact, their "
    "numbers: at the end of the first epoch, mean of all epochs, of the last. Scores are frozen at half of the epochs "
    "and have no gradient from then on. Scores of a group: how many are stored, one after the other. Returned, of full "
    "scores: the largest share of groups that at the end of an epoch keep a combination which was removed up to its "
    "start, which compact scores rule out. Accuracy: mean and standard deviation of the seeds; - full: mean of their "
    "differences and its standard error."
)


if __name__ == "__main__":
    sys.exit(main())
