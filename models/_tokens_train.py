"""The runs that ``train_tokens`` compares: CF-ViT, SuperViT, and plain vision transformers for images of one size.

All have the same width and depth, start from their own weights of the seed, and take the same number of steps on the
same images.
"""

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

from tersor import resize_align_corners
from tersor.models import _tokens_data
from tersor.models._training_state import load_state, save_state
from tersor.models.cf_vit import CFViT, cf_deit_nano, cf_vit_loss
from tersor.models.deit import DeiT
from tersor.models.super_vit import SuperViT, subnetwork_losses, super_deit_nano

SIZES = (48, 64, 80, 96)  # pixels: of SuperViT's sub-networks, and of the plain ones
METHODS = ("CF-ViT", "SuperViT", *(f"ViT {size}" for size in SIZES))
HEADS, MLP_RATIO = 4, 2.0  # as the nano models have them
RATE, DECAY, SMOOTHING = 2e-3, 0.05, 0.1
WARM_UP = 0.05  # share of the steps
LARGEST_GRADIENT = 1.0  # norm
# Share of the epochs before CF-ViT's fine pass chooses its tokens. Published: 2/3 of 300 epochs. In runs this short
# the fine pass then ends at 53.5 % of the validation images instead of 62.1 % (600 steps, windows from 24 pixels).
SELECTION_FROM = 0.0


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; ``method`` is one of METHODS."""

    method: str
    seed: int = 0
    epochs: int = 6
    iterations: int = 100
    batch_size: int = 64
    width: int = 64
    depth: int = 7
    test_images: int = 2000
    threads: int = 2
    device: str = "cpu"

    @property
    def size(self) -> int:
        """Pixels of the images that a plain one takes."""
        return int(self.method.removeprefix("ViT "))

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.method.lower().replace(' ', '_')}_seed{self.seed}.safetensors"

    def build(self) -> Any:
        torch.manual_seed(self.seed)
        shared: dict[str, Any] = {"dim": self.width, "depth": self.depth, "num_heads": HEADS, "mlp_ratio": MLP_RATIO}
        shared |= {"num_classes": len(_tokens_data.NAMES), "in_chans": 1}
        if self.method == "CF-ViT":
            return cf_deit_nano(grid=_tokens_data.SIDE // 32, **shared).to(self.device)
        if self.method == "SuperViT":
            return super_deit_nano(sizes=SIZES, **shared).to(self.device)
        return Resizing(DeiT(image_size=self.size, **shared)).to(self.device)


class Resizing(nn.Module):
    """A plain vision transformer that takes the same images as the others."""

    def __init__(self, model: DeiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(resize_align_corners(images, self.model.image_size))


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)  # one entry per epoch, as the next one
    seconds: list[float] = dataclasses.field(default_factory=list)  # of all steps
    points: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # accuracies at the end, of every setting


class Run:
    """Model and optimiser of one run, and how they go through an epoch."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, config.build()
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, RATE, fused=True)

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, model = self.config, self.model.train()
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        choices = torch.Generator().manual_seed(config.seed * 100_003 + epoch)  # all methods see the same images
        if isinstance(model, CFViT):
            model.selection = epoch >= round(SELECTION_FROM * config.epochs)
        losses, seconds = [], 0.0
        for step in range(config.iterations):
            self._set_rate(epoch * config.iterations + step)
            images, labels = _tokens_data.draw(config.batch_size, generator)
            begin = time.perf_counter()
            losses.append(self._step(images.to(config.device), labels.to(config.device), choices))
            seconds += time.perf_counter() - begin
            report(step)
        progress.loss.append(statistics.fmean(losses))
        progress.seconds.append(seconds)

    def _step(self, images: Tensor, labels: Tensor, choices: torch.Generator) -> float:
        """The loss: of the fine or the largest images alone, so that it compares."""
        target = F.one_hot(labels, len(_tokens_data.NAMES)) * (1 - SMOOTHING) + SMOOTHING / len(_tokens_data.NAMES)
        self.optimizer.zero_grad()
        if isinstance(self.model, CFViT):
            coarse, fine = self.model(images)
            cf_vit_loss(coarse, fine, target).backward()
            loss = F.cross_entropy(fine.detach(), target)
        elif isinstance(self.model, SuperViT):
            loss = subnetwork_losses(self.model, images, target, generator=choices).losses[0]
        else:
            loss = F.cross_entropy(self.model(images), target)
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        return loss.item()

    def _set_rate(self, step: int) -> None:
        """Up along a line, down along a cosine."""
        steps = self.config.epochs * self.config.iterations
        warm = max(1, round(WARM_UP * steps))
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * factor


def train(
    config: Config,
    output: Path,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[Any, Progress]:
    """Trains one network, writing its state after every epoch; an interrupted run goes on bit for bit.

    Args:
        config: the run.
        output: the folder of the state file.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    from tersor.models._tokens_measure import judge

    torch.set_num_threads(config.threads)
    run, progress, path = Run(config), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, run.model, [run.optimizer], config, Progress)
    while len(progress.loss) < config.epochs:
        run.epoch(len(progress.loss), progress, lambda step: report(progress, step))
        if len(progress.loss) == config.epochs:
            progress.points = judge(config, run.model)
        save_state(path, run.model, [run.optimizer], config, progress)
    if isinstance(run.model, CFViT):
        run.model.selection = True  # always in inference
    return run.model.eval(), progress
