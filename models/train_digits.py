"""Trains a small DilateFormer on handwritten digits with tersor's attention and with the eager one, and compares them.

    python -m tersor.models.train_digits --output demo

Writes into the output folder a picture (``digits.png``), the figures (``results.json``), the trained model
(``dilateformer_nano_digits.safetensors``) and the state that ``--resume`` goes on from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tersor
from tersor.models._command import between, device, folder, make_output, run_command

if TYPE_CHECKING:
    from rich.console import Console

    from tersor.models._digits import Config, Progress

EXTRAS = {"matplotlib": "matplotlib", "rich": "rich", "safetensors": "safetensors", "sklearn": "scikit-learn"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the process's exit status."""
    return run_command("train_digits", EXTRAS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """Both trainings, the comparison, the checkpoint, the table and the picture."""
    from rich.console import Console

    from tersor.models import _digits, _digits_measure, _digits_plot

    console, output = Console(), options.output
    configs = {name: _config(name, options) for name in _digits.ATTENTION}
    if not options.resume:
        for config in configs.values():
            config.state_file(output).unlink(missing_ok=True)
    _say_what_runs(console, options)
    progress = {name: _train(console, config, output, options.resume) for name, config in configs.items()}
    with console.status("measuring the attention alone"):
        kernels = _digits_measure.measure_kernels(options.device)
        memory = {name: _digits_measure.step_memory(config) for name, config in configs.items()}

    data = _digits.digits(options.device)
    model = _digits.load_trained(configs["tersor"], output)
    logits = _digits.evaluate(model, data.test_images)
    checkpoint = output / "dilateformer_nano_digits.safetensors"
    _digits.save_model(checkpoint, model, progress["tersor"].accuracy[-1])
    reloaded = _digits.load_model(checkpoint).to(options.device)
    if not torch.equal(_digits.evaluate(reloaded, data.test_images), logits):
        raise RuntimeError(f"the model reloaded from {checkpoint} predicts something else")

    _print_table(console, progress, memory, kernels)
    _write_results(output / "results.json", options, progress, memory, kernels)
    samples = _digits_plot.choose_samples(data.test_images, data.test_labels, logits.argmax(1))
    _digits_plot.draw(output / "digits.png", progress, kernels, samples)
    console.print(f"The reloaded model gives the same logits for all {len(logits)} test digits.", highlight=False)
    for path in (checkpoint, output / "results.json", output / "digits.png"):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    from tersor.models._digits import TRAINING_IMAGES

    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_digits", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(1, 10_000), default=12, help="passes over the 1347 training digits (default 12)")
    add("--batch-size", type=between(2, TRAINING_IMAGES), default=64, help="digits per step (default 64)")
    add("--seed", type=between(0, 2**31 - 1), default=0, help="of weights, order and augmentation (default 0)")
    # One thread by default: the same figures on every machine, and no threads that wait for each other on a busy one.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add("--output", type=folder, default=Path("demo"), help="folder of all files (default demo)")
    add("--resume", action="store_true", help="go on from the state in the output folder")
    add("--device", type=device, default="cpu", help="cpu (default), cuda or cuda:N")
    options = parser.parse_args(arguments)
    make_output(parser, options.output)
    return options


def _config(name: str, options: argparse.Namespace) -> Config:
    from tersor.models._digits import Config

    return Config(name, options.epochs, options.batch_size, options.seed, options.threads, options.device)


def _say_what_runs(console: Console, options: argparse.Namespace) -> None:
    kind = torch.device(options.device).type
    console.print(
        f"torch {torch.__version__}, {options.device}, threads: {options.threads}, seed: {options.seed}",
        highlight=False,
    )
    for choice in tersor.backends():
        if choice.operator.startswith("dilated_attention") and choice.device == kind:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
            console.print(f"{choice.operator} on {kind} runs [bold]{choice.runs}[/] ({reasons})", highlight=False)


def _train(console: Console, config: Config, output: Path, resume: bool) -> Progress:
    """One run under a progress bar."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from tersor.models._digits import steps_per_epoch, train

    steps = steps_per_epoch(config.batch_size)
    columns = (
        TextColumn("[bold]{task.description:<6}"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}  test accuracy {task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(
            config.attention, total=config.epochs * steps, epoch=0, epochs=config.epochs, accuracy="  -  "
        )

        def show(progress: Progress, done: int) -> None:
            accuracy = f"{progress.accuracy[-1]:.2%}" if progress.accuracy else "  -  "
            bar.update(task, completed=done, epoch=min(progress.epoch + 1, config.epochs), accuracy=accuracy)

        progress = train(config, output, resume, lambda now, step: show(now, now.epoch * steps + step + 1))
        show(progress, config.epochs * steps)
    return progress


def _print_table(
    console: Console, progress: dict[str, Progress], memory: dict[str, int | None], kernels: dict[str, Any]
) -> None:
    from rich.table import Table

    table = Table(title="Handwritten digits, 1347 to train and 450 to test", title_justify="left")
    for name in ("", "tersor", "eager", "eager / tersor"):
        table.add_column(name, justify="left" if not name else "right")
    runs = [progress["tersor"], progress["eager"]]
    table.add_row("test accuracy", *(f"{run.accuracy[-1]:.2%}" for run in runs), "")
    _add_row(table, "training step, median", [1e3 * run.median_step for run in runs], "ms")
    _add_row(table, "peak tensor memory of a step", [_mega(memory[name]) for name in kernels], "MB", end_section=True)
    for kind in ("forward", "forward + backward"):
        _add_row(table, f"attention alone, {kind}", [1e3 * kernel[kind] for kernel in kernels.values()], "ms")
    peaks = [_mega(kernel["peak bytes"]) for kernel in kernels.values()]
    _add_row(table, "attention alone, peak tensor memory", peaks, "MB")
    table.caption = (
        "Times: medians after warm-up of forward + backward + update. Tensor memory: what torch allocated on top of "
        "what was there, for forward + backward. Attention alone: stage 1 of DilateFormer-T, batch 4, 56 x 56, "
        "3 heads of 24, float32."
    )
    table.caption_justify = "left"
    console.print(table)


def _add_row(table: Any, title: str, values: list[float | None], unit: str, end_section: bool = False) -> None:
    ours, theirs = values
    cells = ["not measured" if value is None else f"{value:.3g} {unit}" for value in values]
    ratio = f"{theirs / ours:.3g}x" if ours and theirs else ""
    table.add_row(title, *cells, ratio, end_section=end_section)


def _mega(number: float | None) -> float | None:
    return None if number is None else number / 1e6


def _write_results(
    path: Path,
    options: argparse.Namespace,
    progress: dict[str, Progress],
    memory: dict[str, int | None],
    kernels: dict[str, Any],
) -> None:
    kind = torch.device(options.device).type
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "resume")},
        "backends": {choice.operator: choice.runs for choice in tersor.backends() if choice.device == kind},
    }
    for name, done in progress.items():
        results[name] = {
            "test accuracy": done.accuracy,
            "test loss": done.test_loss,
            "train loss": done.train_loss,
            "median step seconds": done.median_step,
            "step peak bytes": memory[name],
            "attention alone": kernels[name],
        }
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
