"""The state file of a training run: model, optimisers, configuration and progress, without pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.command_line.shared import StateError

Progress = TypeVar("Progress")


def save_state(path: Path, model: nn.Module, optimizers: Sequence[Optimizer], config: Any, progress: Any) -> None:
    """``config`` and ``progress`` are dataclasses of what JSON can hold."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{index}.{name}": v for name, v in state.items() if isinstance(v, Tensor)}
    scalars = {"config": dataclasses.asdict(config), "progress": dataclasses.asdict(progress)}
    write_safetensors(path, {n: t.clone().contiguous() for n, t in tensors.items()}, {"state": json.dumps(scalars)})


def load_state(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], config: Any, progress: type[Progress]
) -> Progress:
    """Loads model and optimisers; returns the progress.

    Raises:
        StateError: the file is damaged, or from a run with another configuration.
    """
    tensors, metadata = read_safetensors(path)
    try:
        scalars = json.loads(metadata["state"])
        theirs, found = scalars["config"], progress(**scalars["progress"])
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} holds no training state ({error!r}): remove it, or start without --resume") from None
    ours = dataclasses.asdict(config)
    if differ := [f"{k} {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]:
        raise StateError(f"{path} is from another run ({'; '.join(differ)}): give its options, or drop --resume")
    try:
        model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key in [key for key in tensors if key.startswith(f"{number}.")]:
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = tensors[key]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, RuntimeError, ValueError) as error:
        raise StateError(f"{path} does not fit this model ({error}): start without --resume") from None
    return found


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replaces the file in one step: whoever is interrupted leaves the old one whole."""
    content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, metadata)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; raises StateError where the file cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise StateError(f"{path} cannot be read ({error}): remove it, or start without --resume") from None
