"""Trains a model on a folder of images, compresses it by a recipe, and says what that costs and saves.

    tersor recipe > recipe.toml
    tersor compress --model resnet20 --data photographs --size 32 --recipe recipe.toml --output small

DATA holds train/CLASS/*.png and test/CLASS/*.png (or val; also jpg, webp, bmp and tif), or one folder for each class,
of which every fifth image, by a hash of its name, is then for testing.

First the dense model is trained, or taken from --checkpoint, and tested. Then it is prepared by the recipe, trained on,
converted to packed layers and saved; the saved one is loaded again and tested. OUTPUT gets it (model.safetensors), the
dense weights (dense.safetensors), a report (report.md, report.json and pictures), and after each epoch the state that
--resume goes on from, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tersor
from tersor.command_line import networks
from tersor.command_line.shared import (
    CommandError,
    add_command,
    between,
    device,
    folder,
    make_console,
    make_output,
    need,
    print_table,
    say,
    training_bar,
)
from tersor.compress import ModelSource, Recipe, convert_, load, save

EXTRAS = {"PIL": "pillow", "numpy": "numpy", "safetensors": "safetensors"}
GIGABYTE = 1024**3


def add(commands: Any) -> None:
    """The command's arguments."""
    parser = add_command(commands, "compress", __doc__, run)
    networks.add_model_options(parser, required=True)
    add = parser.add_argument
    add("--recipe", type=Path, required=True, metavar="FILE", help="which layers become what; see tersor recipe")
    add("--data", type=Path, required=True, metavar="FOLDER", help="of the images")
    add("--output", type=folder, required=True, metavar="FOLDER", help="of all files that are written")
    add("--checkpoint", type=Path, metavar="FILE", help="trained weights to begin with: safetensors, or torch.save's")
    add("--epochs", type=between(1, 100_000), default=10, help="of each of the two trainings (default 10)")
    add("--batch-size", type=between(2, 65536), default=32, help="images per step (default 32)")
    add("--optimizer", choices=("sgd", "adamw"), default="sgd", help="(default sgd, with momentum)")
    add("--learning-rate", type=_positive, help="the highest (default 0.05 for sgd, 0.001 for adamw)")
    add("--weight-decay", type=_not_negative, default=1e-4, help="(default 0.0001)")
    add("--augmentation", choices=("both", "shift", "none"), default="both", help="mirror and shift (default both)")
    add("--size", type=between(8, 4096), metavar="PIXELS", help="of the images' sides (default what the model says)")
    add("--mean", type=float, nargs="+", help="of each channel, from 0 to 1 (default ImageNet's; 0.5 for grey)")
    add("--std", type=_positive, nargs="+", help="of each channel (default ImageNet's; 0.25 for grey)")
    add("--memory", type=_not_negative, default=2.0, metavar="GB", help="for decoded images (default 2)")
    add("--threads", type=between(1, 4096), default=torch.get_num_threads(), help="(default as torch has it)")
    add("--seed", type=between(0, 2**31 - 1), default=0, help="of weights, order and augmentation (default 0)")
    add("--device", type=device, default="cpu", help="that trains: cpu or cuda (default cpu)")
    add("--resume", action="store_true", help="go on from the states in the output folder")


def run(options: argparse.Namespace) -> None:
    """All steps, one after the other."""
    need("compress", EXTRAS)
    from tersor.command_line import images, results, training

    make_output(options.parser, options.output)
    console, output = make_console(), options.output
    torch.set_num_threads(options.threads)
    recipe, listing = read_recipe(options.recipe), images.list_images(options.data)
    torch.manual_seed(options.seed)
    source, model = networks.build(options.model, options.option, len(listing.classes))
    task = _read(console, options, listing, source, model)
    head = networks.load_weights(model, options.checkpoint) if options.checkpoint else []
    configs = {phase: _config(phase, options, source, recipe, listing, task) for phase in ("dense", "compressed")}
    if not options.resume:
        for config in configs.values():
            config.state_file(output).unlink(missing_ok=True)
    _check_recipe(model, recipe)

    found = results.Found(options, source, task, listing)
    if options.checkpoint and not head:
        say(console, f"dense model: the weights of {options.checkpoint}")
        model.to(options.device)
    else:
        if head:
            say(console, f"{options.checkpoint} has other classes: {' and '.join(head)} start anew, and train first")
        found.dense = _train(console, configs["dense"], model, task, output, options.resume)
    found.test_dense(model)
    say(console, f"dense: {found.dense_accuracy:.2f} % of {len(task.test)} test images told right")

    small = copy.deepcopy(model)
    training.prepare(configs["compressed"], small, recipe, task)
    found.compressed = _train(console, configs["compressed"], small, task, output, options.resume)
    found.test_trained(small)
    _save(small.cpu(), output / "model.safetensors", source, task)
    found.measure(model.cpu(), load(output / "model.safetensors"), output)
    rows, caption = found.table()
    print_table(console, f"{source} on {options.data}", rows, "")
    for line in (caption, *found.notes()):
        say(console, line)
    for path in (output / "model.safetensors", output / "dense.safetensors", *found.write(output)):
        say(console, f"  wrote {path}")


