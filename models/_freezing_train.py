"""The runs that ``train_freezing`` compares: full precision, plain quantisation-aware training, and ways to freeze."""

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
from torch import Tensor

from tersor.freezing import FreezeSchedule, FrozenSGD, frozen_ratio, frozen_weights, initialize_, refresh_
from tersor.models import _textures
from tersor.models._classification import load_by_position, lts_layers
from tersor.models._training_state import load_state, save_state
from tersor.models.resnet import BasicBlock, ResNet

METHODS = ("full", "qat", "element", "tile", "channel")
TILE, QUANTILE, MOMENTUM = (64, 64), 0.5, 0.9  # of the freezing schedule
# Share of the epochs before anything freezes, growth and rate. Blocks freeze nearly all at once, at half of a level.
PACE = {"element": (0.2, "fixing", 0.3), "tile": (0.4, "linear", 0.0), "channel": (0.4, "linear", 0.0)}
RATES = {"full": 0.05, "other": 0.02, "bounds": 1e-4}
DECAY = {"full": 5e-4, "other": 1e-4}


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; ``method`` is one of METHODS, ``bits`` 32 for full precision."""

    method: str
    bits: int = 32
    seed: int = 0
    epochs: int = 15
    iterations: int = 40
    batch_size: int = 32
    width: int = 64
    test_patches: int = 1024
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.method}_{self.bits}bit_seed{self.seed}"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.name}.safetensors"

    def schedule(self) -> FreezeSchedule | None:
        if self.method in ("full", "qat"):
            return None
        share, growth, rate = PACE[self.method]
        options: dict[str, Any] = {"granularity": self.method, "tile": TILE, "quantile": QUANTILE, "momentum": MOMENTUM}
        return FreezeSchedule(self.iterations, self.epochs, round(self.epochs * share), growth, rate, **options)


@dataclasses.dataclass
class Progress:
    """What a run has done so far, one entry per epoch; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)
    frozen: list[float] = dataclasses.field(default_factory=list)  # share of the weights, at the end
    eliminated: list[float] = dataclasses.field(default_factory=list)  # share of the weight updates left out
    forward: list[float] = dataclasses.field(default_factory=list)  # seconds of all steps
    backward: list[float] = dataclasses.field(default_factory=list)
    optimizer: list[float] = dataclasses.field(default_factory=list)
    levels: list[dict[str, int]] = dataclasses.field(default_factory=list)  # how many layers skip in which way
    accuracy: float = math.nan  # on the test patches, at the end

    @property
    def seconds(self) -> float:
        return sum(self.forward) + sum(self.backward) + sum(self.optimizer)


class Run:
    """Model and optimisers of one run, and how they go through an epoch."""

    def __init__(self, config: Config, start: dict[str, Tensor] | None) -> None:
        self.config, full = config, config.method == "full"
        torch.manual_seed(config.seed)
        freezes = config.schedule() is not None
        layers: dict[str, Any] = (
            {} if full else lts_layers(config.bits, config.schedule(), saved=False, frozen_step=False)
        )
        self.model = ResNet(
            BasicBlock, (1, 1, 1), config.width, len(_textures.NAMES), _textures.FOLD**2, stem="cifar", **layers
        )
        if start is not None:
            load_by_position(self.model, start)
        named = list(self.model.named_parameters())
        bounds = [p for name, p in named if name.endswith((".lower", ".upper"))]
        others = [p for name, p in named if not name.endswith((".lower", ".upper"))]
        kind = "full" if full else "other"
        options = {"lr": RATES[kind], "momentum": 0.9, "weight_decay": DECAY[kind], "fused": True}
        masks = frozen_weights(self.model) if freezes else ()
        self.optimizers: list[torch.optim.Optimizer] = [FrozenSGD(others, masks=masks, **options)]
        if bounds:
            self.optimizers.append(torch.optim.Adam(bounds, lr=RATES["bounds"], fused=True))
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, model = self.config, self.model
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        if epoch == 0 and config.method != "full":
            initialize_(model, _textures.draw(8 * config.batch_size, generator)[0])
        plans = refresh_(model) if config.schedule() else {}
        model.train()
        losses, seconds, eliminated = [], [0.0, 0.0, 0.0], []
        for step in range(config.iterations):
            self._set_rates((epoch * config.iterations + step) / (config.epochs * config.iterations))
            images, labels = _textures.draw(config.batch_size, generator)
            marks = [time.perf_counter()]
            loss = F.cross_entropy(model(images), labels)
            marks.append(time.perf_counter())
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            marks.append(time.perf_counter())
            for optimizer in self.optimizers:
                optimizer.step()
            marks.append(time.perf_counter())
            seconds = [total + after - before for total, before, after in zip(seconds, marks, marks[1:], strict=False)]
            losses.append(loss.item())
            eliminated.append(frozen_ratio(model))
            report(step)
        progress.loss.append(statistics.fmean(losses))
        progress.frozen.append(eliminated[-1])
        progress.eliminated.append(statistics.fmean(eliminated))
        for total, name in zip(seconds, ("forward", "backward", "optimizer"), strict=True):
            getattr(progress, name).append(total)
        levels = [plan.level for plan in plans.values()]
        progress.levels.append({level: levels.count(level) for level in sorted(set(levels))})

    def _set_rates(self, done: float) -> None:
        """Full precision goes down along a cosine, the others along a parabola."""
        factor = (1 + math.cos(math.pi * done)) / 2 if self.config.method == "full" else (1 - done) ** 2
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * factor


@torch.no_grad()
def accuracy(model: torch.nn.Module, per_class: int) -> float:
    """Per cent of the test patches."""
    model.eval()
    images, labels = _textures.test_set(per_class)
    found = torch.cat([model(batch).argmax(1) for batch in images.split(256)])
    return 100 * (found == labels).float().mean().item()


def train(
    config: Config,
    output: Path,
    start: dict[str, Tensor] | None = None,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[ResNet, Progress]:
    """Trains one network, writing its state after every epoch; an interrupted run goes on bit for bit.

    Args:
        config: the run.
        output: the folder of the state file.
        start: the weights in full precision, for a quantised run.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    run, progress, path = Run(config, start), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, run.model, run.optimizers, config, Progress)
    while len(progress.loss) < config.epochs:
        run.epoch(len(progress.loss), progress, lambda step: report(progress, step))
        if len(progress.loss) == config.epochs:
            progress.accuracy = accuracy(run.model, config.test_patches)
        save_state(path, run.model, run.optimizers, config, progress)
    return run.model.eval(), progress
