"""Prints an example recipe, or says which layers of a model a recipe changes and why not the others.

    tersor recipe > recipe.toml
    tersor recipe --check recipe.toml --model torchvision:resnet18

A recipe is a file of TOML, see tersor.compress.Recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from tersor import compress
from tersor.command_line import networks
from tersor.command_line.compress import read_recipe
from tersor.command_line.shared import CommandError, add_command, make_console, print_table

EXAMPLE = """\
# A recipe: which layers of a model become what. The last rule that matches a layer holds for it.
# The first and the last layer stay as they are unless a rule names them, or these say otherwise.
skip_first = true
skip_last = true

# Convolutions and linear layers: weights and inputs of 4 bits, 2 of every 4 weights, and what has settled is frozen.
[[rule]]
layers = ["*"]
FakeQuantize = { bits = 4, method = "lts" }  # also input_bits; methods: lsq, ddtb, lts
NMSparse = { n = 2, m = 4 }                  # also method = "srste", end, decay
Freeze = {}                                  # only with method "lts"; also warmup, granularity, tile

# Other ways, for layers by name; * stands for anything:
#
# [[rule]]
# layers = ["*.downsample.*", "head"]
# FakeQuantize = { bits = 8 }
#
# [[rule]]
# layers = ["layer4.*"]
# exclude = ["layer4.0.*"]
# Binarize = { method = "recu" }
"""


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "recipe", __doc__, run)
    parser.add_argument("--check", type=Path, metavar="FILE", help="a recipe, to be tried on --model")
    networks.add_model_options(parser, required=False)


def run(options: argparse.Namespace) -> None:
    """Prints the example, or what a recipe changes in a model."""
    if (options.check is None) != (options.model is None):
        options.parser.error("--check and --model go together")
    if options.check is None:
        print(EXAMPLE, end="")
        return
    recipe = read_recipe(options.check)
    source, model = networks.build(options.model, options.option)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    try:
        compression: Any = compress.prepare_(model, recipe).get_submodule("compression")
    except ValueError as error:
        raise CommandError(f"{options.check}: {error}") from None
    rows = [["layer", "becomes", "stays, because"]]
    for name in [*names, *(compression.applied.keys() - set(names))]:
        becomes = ", ".join(map(str, compression.applied.get(name, ())))
        rows.append([name, becomes, "" if becomes else compression.skipped.get(name, "no rule matches it")])
    print_table(make_console(), f"{source}: {len(compression.applied)} layers change", rows, "", left=3)
