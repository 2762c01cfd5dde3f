"""Says what each layer of a compressed model takes, from its file.

    tersor report small/model.safetensors

Multiply-adds are those of one image, dense.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tersor import compress
from tersor.command_line.shared import add_command


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "report", __doc__, run)
    parser.add_argument("artefact", type=Path, help="a file that tersor compress or tersor.compress.save wrote")


def run(options: argparse.Namespace) -> None:
    """Prints the table of an artefact's layers."""
    found = compress.read(options.artefact)
    model = compress.load(options.artefact)
    example: tuple[torch.Tensor, ...] = ()
    if {"channels", "size"} <= set(found.metadata):  # those that tersor compress writes
        size = int(found.metadata["size"])
        example = (torch.zeros(1, int(found.metadata["channels"]), size, size),)
    print(f"{found.source}: {options.artefact.stat().st_size:,} bytes")
    print(compress.report(model, *example))
