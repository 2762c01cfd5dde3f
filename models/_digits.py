"""What :mod:`tersor.models.train_digits` trains: data, recipe, the training loop and its state file.

Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from tersor import DilatedAttention
from tersor.command_line.state import read_safetensors, write_safetensors
from tersor.models._command import StateError
from tersor.models.dilateformer import VARIANTS, DilateFormer
from tersor.models.eager import EagerDilatedAttention

ATTENTION = {"tersor": DilatedAttention, "eager": EagerDilatedAttention}
SIZE = 32  # pixels; the 8 x 8 digits are enlarged so that the stages' grids are 8, 4 and 2
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
TRAINING_IMAGES = 1347  # of 1797
WARM_UP = 5  # steps of a process whose times are not counted
OPTIONS = VARIANTS["dilateformer_nano"] | {"num_classes": 10, "drop_path": 0.05}


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run; everything its result depends on."""

    attention: str
    epochs: int = 12
    batch_size: int = 64
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.attention}.safetensors"


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    epoch: int = 0
    train_loss: list[float] = dataclasses.field(default_factory=list)
    test_loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 8, 8)`` in [-1, 1] and labels ``(N,)``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(device: str = "cpu") -> Digits:
    """The 1797 handwritten digits of scikit-learn, a quarter of each class for testing; always the same split."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images = (
        torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1 for part in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Digits(*(t.to(device) for t in (train_images, train_labels, test_images, test_labels)))


def enlarge(images: Tensor, randomness: Tensor | None = None) -> Tensor:
    """Model inputs ``(B, 3, 32, 32)`` from digits ``(B, 1, 8, 8)``.

    ``randomness``, ``(B, 4)`` in [0, 1), turns, scales and shifts every digit a little: up to 0.2 radian, 10 %, and
    one of its 8 pixels.
    """
    if randomness is None:
        angle = shift_x = shift_y = torch.zeros(len(images), device=images.device)
        scale = torch.ones_like(angle)
    else:
        angle, scale, shift_x, shift_y = (2 * randomness - 1).unbind(1)
        angle, scale, shift_x, shift_y = 0.2 * angle, 1 + 0.1 * scale, shift_x / 4, shift_y / 4
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, SIZE, SIZE], align_corners=False)
    # The background is -1: sampled as 0 outside the image, it has to be 0 while sampling.
    return (F.grid_sample(images + 1, grid, align_corners=False) - 1).expand(-1, 3, -1, -1)


def build(attention: str, device: str = "cpu") -> DilateFormer:
    return DilateFormer(**OPTIONS, attention=ATTENTION[attention]).to(device)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    """Logits ``(N, 10)`` of digits ``(N, 1, 8, 8)``, in eval mode."""
    return model.eval()(enlarge(images))


def train(
    config: Config, output: Path, resume: bool = False, report: Callable[[Progress, int], None] | None = None
) -> Progress:
    """Trains one model, writing its state after every epoch.

    Every epoch seeds its own randomness from the run's seed and its number, so a run that goes on from a state file
    computes bit for bit what it would have computed uninterrupted, on the same number of threads.

    Args:
        config: the run.
        output: the folder of the state file.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data, model = digits(config.device), build(config.attention, config.device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    progress, path = Progress(), config.state_file(output)
    if resume and path.exists():
        progress = _load_state(path, config, model, optimizer)
    warm_up = WARM_UP
    while progress.epoch < config.epochs:
        losses = []
        for step, (seconds, loss) in enumerate(_epoch(config, data, model, optimizer, progress.epoch)):
            losses.append(loss)
            if warm_up > 0:
                warm_up -= 1
            else:
                progress.step_seconds.append(seconds)
            if report:
                report(progress, step)
        logits = evaluate(model, data.test_images)
        progress.train_loss.append(statistics.fmean(losses))
        progress.test_loss.append(F.cross_entropy(logits, data.test_labels).item())
        progress.accuracy.append((logits.argmax(1) == data.test_labels).double().mean().item())
        progress.epoch += 1
        _save_state(path, config, progress, model, optimizer)
    return progress


def steps_per_epoch(batch_size: int) -> int:
    return TRAINING_IMAGES // batch_size  # the last, smaller batch is left out: all steps do the same work


def _epoch(config: Config, data: Digits, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> Any:
    """Yields (seconds, loss) of each step; the time is that of forward, backward and update."""
    model.train()
    torch.manual_seed(config.seed * 100_003 + epoch)
    order = torch.randperm(len(data.train_labels)).to(config.device)
    randomness = torch.rand(len(data.train_labels), 4).to(config.device)
    steps = steps_per_epoch(config.batch_size)
    for step in range(steps):
        batch = order[step * config.batch_size : (step + 1) * config.batch_size]
        images, labels = enlarge(data.train_images[batch], randomness[batch]), data.train_labels[batch]
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(epoch * steps + step, steps, config.epochs * steps)
        start = time.perf_counter()
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()  # waits for a GPU to finish
        yield time.perf_counter() - start, value


def _learning_rate(step: int, warm_up: int, total: int) -> float:
    """Up in a line over the first epoch, down to 0 along a cosine."""
    return LEARNING_RATE * min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / total)) / 2


def _save_state(
    path: Path, config: Config, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    scalars = {"config": dataclasses.asdict(config), "progress": dataclasses.asdict(progress)}
    write_safetensors(path, tensors, {"state": json.dumps(scalars)})


def _load_state(path: Path, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    tensors, metadata = read_safetensors(path)
    try:
        scalars = json.loads(metadata["state"])
        theirs, progress = scalars["config"], Progress(**scalars["progress"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} holds no training state ({error!r}): remove it, or start without --resume") from None
    differ = [f"{name} {theirs.get(name)} there, {value} here" for name, value in _differences(config, theirs)]
    if differ:
        raise StateError(f"{path} is from another run ({'; '.join(differ)}): give its options, or drop --resume")
    try:
        state: dict[int, dict[str, Tensor]] = {}
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensors.pop(key)
        model.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items()})
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, RuntimeError, ValueError) as error:
        raise StateError(f"{path} does not fit this model ({error}): start without --resume") from None
    return progress


def _differences(config: Config, theirs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in dataclasses.asdict(config).items() if theirs.get(name) != value]


def save_model(path: Path, model: nn.Module, accuracy: float) -> None:
    """The weights, and in the file's header all that :func:`load_model` needs to build the model again."""
    described = {"class": "DilateFormer", "options": OPTIONS, "test_accuracy": accuracy}
    # One entry: safetensors writes several in an order that changes from run to run.
    write_safetensors(path, model.state_dict(), {"model": json.dumps(described)})


def load_model(path: Path) -> DilateFormer:
    """The model that :func:`save_model` wrote, built from the file alone."""
    tensors, metadata = read_safetensors(path)
    model = DilateFormer(**json.loads(metadata["model"])["options"])
    model.load_state_dict(tensors)
    return model.eval()


def load_trained(config: Config, output: Path) -> DilateFormer:
    """The model of a run that has finished, from its state file."""
    model = build(config.attention, config.device)
    _load_state(config.state_file(output), config, model, torch.optim.AdamW(model.parameters(), fused=True))
    return model.eval()
