"""Tells what is on images, by a model that ``tersor compress`` wrote.

    tersor infer small/model.safetensors photographs/test/moon --top 3
    tersor infer small/model.safetensors one.jpg two.jpg --json

The file is all that is needed: it says what model it is, its classes, and how images are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tersor import compress
from tersor.command_line.shared import CommandError, add_command, between, make_console, need, print_table

EXTRAS = {"PIL": "pillow", "numpy": "numpy", "safetensors": "safetensors"}


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "infer", __doc__, run)
    add = parser.add_argument
    add("artefact", type=Path, help="the model.safetensors that tersor compress wrote")
    add("images", type=Path, nargs="+", help="files, or folders of which all images are taken")
    add("--top", type=between(1, 1000), default=1, help="classes of each image (default 1)")
    add("--batch-size", type=between(1, 65536), default=64, help="images at a time (default 64)")
    add("--threads", type=between(1, 4096), default=torch.get_num_threads(), help="(default as torch has it)")
    add("--json", action="store_true", help="print a list of JSON")


def run(options: argparse.Namespace) -> None:
    """Prints the classes of every image."""
    need("infer", EXTRAS)
    from tersor.command_line.images import Reading

    torch.set_num_threads(options.threads)
    metadata = compress.read(options.artefact).metadata
    try:
        classes, reading = [str(name) for name in metadata["classes"]], Reading.from_metadata(metadata)
    except (KeyError, TypeError, ValueError):
        raise CommandError(f"{options.artefact}: does not say its classes: it is not by tersor compress") from None
    model = compress.load(options.artefact)
    found = _found(model, reading, _paths(options.images), classes, options)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    rows = [["image", *(f"{what} {place + 1}".replace(" 1", "") for place in range(options.top) for what in WHAT)]]
    for entry in found:
        rows.append([entry["image"], *(text for top in entry["top"] for text in (top["class"], f"{top['share']:.1%}"))])
    rows[0] = rows[0][: len(rows[1])]  # there may be fewer classes
    print_table(make_console(), "", rows, "", left=1)


WHAT = ("class", "share")


def _paths(given: list[Path]) -> list[Path]:
    from tersor.command_line.images import find_images

    paths: list[Path] = []
    for path in given:
        found = find_images(path) if path.is_dir() else [path]
        if not found:
            raise CommandError(f"{path}: the folder has no images")
        paths += found
    return paths


@torch.inference_mode()
def _found(model: Any, reading: Any, paths: list[Path], classes: list[str], options: Any) -> list[dict[str, Any]]:
    """For each image the most likely classes, with the share that a softmax gives them."""
    found = []
    for begin in range(0, len(paths), options.batch_size):
        part = paths[begin : begin + options.batch_size]
        images = torch.stack([reading.read(path) for path in part])
        shares = compress.first_tensor(model(reading.normalized(images))).softmax(1)
        values, places = shares.topk(min(options.top, len(classes)), dim=1)
        for path, row, at in zip(part, values.tolist(), places.tolist(), strict=True):
            top = [{"class": classes[i], "share": value} for value, i in zip(row, at, strict=True)]
            found.append({"image": str(path), "top": top})
    return found
