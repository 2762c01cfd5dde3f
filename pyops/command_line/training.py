"""The two trainings of ``tersor compress``, dense and compressed, which go on bit for bit from their state files."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import compress
from tersor.command_line.images import ImageSet, Reading, augment
from tersor.command_line.shared import CommandError
from tersor.command_line.state import load_state, save_state

OPTIMIZERS = {"sgd": 0.05, "adamw": 1e-3}  # and their learning rates, if none is given
AUGMENTATIONS = ("both", "shift", "none")
MOMENTUM, SMOOTHING = 0.9, 0.1
WARM_UP = 0.05  # share of the steps
TESTED = 256  # images at a time, at most, without a gradient


@dataclasses.dataclass(frozen=True)
class Config:
    """One training, of what JSON can hold; everything that its result depends on."""

    phase: str  # "dense" or "compressed"
    model: dict[str, Any]
    recipe: dict[str, Any]  # empty for the dense one
    data: str  # what list_images found, as a digest
    checkpoint: str  # likewise
    size: int
    epochs: int
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    augmentation: str
    mean: list[float]
    std: list[float]
    seed: int
    threads: int
    device: str

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.phase}.safetensors"


@dataclasses.dataclass
class Progress:
    """What a training has done so far; one entry per epoch."""

    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)  # of the test images, in percent
    sparse: list[float] = dataclasses.field(default_factory=list)  # share of all weights
    frozen: list[float] = dataclasses.field(default_factory=list)  # likewise
    seconds: list[float] = dataclasses.field(default_factory=list)  # of all steps


@dataclasses.dataclass(frozen=True)
class Task:
    """The data of all trainings."""

    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    reading: Reading

    def batch_size(self, wanted: int) -> int:
        return min(wanted, len(self.train))

    def steps(self, batch_size: int) -> int:
        """Of an epoch: the last, smaller batch is left out, so that all steps do the same work."""
        return len(self.train) // self.batch_size(batch_size)


class Run:
    """Model and optimiser of one training, and how they go through an epoch."""

    def __init__(self, config: Config, model: nn.Module, task: Task) -> None:
        self.config, self.model, self.task = config, model.to(config.device), task
        self.steps = task.steps(config.batch_size)
        groups = compress.parameter_groups(model, config.weight_decay)
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, config.learning_rate, momentum=MOMENTUM)
        else:
            self.optimizer = torch.optim.AdamW(groups, config.learning_rate)

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int, float], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, task, model = self.config, self.task, self.model
        seed = config.seed * 100_003 + 2 * epoch + (config.phase == "compressed")
        torch.manual_seed(seed)  # of dropout
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(task.train), generator=generator)
        model.train()
        losses, begin = [], time.perf_counter()
        for step, index in enumerate(order[: self.steps * task.batch_size(config.batch_size)].chunk(self.steps)):
            self._set_rate(epoch * self.steps + step)
            images = augment(task.train.take(index.tolist()), config.augmentation, generator)
            losses.append(self._step(images, task.train.labels[index]))
            report(step, losses[-1])
        progress.seconds.append(time.perf_counter() - begin)
        progress.loss.append(statistics.fmean(losses))
        logits = predict(model, task.test, task.reading, config.device)
        progress.accuracy.append(accuracy(logits, task.test.labels))
        total = compress.report(model).total if config.phase == "compressed" else None
        progress.sparse.append(total.sparsity if total else 0.0)
        progress.frozen.append(total.frozen if total else 0.0)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        device = self.config.device
        input = self.task.reading.normalized(images.to(device))
        loss = F.cross_entropy(compress.first_tensor(self.model(input)), labels.to(device), label_smoothing=SMOOTHING)
        value = loss.item()
        if not math.isfinite(value):
            raise CommandError(f"the loss has become {value}: try a lower --learning-rate")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.config.phase == "compressed":
            compress.step(self.model)
        return value

    def _set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.config, step, self.config.epochs * self.steps)


def rate(config: Config, step: int, steps: int) -> float:
    """Up along a line, down along a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    return config.learning_rate * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


@torch.no_grad()
def predict(model: nn.Module, images: ImageSet, reading: Reading, device: str = "cpu") -> Tensor:
    """Logits ``(N, classes)`` of all images in eval mode, on the CPU."""
    model.eval()
    found = []
    for index in torch.arange(len(images)).split(TESTED):
        output = compress.first_tensor(model(reading.normalized(images.take(index.tolist()).to(device))))
        found.append(output.float().cpu())
    return torch.cat(found)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def prepare(config: Config, model: nn.Module, recipe: compress.Recipe, task: Task) -> None:
    """Prepares the model by the recipe and sets the first bounds on training images.

    Raises:
        CommandError: the recipe does not suit the model.
    """
    torch.manual_seed(config.seed)
    try:
        compress.prepare_(model, recipe, steps=config.epochs * task.steps(config.batch_size))
        model.to(config.device).eval()
        chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(config.seed))[:TESTED]
        compress.calibrate_(model, task.reading.normalized(task.train.take(chosen.tolist()).to(config.device)))
    except ValueError as error:
        raise CommandError(f"the recipe does not suit the model: {error}") from None


def train(
    config: Config,
    model: nn.Module,
    task: Task,
    output: Path,
    resume: bool,
    report: Callable[[Progress, int, float], None] = lambda progress, step, loss: None,
) -> Progress:
    """Trains a model in place, writing its state after every epoch.

    Args:
        config: the training.
        model: with its first weights; prepared for the compressed training.
        task: the data.
        output: the folder of the state file.
        resume: go on from that, if there is one.
        report: called after every step with the progress, the step's number in its epoch and its loss.

    Raises:
        StateError: the state file is damaged or from another run.
        CommandError: the loss is not finite any more.
    """
    run, progress, path = Run(config, model, task), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, model, [run.optimizer], config, Progress)
    while len(progress.loss) < config.epochs:
        run.epoch(len(progress.loss), progress, lambda step, loss: report(progress, step, loss))
        save_state(path, model, [run.optimizer], config, progress)
    return progress
