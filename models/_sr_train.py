"""What :mod:`tersor.models.train_sr` trains: recipes, the training loop and its state file.

Needs the extra ``tersor[demo]``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.models._digits import StateError, read_safetensors, write_safetensors
from tersor.models._photos import Patches, photographs
from tersor.models._sr_symmetric import SymmetricActivation, make_symmetric_
from tersor.models._super_resolution import attention_transfer, load_full_precision
from tersor.models.edsr import EDSR
from tersor.quantization import BoundedActivation, BoundsSchedule

METHODS = ("full", "ddtb", "symmetric")
SCALE = 2
TEACHER_LEARNING_RATE = 2e-3
STUDENT_LEARNING_RATE = 1e-3  # published: 1e-4, for 59,000 steps; this is for some 2,000
BOUNDS_LEARNING_RATE = 1e-2  # as published
FEATURE_WEIGHT = 1000.0  # of attention_transfer in the loss, as published
DYNAMIC_RATIO = 0.3  # of EDSR's activations, as published
WARM_UP = 5  # steps of a process whose times are not counted


@dataclasses.dataclass(frozen=True)
class Config:
    """One training run; everything its result depends on but the teacher.

    ``epochs`` of ``iterations`` steps each. Of a student's epochs the first only records the activations.
    """

    method: str
    bits: int = 32
    seed: int = 0
    blocks: int = 2
    channels: int = 32
    epochs: int = 10
    iterations: int = 200
    batch_size: int = 8
    patch: int = 16
    threads: int = 1

    @property
    def name(self) -> str:
        return "full" if self.method == "full" else f"{self.method}_{self.bits}bit_seed{self.seed}"

    def state_file(self, output: Path) -> Path:
        return output / f"state_{self.name}.safetensors"


@dataclasses.dataclass
class Progress:
    """What a run has done so far; kept in the state file next to the weights."""

    epoch: int = 0
    loss: list[float] = dataclasses.field(default_factory=list)
    pixel_loss: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


def build(config: Config, teacher: nn.Module | None = None) -> EDSR:
    """The network of a run, a student with the teacher's weights; the rest (a student's gates) is set by the seed."""
    torch.manual_seed(config.seed)
    options: dict[str, Any] = {"blocks": config.blocks, "channels": config.channels}
    if config.method == "full":
        model = EDSR(SCALE, quantized=False, **options)
    else:
        # Calibrated at every width: in so few steps the published start for 4 bit, -10 and 10, would not get far.
        model = EDSR(SCALE, bits=config.bits, calibrate=True, **options)
        if teacher is not None:
            load_full_precision(model, teacher.state_dict())
    if config.method == "symmetric":
        make_symmetric_(model, config.bits)
    # a quarter less time per step on CPUs
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Run:
    """Model, optimiser and schedule of one run, and how they go through a step."""

    def __init__(self, config: Config, teacher: nn.Module | None) -> None:
        self.config, self.teacher, self.fingerprint = config, teacher, _fingerprint(teacher)
        self.model = build(config, teacher)
        self.schedule = BoundsSchedule(self.model, DYNAMIC_RATIO) if config.method == "ddtb" else None
        self.patches = Patches(photographs(SCALE).train, config.patch, SCALE)
        self.optimizer = torch.optim.Adam(self._groups(), betas=(0.9, 0.999), eps=1e-8, fused=True)

    def _groups(self) -> list[dict[str, Any]]:
        quantizers = (BoundedActivation, SymmetricActivation)
        bounds = [p for m in self.model.modules() if isinstance(m, quantizers) for p in m.parameters(recurse=False)]
        known = {id(p) for p in bounds}
        rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": rest}, {"params": bounds}] if bounds else [{"params": rest}]

    def epoch(self, epoch: int) -> Iterator[tuple[float, float, float]]:
        """Yields (seconds, loss, its L1 part) of every step; ``epoch`` counts from 1."""
        generator = torch.Generator().manual_seed(self.config.seed * 100_003 + epoch)
        recording = self.config.method != "full" and epoch == 1
        if self.schedule:
            self.schedule.start_epoch(epoch)
        else:
            self.model.train(not recording)
        for step in range(self.config.iterations):
            low, high = self.patches.draw(self.config.batch_size, generator)
            start = time.perf_counter()
            values = self._record(low, high) if recording else self._update(low, high, self._rates(epoch, step))
            yield time.perf_counter() - start, *values

    @torch.no_grad()
    def _record(self, low: Tensor, high: Tensor) -> tuple[float, float]:
        """Epoch 1 of the published schedule. A symmetric student has nothing to record: it waits for epoch 2."""
        model = self.teacher if self.teacher and not self.schedule else self.model  # alike, as nothing is quantised yet
        pixel = F.l1_loss(model(low)[0], high).item()
        if self.schedule:
            self.schedule.record()
        return pixel, pixel

    def _update(self, low: Tensor, high: Tensor, rates: tuple[float, float]) -> tuple[float, float]:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        output, feature = self.model(low)
        loss = pixel = F.l1_loss(output, high)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(low)[1]
            loss = loss + FEATURE_WEIGHT * attention_transfer(feature, wanted)
        if self.schedule:
            loss = loss + self.schedule.regularization()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), pixel.item()

    def _rates(self, epoch: int, step: int) -> tuple[float, float]:
        """Of the weights and of the bounds. The teacher: up over 30 steps, then down along a cosine."""
        config = self.config
        if config.method == "full":
            done, total = (epoch - 1) * config.iterations + step, config.epochs * config.iterations
            return TEACHER_LEARNING_RATE * min(1, (done + 1) / 30) * (1 + math.cos(math.pi * done / total)) / 2, 0.0
        # The students': halved after every sixth of the epochs (published: every 10 of 60).
        factor = 0.5 ** ((epoch - 1) // max(1, round(config.epochs / 6)))
        return STUDENT_LEARNING_RATE * factor, BOUNDS_LEARNING_RATE * factor


def _fingerprint(teacher: nn.Module | None) -> str:
    """Tells one teacher from another: a student of one cannot go on with the other."""
    if teacher is None:
        return ""
    content = b"".join(value.contiguous().numpy().tobytes() for value in teacher.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:16]


def train(
    config: Config,
    output: Path,
    teacher: nn.Module | None = None,
    resume: bool = False,
    report: Callable[[Progress, int], None] | None = None,
) -> tuple[EDSR, Progress]:
    """Trains one network, writing its state after every epoch.

    Every epoch seeds its own randomness from the run's seed and its number, so a run that goes on from a state file
    computes bit for bit what it would have computed uninterrupted, on the same number of threads.

    Args:
        config: the run.
        output: the folder of the state file.
        teacher: the network in full precision, for a student.
        resume: go on from the state file, if there is one.
        report: called after every step with the progress so far and the step's number in its epoch.

    Returns:
        The network, in eval mode, and the progress.

    Raises:
        StateError: the state file is damaged or from another run.
    """
    torch.set_num_threads(config.threads)
    run, progress, path = Run(config, teacher), Progress(), config.state_file(output)
    if resume and path.exists():
        progress = _load_state(path, run)
    warm_up = WARM_UP
    while progress.epoch < config.epochs:
        losses = []
        for step, (seconds, *values) in enumerate(run.epoch(progress.epoch + 1)):
            losses.append(values)
            if config.method != "full" and progress.epoch == 0:
                pass  # a student's first epoch does not train
            elif warm_up > 0:
                warm_up -= 1
            else:
                progress.step_seconds.append(seconds)
            if report:
                report(progress, step)
        for values, mean in zip((progress.loss, progress.pixel_loss), zip(*losses, strict=True), strict=True):
            values.append(statistics.fmean(mean))
        progress.epoch += 1
        _save_state(path, run, progress)
    return run.model.eval(), progress


def _save_state(path: Path, run: Run, progress: Progress) -> None:
    # clone: EDSR registers an activation twice, and safetensors refuses tensors that share their memory
    tensors = {f"model.{name}": value.clone() for name, value in run.model.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    scalars: dict[str, Any] = {"config": dataclasses.asdict(run.config), "teacher": run.fingerprint}
    scalars |= {"progress": dataclasses.asdict(progress), "schedule": {}}
    if run.schedule:
        for name, value in run.schedule.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"schedule.{name}"] = value
            else:
                scalars["schedule"][name] = value
    write_safetensors(path, tensors, {"state": json.dumps(scalars)})


def _load_state(path: Path, run: Run) -> Progress:
    tensors, metadata = read_safetensors(path)
    try:
        scalars = json.loads(metadata["state"])
        theirs, schedule, progress = scalars["config"], scalars["schedule"], Progress(**scalars["progress"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} holds no training state ({error!r}): remove it, or start without --resume") from None
    ours = dataclasses.asdict(run.config)
    differ = [f"{k} {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]
    if differ:
        raise StateError(f"{path} is from another run ({'; '.join(differ)}): give its options, or drop --resume")
    if scalars.get("teacher") != run.fingerprint:
        raise StateError(f"{path} is of another teacher than the one in this folder: start without --resume")
    try:
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            _, index, name = key.split(".")
            value, parameter = tensors.pop(key), parameters[int(index)]
            if value.shape == parameter.shape:  # fused Adam takes both for laid out alike, and files are not
                value = torch.empty_like(parameter).copy_(value)
            state.setdefault(int(index), {})[name] = value
        schedule |= {key.removeprefix("schedule."): tensors.pop(key) for key in list(tensors) if "schedule." in key}
        run.model.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items()})
        run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
        if run.schedule:
            run.schedule.load_state_dict(schedule)
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise StateError(f"{path} does not fit this model ({error}): start without --resume") from None
    return progress


def save_model(path: Path, config: Config, model: nn.Module) -> None:
    """The weights, and in the file's header all that :func:`load_model` needs to build the model again."""
    described = {"class": "EDSR", "scale": SCALE, "config": dataclasses.asdict(config)}
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    write_safetensors(path, tensors, {"model": json.dumps(described)})


def load_model(path: Path) -> EDSR:
    """The model that :func:`save_model` wrote, built from the file alone."""
    tensors, metadata = read_safetensors(path)
    model = build(Config(**json.loads(metadata["model"])["config"]))
    model.load_state_dict(tensors)
    return model.eval()
