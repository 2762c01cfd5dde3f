"""What the training commands share: refusals, exit status, and what their tables say of several seeds."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tersor.command_line.shared import (
    StateError,
    about,
    between,
    device,
    folder,
    make_output,
    markdown_table,
    print_table,
    training_bar,
    write_page,
)

__all__ = [
    "PHOTOGRAPHS",
    "StateError",
    "about",
    "between",
    "device",
    "difference",
    "folder",
    "make_output",
    "markdown_table",
    "mean_and",
    "print_table",
    "run_command",
    "training_bar",
    "write_page",
    "write_results",
]

PHOTOGRAPHS = {  # what their commands need: import name and distribution
    "matplotlib": "matplotlib",
    "rich": "rich",
    "safetensors": "safetensors",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


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


def mean_and(values: Sequence[float], spread: float | None = None) -> str:
    """The mean, and the given spread or the standard deviation if there are several values."""
    found = statistics.stdev(values) if spread is None and len(values) > 1 else spread
    return f"{statistics.fmean(values):.2f}" + (f" +- {found:.2f}" if found is not None else "")


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of the seeds' differences, and its standard error; NaN for a single seed."""
    paired = [a - b for a, b in zip(ours, theirs, strict=True)]
    noise = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.nan
    return statistics.fmean(paired), noise


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
