"""Checks this installation: operators of every family and packed models, against the reference in plain torch.

tersor selftest
"""

from __future__ import annotations

import argparse
from typing import Any

from tersor import _selftest
from tersor.command_line.shared import add_command


def add(commands: Any) -> None:
    """The command's arguments."""
    add_command(commands, "selftest", __doc__, run)


def run(options: argparse.Namespace) -> int:
    """Prints all checks; returns 1 where one fails."""
    return 0 if _selftest.run() else 1
