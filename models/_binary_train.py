"""The runs that ``train_binary`` compares: a network in float32, and the same with three kinds of binary convolutions.

All have one topology, start from the same weights of the seed, and take the same steps on the same patches at the same
learning rates.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import BinaryConv2d, BinarySchedule, ReCUConv2d, ReSTEConv2d, convert_
from tersor.models import _patches
from tersor.models._digits import read_safetensors, write_safetensors
from tersor.models._training_state import load_state, save_state
from tersor.models.binary_resnet import resnet20_bireal_reste, resnet20_recu

LAYERS: dict[str, Any] = {  # of the blocks
    "float": nn.Conv2d,
    "ste": functools.partial(BinaryConv2d, estimator="ste"),
    "recu": ReCUConv2d,
    "reste": ReSTEConv2d,
}
METHODS = tuple(LAYERS)
BLOCKS = {"bireal": resnet20_bireal_reste, "recu": resnet20_recu}
MOMENTUM = 0.9
WARM_UP = 0.05  # share of the steps
# Block, rate and decay were chosen on validation patches alone, by one other seed's runs of 10 epochs of 100 steps, and
# as one for all: by the mean accuracy of the four methods (``--part validation`` with the options does it again).
ROUNDING = 1e-3  # logits that differ by more had a sign that fell otherwise; the others differ by some 1e-6


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; ``method`` is one of METHODS."""

    method: str
    seed: int = 0
    epochs: int = 20
    iterations: int = 120
    batch_size: int = 32
    width: int = 32
    block: str = "bireal"  # one of BLOCKS
    rate: float = 0.1
    decay: float = 5e-4
    part: str = "test"  # whose patches judge
    patches: int = 4000  # that judge
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.method}_seed{self.seed}"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.name}.safetensors"

    def model_file(self, output: Path) -> Path:
        """Of the trained model: packed, or as it is for float32."""
        return output / f"model_{self.name}.safetensors"

    def build(self) -> nn.Module:
        """The initial weights are the same for all methods of a seed."""
        start = self._network("float")
        if self.method == "float":
            return start
        model = self._network(self.method)
        model.load_state_dict(start.state_dict(), strict=False)  # ReCU's factors are its own
        return model

    def _network(self, method: str) -> nn.Module:
        torch.manual_seed(self.seed)
        make = BLOCKS[self.block]
        return make(_patches.CLASSES, self.width, _patches.CHANNELS, conv=LAYERS[method])


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)  # one entry per epoch
    accuracy: float = math.nan  # on the patches that judge (%), at the end
    differ: int = 0  # such patches that the packed model, read from its file, tells otherwise than the trained one
    flipped: int = 0  # such patches whose logits differ by more than ROUNDING
    gap: float = math.nan  # largest difference of the others' logits
    bytes: int = 0  # of the model's file


class Run:
    """Model, optimiser and schedule of one run, and how they go through an epoch."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, config.build()
        self.schedule = None if config.method == "float" else BinarySchedule(self.model, config.epochs)
        options: dict[str, Any] = {"lr": config.rate, "momentum": MOMENTUM, "weight_decay": config.decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **options)

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, model = self.config, self.model.train()
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        if self.schedule:
            self.schedule.start_epoch(epoch)
        losses = []
        for step in range(config.iterations):
            self._set_rate(epoch * config.iterations + step)
            images, labels = _patches.draw(config.batch_size, generator)
            loss = F.cross_entropy(model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            report(step)
        progress.loss.append(statistics.fmean(losses))

    def _set_rate(self, step: int) -> None:
        """Up along a line, down along a cosine."""
        steps = self.config.epochs * self.config.iterations
        warm = max(1, round(WARM_UP * steps))
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * factor

    def finish(self, output: Path, progress: Progress) -> None:
        """Judges the trained model, packs it, writes that, and judges what the file holds."""
        config, path = self.config, self.config.model_file(output)
        logits, labels = predict(self.model, config)
        progress.accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
        packed = copy.deepcopy(self.model)
        if config.method != "float":
            convert_(packed)
        write_safetensors(path, packed.state_dict(), {})
        progress.bytes = path.stat().st_size
        again, _ = predict(load_model(config, output), config)
        progress.differ = int((again.argmax(1) != logits.argmax(1)).sum())
        gaps = (again - logits).abs().amax(1)
        progress.flipped = int((gaps > ROUNDING).sum())
        progress.gap = gaps[gaps <= ROUNDING].max().item()


def load_model(config: Config, output: Path) -> nn.Module:
    """The model that a finished run wrote, built from the configuration and this file alone."""
    model = config.build()
    if config.method != "float":
        convert_(model)
    model.load_state_dict(read_safetensors(config.model_file(output))[0])
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, config: Config) -> tuple[Tensor, Tensor]:
    """Logits of the patches that judge in eval mode, and labels."""
    model.eval()
    images, labels = _patches.fixed_set(config.part, config.patches)
    return torch.cat([model(batch) for batch in images.split(256)]), labels


def train(
    config: Config,
    output: Path,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[nn.Module, Progress]:
    """Trains one network, writing its state after every epoch; an interrupted run goes on bit for bit.

    Args:
        config: the run.
        output: the folder of the state file and of the trained model's.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    run, progress, path = Run(config), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, run.model, [run.optimizer], config, Progress)
    while len(progress.loss) < config.epochs:
        run.epoch(len(progress.loss), progress, lambda step: report(progress, step))
        if len(progress.loss) == config.epochs:
            run.finish(output, progress)
        save_state(path, run.model, [run.optimizer], config, progress)
    return run.model.eval(), progress
