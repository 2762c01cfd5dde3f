"""The runs that ``train_sparsity`` compares: dense, and N:M sparse by magnitudes (SR-STE) and by combinations (LBC)."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.models import _textures
from tersor.models._digits import read_safetensors, write_safetensors
from tersor.models._training_state import load_state, save_state
from tersor.models.resnet import BasicBlock, ResNet
from tersor.sparsity import NMConv2d, NMSchedule, SrSte, convert_

METHODS = ("dense", "srste", "lbc")
DEPTHS = (1, 1, 1)  # blocks of each stage
RATE, MOMENTUM, DECAY, SMOOTHING = 0.1, 0.9, 1e-4, 0.1
WARM_UP = 0.05  # share of the steps
POWER = 3  # of the schedule, which ends after half of the epochs


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; ``method`` is one of METHODS, ``pattern`` like ``"2:4"`` and empty for the dense one."""

    method: str
    pattern: str = ""
    seed: int = 0
    epochs: int = 20
    iterations: int = 160
    batch_size: int = 32
    width: int = 32
    test_patches: int = 1024
    threads: int = 1
    share: float | None = None  # of NMSchedule, whose scores are then compact

    @property
    def name(self) -> str:
        pattern = f"_{self.pattern.replace(':', 'of')}" if self.pattern else ""
        share = "" if self.share is None else f"_share{self.share:g}"
        return f"{self.method}{pattern}{share}_seed{self.seed}"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.name}.safetensors"

    def model_file(self, output: Path) -> Path:
        """Of the trained model: packed, or as it is for the dense one."""
        return output / f"model_{self.name}.safetensors"

    def final_epoch(self) -> int:
        return max(1, self.epochs // 2)

    def build(self) -> ResNet:
        """The initial weights are the same for all methods of a seed."""
        torch.manual_seed(self.seed)
        n, m = map(int, self.pattern.split(":")) if self.pattern else (0, 0)
        conv: Any = functools.partial(NMConv2d, n=n, m=m) if self.method == "lbc" else nn.Conv2d
        classes, channels = len(_textures.NAMES), _textures.FOLD**2
        model = ResNet(
            BasicBlock, DEPTHS, self.width, classes, channels, stem="cifar", conv=conv, first=nn.Conv2d
        )  # stem and classifier stay dense
        if self.method == "srste":
            for layer in [x for x in model.modules() if isinstance(x, nn.Conv2d) and x is not model.conv1]:
                parametrize.register_parametrization(layer, "weight", SrSte(n, m))
        return model

    def schedule(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> NMSchedule | None:
        if self.method != "lbc":
            return None
        if self.share is None or optimizer is None:
            return NMSchedule(model, self.final_epoch(), POWER, freeze=True)
        return NMSchedule(model, self.final_epoch(), POWER, freeze=True, compact=optimizer, share=self.share)


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)  # one entry per epoch, as the next two
    kept: list[float] = dataclasses.field(default_factory=list)  # share of the N:M layers' weights, in the last step
    seconds: list[float] = dataclasses.field(default_factory=list)  # of all steps
    accuracy: float = math.nan  # on the test patches, at the end
    same: int = 0  # test patches that the packed model, read from its file, tells as the trained one does
    gap: float = math.nan  # largest difference between the two's logits
    bytes: int = 0  # of the model's file


class Run:
    """Model, optimiser and schedule of one run, and how they go through an epoch."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, config.build()
        parameters = list(self.model.parameters())
        weights = [p for p in parameters if p.dim() > 1]  # and the scores of LBC, as published
        others = [p for p in parameters if p.dim() <= 1]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, fused=True)
        self.schedule = config.schedule(self.model, self.optimizer)

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, model = self.config, self.model
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        model.train()
        if self.schedule:
            self.schedule.start_epoch(epoch)
        losses, seconds = [], 0.0
        for step in range(config.iterations):
            self._set_rate(epoch * config.iterations + step)
            images, labels = _textures.draw(config.batch_size, generator)
            begin = time.perf_counter()
            if self.schedule:
                self.schedule.step()
            loss = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            loss.backward()
            if step == config.iterations - 1:
                progress.kept.append(_kept(model))  # before the step: it may bring removed scores back
            self.optimizer.step()
            seconds += time.perf_counter() - begin
            losses.append(loss.item())
            report(step)
        progress.loss.append(statistics.fmean(losses))
        progress.seconds.append(seconds)

    def _set_rate(self, step: int) -> None:
        """Up along a line, down along a cosine."""
        steps = self.config.epochs * self.config.iterations
        warm = max(1, round(WARM_UP * steps))
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor

    def finish(self, output: Path, progress: Progress) -> None:
        """Tests the trained model, packs it, writes that, and tests what the file holds."""
        config, path = self.config, self.config.model_file(output)
        if self.schedule:
            self.schedule.finish()
        logits, labels = predict(self.model, config.test_patches)
        progress.accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
        packed: nn.Module = copy.deepcopy(self.model)
        if config.pattern:
            convert_(packed)  # refuses a group with more than n weights
        write_safetensors(path, packed.state_dict(), {})
        progress.bytes = path.stat().st_size
        again, _ = predict(load_model(config, output), config.test_patches)
        progress.same = int((again.argmax(1) == logits.argmax(1)).sum())
        progress.gap = (again - logits).abs().max().item()


def load_model(config: Config, output: Path) -> nn.Module:
    """The model that a finished run wrote, built from the configuration and this file alone."""
    model: nn.Module = config.build()
    if schedule := config.schedule(model):
        schedule.finish()
    if config.pattern:
        convert_(model)
    model.load_state_dict(read_safetensors(config.model_file(output))[0])
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, per_class: int) -> tuple[Tensor, Tensor]:
    """Logits of the test patches in eval mode, and labels."""
    model.eval()
    images, labels = _textures.test_set(per_class)
    return torch.cat([model(batch) for batch in images.split(256)]), labels


@torch.no_grad()
def _kept(model: nn.Module) -> float:
    """Share of the weights of the N:M layers that are not zero; 1 without such layers."""
    weights: list[Any] = [m.sparse_weight() for m in model.modules() if isinstance(m, NMConv2d)]
    weights += [m.weight for m in model.modules() if parametrize.is_parametrized(m)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights) if weights else 1.0


def train(
    config: Config,
    output: Path,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[ResNet, Progress]:
    """Trains one network, writing its state after every epoch; an interrupted run goes on bit for bit.

    Args:
        config: the run.
        output: the folder of the state file and of the trained model's.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
        ValueError: a layer holds more than n of m weights at the end.
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
