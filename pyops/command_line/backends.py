"""Says what every operator runs on here, and why not on something faster.

    tersor backends
    tersor backends --json

The environment switches that change it are in docs/environment.md.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import tersor
from tersor.command_line.shared import add_command


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "backends", __doc__, run)
    parser.add_argument("--json", action="store_true", help="print a list of JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the table, or JSON."""
    found = tersor.backends()
    print(json.dumps([choice._asdict() for choice in found], indent=1) if options.json else found)
