"""What the training commands share: refusals, exit status, and the kinds of their options."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tersor

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


def write_results(path: Path, options: argparse.Namespace, runs: Mapping[str, Sequence[Any]]) -> Path:
    """The machine, the options and the progress (dataclasses) of all runs of each name, as JSON."""
    contents: dict[str, Any] = {"about": about()}
    contents["options"] = {name: value for name, value in vars(options).items() if name not in ("output", "resume")}
    contents |= {name: [vars(run) for run in group] for name, group in runs.items()}
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path


def write_page(path: Path, title: str, rows: Sequence[Sequence[str]], below: Sequence[str]) -> Path:
    """A page of Markdown with the machine, a table whose first row is its header, and the lines below that."""
    line = ", ".join(f"{name} {value}" for name, value in about().items())
    lines = [f"# {title}", "", line, ""]
    lines += [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
    path.write_text("\n".join([*lines, *below]) + "\n")
    return path