def read_recipe(path: Path) -> Recipe:
    """Raises CommandError where it cannot be used."""
    try:
        return Recipe.from_toml(Path(path))
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from None
    except (TypeError, ValueError) as error:
        text = str(error)
        raise CommandError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def _check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Before the first training, not after it."""
    try:
        tersor.compress.prepare_(copy.deepcopy(model), recipe)
    except ValueError as error:
        raise CommandError(f"the recipe does not suit the model: {error}") from None


def _read(console: Any, options: argparse.Namespace, listing: Any, source: ModelSource, model: nn.Module) -> Any:
    """Says what the data are, reads them, and checks that the model takes them."""
    from tersor.command_line.images import GREY, IMAGENET, ImageSet, Reading
    from tersor.command_line.training import Task

    channels, size = networks.input_channels(model), options.size or networks.natural_size(model, source.options)
    mean, std = GREY if channels == 1 else IMAGENET
    reading = Reading(size, channels, tuple(options.mean or mean), tuple(options.std or std))
    networks.check_model(model, channels, size, len(listing.classes))
    say(console, listing.split)
    counts = f"{len(listing.train)} training and {len(listing.test)} test images"
    say(console, f"{len(listing.classes)} classes, {counts}, as {size} x {size} pixels")
    memory = int(options.memory * GIGABYTE)
    needed = (len(listing.train) + len(listing.test)) * channels * size * size
    if needed > memory:
        say(console, f"they would take {needed / GIGABYTE:.1f} GB (--memory): read again for each batch")
        memory = 0
    total = len(listing.train) + len(listing.test)
    with training_bar(console, "reading", 1, total) as show:

        def read(part: Any, before: int) -> ImageSet:
            return ImageSet(part, reading, memory, options.threads, lambda done: show(0, before + done, ""))

        train, test = read(listing.train, 0), read(listing.test, len(listing.train))
    return Task(listing.classes, train, test, reading)


def _config(
    phase: str, options: argparse.Namespace, source: ModelSource, recipe: Recipe, listing: Any, task: Any
) -> Any:
    from tersor.command_line.training import OPTIMIZERS, Config

    names = ("epochs", "batch_size", "optimizer", "weight_decay", "augmentation", "seed", "threads", "device")
    return Config(
        phase,
        model=source.to_dict(),
        recipe=recipe.to_dict() if phase == "compressed" else {},
        data=listing.digest(),
        checkpoint=networks.file_digest(options.checkpoint) if options.checkpoint else "",
        size=task.reading.size,
        mean=list(task.reading.mean),
        std=list(task.reading.std),
        learning_rate=options.learning_rate or OPTIMIZERS[options.optimizer],
        **{name: getattr(options, name) for name in names},
    )


def _train(console: Any, config: Any, model: nn.Module, task: Any, output: Path, resume: bool) -> Any:
    """One training under a progress bar."""
    from tersor.command_line.training import rate, train

    steps = task.steps(config.batch_size)
    with training_bar(console, config.phase, config.epochs, steps) as show:

        def report(progress: Any, step: int, loss: float) -> None:
            done = len(progress.loss)
            now = rate(config, done * steps + step, config.epochs * steps)
            show(done, step + 1, f"loss {loss:.2f}, rate {now:.4f}{_shares(progress)}")

        progress = train(config, model, task, output, resume, report)
        show(config.epochs, 0, f"accuracy {progress.accuracy[-1]:.2f} %{_shares(progress)}")
    return progress


def _shares(progress: Any) -> str:
    shares = {"sparse": progress.sparse, "frozen": progress.frozen}
    return "".join(f", {name} {values[-1]:.0%}" for name, values in shares.items() if values and values[-1])


def _save(model: nn.Module, path: Path, source: ModelSource, task: Any) -> None:
    """Converts the model and writes it with what ``tersor infer`` needs."""
    try:
        model = convert_(model.eval())
    except ValueError as error:
        raise CommandError(f"the trained model cannot be packed: {error}") from None
    reading = task.reading
    metadata = {"classes": list(task.classes), "size": reading.size, "channels": reading.channels}
    metadata |= {"mean": list(reading.mean), "std": list(reading.std), "tersor": tersor.__version__}
    save(model, path, source, metadata)


def _positive(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value
