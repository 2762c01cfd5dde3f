"""What the training commands share: refusals, exit status, and the kinds of their options."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tersor

if TYPE_CHECKING:
    from rich.console import Console

PHOTOGRAPHS = {  # what their commands need: import name and distribution
    "matplotlib": "matplotlib",
    "rich": "rich",
    "safetensors": "safetensors",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


class StateError(ValueError):
    """A state file that cannot be used; the message says why and what to do."""


def run_command(
    name: str,
    extras: Mapping[str, str],
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Runs a training command; returns the process's exit status.

    Args:
        name: of the command, for its messages.
        extras: the modules that it needs, and the distributions that have them.
        parse: arguments to options, with ``output`` among them.
        run: does the work.
        arguments: None for those of the process.
    """
    if missing := [distribution for module, distribution in extras.items() if importlib.util.find_spec(module) is None]:
        print(f'{name} needs {", ".join(missing)}: pip install "tersor[demo]"', file=sys.stderr)
        return 1
    options = parse(arguments)
    try:
        run(options)
    except StateError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command with --resume goes on from {options.output}", file=sys.stderr)
        return 130
    return 0


def make_output(parser: argparse.ArgumentParser, output: Path) -> None:
    """Makes the output folder, or ends with an error that says why it cannot be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        parser.error(f"--output: cannot write to {output}: {error.strerror}")


def between(low: int, high: int) -> Any:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return value

    return whole_number


def folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, not a folder")
    return path


def device(text: str) -> str:
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return str(found)


@contextlib.contextmanager
def training_bar(
    console: Console, title: str, epochs: int, iterations: int
) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar; what it yields is called with the epoch's number, the steps of it that are done, and a note."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("[bold]{task.description:<24}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]:>2}/{task.fields[epochs]}  {task.fields[note]:<30}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=epochs * iterations, epoch=0, epochs=epochs, note="")

        def show(epoch: int, steps: int, note: str) -> None:
            bar.update(task, completed=epoch * iterations + steps, epoch=min(epoch + 1, epochs), note=note)

        yield show


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]], caption: str) -> None:
    """The first row is the header."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, justify="right" if name else "left")
    for row in rows[1:]:
        table.add_row(*row)
    table.caption, table.caption_justify = caption, "left"
    console.print(table)


def mean_and(values: Sequence[float], spread: float | None = None) -> str:
    """The mean, and the given spread or the standard deviation if there are several values."""
    found = statistics.stdev(values) if spread is None and len(values) > 1 else spread
    return f"{statistics.fmean(values):.2f}" + (f" +- {found:.2f}" if found is not None else "")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the seeds' differences, and its standard error; NaN for a single seed."""
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    noise = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    return statistics.fmean(paired), noise


def median_milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Of each call. All take turns, so that a disturbance of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()  # warms up
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def about() -> dict[str, str]:
    """Machine, date, versions, commit."""
    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    models = [line for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": done.stdout.strip() if done.returncode == 0 else "unknown",
        "processor": models[0].partition(":")[2].strip() if models else platform.machine(),
        "torch": torch.__version__,
        "tersor": tersor.__version__,
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def write_results(
    path: Path,
    options: argparse.Namespace,
    runs: Mapping[str, Sequence[Any]],
    more: Mapping[str, Any] | None = None,
) -> Path:
    """As JSON: the machine, the options, what else there is, the progress (dataclasses) of all runs of each name."""
    contents: dict[str, Any] = {"about": about()}
    contents["options"] = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    contents |= more or {}
    contents |= {name: [vars(run) for run in group] for name, group in runs.items()}
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path


def write_page(path: Path, title: str, rows: Sequence[Sequence[str]], below: Sequence[str]) -> Path:
    """A page of Markdown with the machine, a table whose first row is its header, and the lines below that."""
    line = ", ".join(f"{name} {value}" for name, value in about().items())
    lines = [f"# {title}", "", line, ""]
    path.write_text("\n".join([*lines, *markdown_table(rows), *below]) + "\n")
    return path


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; the first row is the header."""
    return [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
