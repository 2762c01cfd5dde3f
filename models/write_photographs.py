"""Writes patches of ten photographs as a folder of images, for commands that train on one.

    python -m tersor.models.write_photographs photographs
    tersor compress --model resnet20 --data photographs --size 24 --recipe recipe.toml --output small

The photographs come with scikit-image and scikit-learn: nothing is downloaded. Each is a class; its test patches are
from other places than its training patches. Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from tersor.models._command import PHOTOGRAPHS, between, folder, make_output, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("write_photographs", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Writes ``train/CLASS/NUMBER.png`` and ``test/CLASS/NUMBER.png``; always the same for the same numbers."""
    from PIL import Image

    from tersor.models import _textures

    for part, count in (("train", options.train), ("test", options.test)):
        generator = torch.Generator().manual_seed(count + 100_003 * (part == "test"))
        for name, picture in zip(_textures.NAMES, _textures.pictures(), strict=True):
            target = options.output / part / name
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.png"):
                old.unlink()
            corners = getattr(picture, part)
            for number in range(count):
                patch = _textures.cut(picture.values, corners, _textures.CELL, options.size, generator)
                values = (_textures.evened(patch) / 4 + 0.5).clamp(0, 1) * _textures.PEAK
                Image.fromarray(values.round().to(torch.uint8).numpy()).save(target / f"{number:04d}.png")
    total = len(_textures.NAMES) * (options.train + options.test)
    print(f"wrote {total} images of {len(_textures.NAMES)} photographs into {options.output}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from tersor.models._textures import CELL, PATCH

    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.write_photographs", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("output", type=folder, help="gets train/CLASS and test/CLASS")
    add("--train", type=between(1, 9999), default=200, help="patches of each photograph (default 200)")
    add("--test", type=between(1, 9999), default=100, help="likewise (default 100)")
    add("--size", type=between(8, CELL), default=PATCH, help=f"pixels of a side (default {PATCH})")
    options = parser.parse_args(arguments)
    make_output(parser, options.output)
    return options


if __name__ == "__main__":
    sys.exit(main())
