"""The command ``tersor``: one file for each of its subcommands, each with ``add(commands)`` and ``run(options)``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

import tersor
from tersor.command_line import backends, bench, compress, infer, recipe, report, selftest
from tersor.command_line.shared import CommandError, Parser
from tersor.compress import ArtefactError

DESCRIPTION = """Efficient vision models: what runs here, what it gains, and from images to a small fast model.

    tersor backends
    tersor bench --threads 2
    tersor recipe > recipe.toml
    tersor compress --model resnet20 --data photographs --recipe recipe.toml --output small
    tersor infer small/model.safetensors one.png two.png
    tersor selftest
"""


def build_parser() -> Parser:
    """With all subcommands."""
    parser = Parser(prog="tersor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"tersor {tersor.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (backends, bench, compress, infer, recipe, report, selftest):
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status.

    Args:
        arguments: None for those of the process.

    Returns:
        0; 1 for a failure, of which one line on stderr says what it is; 130 after Ctrl-C. Bad usage raises SystemExit
        with status 2.
    """
    options = build_parser().parse_args(arguments)
    name = f"tersor {options.command}"
    try:
        return options.run(options) or 0
    except (CommandError, ArtefactError, ImportError) as error:
        print(f"{name}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {place}{error.strerror or error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        first = str(error).partition(".")[0]
        print(f"{name}: {first}: try a lower --batch-size", file=sys.stderr)
    except KeyboardInterrupt:
        goes_on = f"; the same command with --resume goes on from {options.output}" if "resume" in options else ""
        print(f"\n{name}: interrupted{goes_on}", file=sys.stderr)
        return 130
    return 1
