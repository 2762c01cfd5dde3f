"""What all commands share: refusals, kinds of options, what is printed and written, and what machine it was."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import tersor


class CommandError(ValueError):
    """Something that the user can put right; the message, in one line, is all that is printed."""


class StateError(CommandError):
    """A state file that cannot be used; the message says why and what to do."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, module_doc: str | None, run: Callable[[Any], int | None]) -> Parser:
    """A subcommand whose help is the module's docstring: the first line in the list of commands, all on its page."""
    text = module_doc or ""
    first = text.partition("\n")[0]
    parser: Parser = commands.add_parser(
        name, help=first, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def need(command: str, extras: Mapping[str, str]) -> None:
    """Raises CommandError where modules (with the distributions that have them) are not installed."""
    if missing := [distribution for module, distribution in extras.items() if importlib.util.find_spec(module) is None]:
        raise CommandError(f'tersor {command} needs {", ".join(missing)}: pip install "tersor[command-line]"')


def make_output(parser: argparse.ArgumentParser, output: Path) -> None:
    """Makes the output folder, or ends with an error that says why it cannot be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        parser.error(f"--output: cannot write to {output}: {error.strerror}")


def between(low: int, high: int) -> Any:
    """For argparse: a whole number of that range."""

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
    """For argparse: a folder, which need not be there yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, not a folder")
    return path


def device(text: str) -> str:
    """For argparse: a device that torch has here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return str(found)


class PlainConsole:
    """Prints where rich is not installed."""

    def print(self, text: object = "", **_: Any) -> None:
        print(text, flush=True)


def make_console() -> Any:
    """rich's console, or a plain one."""
    if importlib.util.find_spec("rich") is None:
        return PlainConsole()
    from rich.console import Console

    return Console()


def say(console: Any, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def training_bar(console: Any, title: str, epochs: int, iterations: int) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar; what it yields is called with the epoch's number, the steps of it that are done, and a note.

    Without rich it is a line for every epoch.
    """
    if isinstance(console, PlainConsole):
        seen = -1

        def line(epoch: int, steps: int, note: str) -> None:
            nonlocal seen
            if epoch != seen:
                console.print(f"{title}: epoch {min(epoch + 1, epochs)}/{epochs}  {note}")
            seen = epoch

        yield line
        return
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


def print_table(console: Any, title: str, rows: Sequence[Sequence[str]], caption: str, left: int = 0) -> None:
    """The first row is the header; columns without a name and the first ``left`` ones are aligned to the left."""
    if isinstance(console, PlainConsole):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        console.print("\n".join([title, *lines, *([caption] if caption else [])]))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, padding=0, pad_edge=False)
    for number, name in enumerate(rows[0]):
        table.add_column(Text(name), justify="right" if name and number >= left else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    if caption:
        table.caption, table.caption_justify = Text(caption), "left"
    console.print(table)


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


def write_page(path: Path, title: str, rows: Sequence[Sequence[str]], below: Sequence[str]) -> Path:
    """A page of Markdown with the machine, a table whose first row is its header, and the lines below that."""
    line = ", ".join(f"{name} {value}" for name, value in about().items())
    lines = [f"# {title}", "", line, ""]
    path.write_text("\n".join([*lines, *markdown_table(rows), *below]) + "\n")
    return path


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; the first row is the header."""
    return [f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]
