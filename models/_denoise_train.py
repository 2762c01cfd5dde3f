"""What :mod:`tersor.models.train_denoise` trains: noise, recipe, the training loop and its state file.

Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.models._digits import read_safetensors, write_safetensors
from tersor.models._photos import PEAK, Patches, photographs
from tersor.models._training_state import load_state, save_state
from tersor.models.uformer import LeWinBlock, Uformer, charbonnier_loss, uformer_nano

SIGMA = 25 / PEAK  # of the noise; networks see pixels in 0..1
DEPTHS = (1, 1, 2, 1, 1, 1, 2, 1, 1)  # of two blocks the second is shifted
LEARNING_RATE = 3e-3  # published: 2e-4, for 250 epochs of a large collection
BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.02  # as published, the decay on all parameters
WARM_UP = 0.03  # share of the steps; published: 3 of 250 epochs
UNTIMED = 5  # steps of a process whose times are not counted


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run; everything its result depends on: ``epochs`` of ``iterations`` steps each."""

    seed: int = 0
    channels: int = 8
    epochs: int = 24
    iterations: int = 100
    batch_size: int = 2
    patch: int = 64
    threads: int = 1

    @property
    def steps(self) -> int:
        return self.epochs * self.iterations

    def state_file(self, output: Path) -> Path:
        return output / f"state_seed{self.seed}.safetensors"

    def model_file(self, output: Path) -> Path:
        return output / f"uformer_seed{self.seed}.safetensors"


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)  # one entry per epoch
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


def build(config: Config, block: Callable[..., nn.Module] = LeWinBlock) -> Uformer:
    """The network of a run with its first weights, which are the same for every kind of block."""
    torch.manual_seed(config.seed)
    return uformer_nano(embed_dim=config.channels, depths=DEPTHS, block=block)


def with_noise(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels in 0..1 with Gaussian noise; not clipped, as usual."""
    return clean + SIGMA * torch.randn(clean.shape, generator=generator)


class Run:
    """Model and optimiser of one run, and how they go through an epoch."""

    def __init__(self, config: Config, block: Callable[..., nn.Module] = LeWinBlock) -> None:
        self.config, self.model = config, build(config, block)
        self.patches = Patches(photographs(1).train, config.patch, 1)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def epoch(self, epoch: int) -> Iterator[tuple[float, float]]:
        """Yields (seconds, loss) of every step; the randomness is of the run's seed and ``epoch``, counted from 0."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        self.model.train()
        for step in range(config.iterations):
            clean = self.patches.draw(config.batch_size, generator)[1] / PEAK
            noisy = with_noise(clean, generator)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch * config.iterations + step, config.steps)
            start = time.perf_counter()
            loss = charbonnier_loss(self.model(noisy), clean)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield time.perf_counter() - start, loss.item()


def learning_rate(step: int, steps: int) -> float:
    """Up along a line, down along a cosine to nearly 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    return LEARNING_RATE * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def train(
    config: Config,
    output: Path,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[Uformer, Progress]:
    """Trains one network, writing its state after every epoch.

    A run that goes on from a state file computes bit for bit what it would have computed uninterrupted, on the same
    number of threads.

    Args:
        config: the run.
        output: the folder of the state file.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Returns:
        The network, in eval mode, and the progress.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    run, progress, path = Run(config), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, run.model, [run.optimizer], config, Progress)
    untimed = UNTIMED
    while len(progress.loss) < config.epochs:
        losses = []
        for step, (seconds, loss) in enumerate(run.epoch(len(progress.loss))):
            losses.append(loss)
            if untimed > 0:
                untimed -= 1
            else:
                progress.step_seconds.append(seconds)
            report(progress, step)
        progress.loss.append(statistics.fmean(losses))
        save_state(path, run.model, [run.optimizer], config, progress)
    return run.model.eval(), progress


def save_model(path: Path, config: Config, model: nn.Module) -> None:
    """The weights, and in the file's header all that :func:`load_model` needs to build the model again."""
    described = {"class": "Uformer", "config": dataclasses.asdict(config)}
    # One entry: safetensors writes several in an order that changes from run to run.
    write_safetensors(path, model.state_dict(), {"model": json.dumps(described)})


def load_model(path: Path) -> Uformer:
    """The model that :func:`save_model` wrote, built from the file alone."""
    tensors, metadata = read_safetensors(path)
    model = build(Config(**json.loads(metadata["model"])["config"]))
    model.load_state_dict(tensors)
    return model.eval()
