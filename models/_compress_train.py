"""The runs that ``train_compress`` compares: a dense network trained on, and the same one compressed."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import compress
from tersor.command_line.timing import model_medians
from tersor.models import _patches
from tersor.models._digits import write_safetensors
from tersor.models._textures import FOLD
from tersor.models._training_state import load_state, save_state
from tersor.models.resnet import BasicBlock, ResNet

PHASES = ("start", "dense", "compressed")  # both of the latter go on from the first
DEPTHS = (1, 1, 1)  # blocks of each stage
RATES = {"start": 0.1, "dense": 0.03, "compressed": 0.03}
MOMENTUM, DECAY, SMOOTHING = 0.9, 5e-4, 0.1
WARM_UP = 0.05  # share of the steps
RECIPE = compress.Recipe(
    compress.FakeQuantize(bits=4, method="lts"),
    compress.NMSparse(2, 4),
    compress.Freeze(warmup=0.7, granularity="element"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; ``phase`` is one of PHASES."""

    phase: str
    seed: int = 0
    epochs: int = 10
    iterations: int = 100
    batch_size: int = 32
    width: int = 32
    test_patches: int = 10_000
    threads: int = 1

    @property
    def name(self) -> str:
        return f"{self.phase}_seed{self.seed}"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.name}.safetensors"

    def model_file(self, output: Path) -> Path:
        """What is shipped: the packed network, or the dense one in float32."""
        return output / f"model_{self.name}.safetensors"

    def network(self) -> ResNet:
        """With the seed's weights; it sees the patches as they are, one channel of grey."""
        torch.manual_seed(self.seed)
        return ResNet(BasicBlock, DEPTHS, self.width, _patches.CLASSES, 1, stem="cifar")


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    loss: list[float] = dataclasses.field(default_factory=list)  # one entry per epoch, as the next two
    validation: list[float] = dataclasses.field(default_factory=list)  # accuracy in per cent
    frozen: list[float] = dataclasses.field(default_factory=list)  # share of the compressed layers' weights
    accuracy: float = math.nan  # on the test patches, of the model read back from its file
    bytes: int = 0  # of that file
    same: int = 0  # test patches that it tells as the trained network does


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training patches ``(count, 1, 24, 24)`` and labels."""
    images, labels = _patches.draw(count, generator)
    return F.pixel_shuffle(images, FOLD), labels


def fixed_set(part: str, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`draw` returns them, of validation or test; always the same."""
    images, labels = _patches.fixed_set(part, count)
    return F.pixel_shuffle(images, FOLD), labels


class Run:
    """Model and optimiser of one run, and how they go through an epoch."""

    def __init__(self, config: Config, start: dict[str, Tensor] | None) -> None:
        self.config, self.compresses = config, config.phase == "compressed"
        self.model = config.network()
        if start is not None:
            self.model.load_state_dict(start)
        self.steps = config.epochs * config.iterations
        if self.compresses:
            compress.prepare_(self.model, RECIPE, steps=self.steps)
            images, _ = draw(8 * config.batch_size, torch.Generator().manual_seed(config.seed))
            compress.calibrate_(self.model.eval(), images)
        groups = compress.parameter_groups(self.model, DECAY)
        self.optimizer = torch.optim.SGD(groups, RATES[config.phase], MOMENTUM, fused=True)

    def epoch(self, epoch: int, progress: Progress, report: Callable[[int], None]) -> None:
        """Every epoch has its own randomness, from the seed and its number."""
        config, model, losses = self.config, self.model, []
        first = config.epochs if config.phase != "start" else 0  # new patches in the second phase
        generator = torch.Generator().manual_seed(config.seed * 100_003 + first + epoch)
        model.train()
        for step in range(config.iterations):
            self._set_rate(epoch * config.iterations + step)
            images, labels = draw(config.batch_size, generator)
            loss = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.compresses:
                compress.step(model)
            losses.append(loss.item())
            report(step)
        progress.loss.append(statistics.fmean(losses))
        progress.validation.append(accuracy(predict(model, "validation", 2000)))
        progress.frozen.append(compress.report(model).total.frozen if self.compresses else 0.0)

    def _set_rate(self, step: int) -> None:
        """Up along a line, down along a cosine."""
        warm = max(1, round(WARM_UP * self.steps))
        over = (step - warm) / max(1, self.steps - warm)
        factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * over)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[self.config.phase] * factor

    def finish(self, output: Path, progress: Progress) -> None:
        """Writes what is to be shipped, reads it back, and tests that; the trained network stays as it is."""
        config, path = self.config, self.config.model_file(output)
        trained = predict(self.model, "test", config.test_patches)
        if self.compresses:
            packed = Run(config, None).model
            packed.load_state_dict(self.model.state_dict())
            compress.save(compress.convert_(packed), path)
        else:
            write_safetensors(path, self.model.state_dict(), {})
        shipped = predict(load_model(config, output), "test", config.test_patches)
        progress.accuracy, progress.bytes = accuracy(shipped), path.stat().st_size
        progress.same = int((shipped[0].argmax(1) == trained[0].argmax(1)).sum())


def load_model(config: Config, output: Path) -> nn.Module:
    """The model that a finished run wrote, from the configuration and this file alone."""
    model, path = config.network(), config.model_file(output)
    if config.phase == "compressed":
        return compress.load(path, model)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path))
    return model.eval()


@torch.no_grad()
def predict(model: nn.Module, part: str, count: int) -> tuple[Tensor, Tensor]:
    """Logits in eval mode, and labels."""
    images, labels = fixed_set(part, count)
    model.eval()
    return torch.cat([model(batch) for batch in images.split(256)]), labels


def accuracy(predicted: tuple[Tensor, Tensor]) -> float:
    """In per cent."""
    logits, labels = predicted
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def train(
    config: Config,
    output: Path,
    start: dict[str, Tensor] | None = None,
    resume: bool = False,
    report: Callable[[Progress, int], None] = lambda progress, step: None,
) -> tuple[nn.Module, Progress]:
    """Trains one network, writing its state after every epoch; an interrupted run goes on bit for bit.

    Args:
        config: the run.
        output: the folder of all files.
        start: the weights that the second phase goes on from.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    run, progress, path = Run(config, start), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = load_state(path, run.model, [run.optimizer], config, Progress)
    while len(progress.loss) < config.epochs:
        run.epoch(len(progress.loss), progress, lambda step: report(progress, step))
        if len(progress.loss) == config.epochs and config.phase != "start":
            run.finish(output, progress)
        save_state(path, run.model, [run.optimizer], config, progress)
    return run.model.eval(), progress


def measure(config: Config, output: Path, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of both shipped models in batches of 1 and 64; they take turns.

    Returns:
        Of each phase, by batch size, the median of the rounds.
    """
    phases = PHASES[1:]
    models = {phase: load_model(dataclasses.replace(config, phase=phase), output) for phase in phases}
    torch.set_num_threads(threads)
    images, _ = fixed_set("test", 64)
    found: dict[str, dict[str, float]] = {phase: {} for phase in phases}
    for size in (1, 64):
        for phase, seconds in model_medians(models, images[:size].contiguous(), rounds).items():
            found[phase][str(size)] = 1e3 * seconds
    return found
