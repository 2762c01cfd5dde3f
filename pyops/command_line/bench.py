"""Measures what each way to compress a layer gains on this machine.

    tersor bench --threads 2
    tersor bench --layers conv:64x56 linear:384x1536x196 --batch 1 8
    tersor bench --model torchvision:resnet18 --size 224 --output bench_resnet18

Each layer is timed in float32 as torch has it, and packed by tersor.compress: with weights and inputs of 8, 4, 2 and 1
bits, with 2 and with 1 of every 4 weights, and with both. The layers are the ones given (conv:CHANNELSxPIXELS is 3x3;
linear:INxOUTxROWS), or those of a model, each kind once. Before it is timed, what a packed layer computes is compared
with the same layer in float32 with rounded or dropped weights. Times are medians over rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from tersor.command_line import networks
from tersor.command_line.bench_layers import WAYS, Case, Result, measure, model_cases
from tersor.command_line.shared import (
    CommandError,
    about,
    add_command,
    between,
    folder,
    make_console,
    make_output,
    markdown_table,
    print_table,
    say,
    training_bar,
    write_page,
)
from tersor.command_line.timing import ROUNDS

TYPICAL = ("conv:64x56", "conv:128x28", "conv:256x14", "conv:512x7", "linear:384x1536x196", "linear:1536x384x196")


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "bench", __doc__, run)
    networks.add_model_options(parser, required=False)
    add = parser.add_argument
    add("--layers", type=_case, nargs="+", help=f"instead of a model's (default {' '.join(TYPICAL)})")
    add("--size", type=between(8, 4096), metavar="PIXELS", help="of the model's images (default what it says)")
    add("--batch", type=between(1, 65536), nargs="+", default=[1, 64], help="images at a time (default 1 64)")
    add("--rounds", type=between(3, 1000), default=ROUNDS, help=f"of which the median is taken (default {ROUNDS})")
    add("--threads", type=between(1, 4096), default=torch.get_num_threads(), help="(default as torch has it)")
    add("--output", type=folder, metavar="FOLDER", help="gets bench.md and bench.json")


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes; returns 1 where a layer's output differs from its counterpart's."""
    if options.model and options.layers:
        options.parser.error("--model and --layers do not go together")
    if options.output:
        make_output(options.parser, options.output)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console, cases = make_console(), _cases(options)
    results: list[Result] = []
    with training_bar(console, "bench", len(cases), len(options.batch)) as show:
        for number, case in enumerate(cases):
            for done, batch in enumerate(options.batch):
                show(number, done, f"{case}, batch {batch}")
                results.append(measure(case, batch, options.rounds))
        show(len(cases), 0, "")
    speed, size, below = _speed_table(results, bool(options.model)), _size_table(results), _below(options)
    ratios = [[*row[:3], *(cell.partition("(")[2].rstrip(")") or cell for cell in row[3:])] for row in speed]
    print_table(console, "Times faster than float32", ratios, "", left=1)
    print_table(console, "MB as stored", size, "", left=1)
    for line in below[1:]:
        say(console, line)
    failed = [f"{each.case}, {way}: {reason}" for each in results for way, reason in each.failed.items()]
    if options.output:
        _write(console, options, results, speed, size, [*below, *failed])
    if failed:
        raise CommandError("; ".join(failed))
    return 0


def _cases(options: argparse.Namespace) -> list[Case]:
    if not options.model:
        return options.layers or [_case(text) for text in TYPICAL]
    source, model = networks.build(options.model, options.option)
    size, channels = options.size or networks.natural_size(model, source.options), networks.input_channels(model)
    networks.check_model(model, channels, size)
    cases = model_cases(model, torch.zeros(1, channels, size, size))
    if not cases:
        raise CommandError(f"{options.model} has no convolutions or linear layers that run")
    return cases


def _case(text: str) -> Case:
    """For argparse."""
    if found := re.fullmatch(r"conv:([1-9]\d{0,4})x([1-9]\d{0,4})", text):
        channels, side = map(int, found.groups())
        return Case("conv", (channels, channels, (3, 3), (1, 1), (1, 1), (1, 1), 1), (channels, side, side))
    if found := re.fullmatch(r"linear:([1-9]\d{0,4})x([1-9]\d{0,4})x([1-9]\d{0,4})", text):
        inputs, outputs, rows = map(int, found.groups())
        return Case("linear", (inputs, outputs), (rows, inputs))
    raise argparse.ArgumentTypeError(f"must be conv:CHANNELSxPIXELS or linear:INxOUTxROWS, got {text!r}")


def _speed_table(results: Sequence[Result], together: bool) -> list[list[str]]:
    """Milliseconds, and in brackets how many times faster than float32; a line for all of a model's layers."""
    rows = [["layer", "batch", "float32", *WAYS]]
    for each in results:
        cells = [_cell(each, way) for way in WAYS]
        times = f"{each.case.count} x " * (each.case.count > 1) + f"{each.case}"
        rows.append([times, str(each.batch), _milliseconds(each.seconds["float32"]), *cells])
    for batch in dict.fromkeys(each.batch for each in results) if together else ():
        part = [each for each in results if each.batch == batch]
        dense = sum(each.case.count * each.seconds["float32"] for each in part)
        row = ["all layers", str(batch), _milliseconds(dense)]
        for way in WAYS:  # a layer that cannot be compressed so stays as it is
            found = sum(each.case.count * each.seconds.get(way, each.seconds["float32"]) for each in part)
            row.append(f"{_milliseconds(found)} ({dense / found:.2f}x)")
        rows.append(row)
    return rows


def _cell(result: Result, way: str) -> str:
    if way in result.failed:
        return "wrong"
    if way not in result.seconds:
        return "-"
    return f"{_milliseconds(result.seconds[way])} ({result.seconds['float32'] / result.seconds[way]:.2f}x)"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _size_table(results: Sequence[Result]) -> list[list[str]]:
    rows = [["layer", "float32", *WAYS]]
    for each in {each.case: each for each in results}.values():
        sizes = [f"{each.bytes[way] / 1e6:.3g}" if way in each.bytes else "-" for way in ("float32", *WAYS)]
        rows.append([str(each.case), *sizes])
    return rows


def _below(options: argparse.Namespace) -> list[str]:
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    return [
        "In brackets how many times faster than float32.",
        f"Milliseconds on the CPU, {threads}. Bits are those of weights and inputs; n:m weights are in float32 unless "
        "bits are given.",
        "-: the layer cannot be compressed so.",
    ]


def _write(
    console: Any,
    options: argparse.Namespace,
    results: Sequence[Result],
    speed: Sequence[Sequence[str]],
    size: Sequence[Sequence[str]],
    below: Sequence[str],
) -> None:
    title = f"What compression gains: {options.model or 'typical layers'}"
    lines = ["", *below, "", "MB as stored:", "", *markdown_table(size)]
    page = write_page(options.output / "bench.md", title, speed, lines)
    path = options.output / "bench.json"
    contents = {"about": about(), "threads": options.threads, "model": options.model and str(options.model)}
    contents["results"] = [each.to_dict() for each in results]
    path.write_text(json.dumps(contents, indent=1) + "\n")
    for written in (page, path):
        say(console, f"  wrote {written}")
