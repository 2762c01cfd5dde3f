"""What the classification networks share: checks, initial weights, quantised layers, full-precision checkpoints."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor._checks import check_floating
from tersor.freezing import FreezeSchedule, LtsConv2d, LtsLinear, LtsWeight, UnitActivation


def lts_layers(
    bits: int, schedule: FreezeSchedule | None, saved: bool, frozen_step: bool
) -> dict[str, Callable[..., nn.Module]]:
    """``conv`` and ``linear`` of a network's definition; the options as for :class:`tersor.freezing.LtsWeight`."""
    options: dict[str, Any] = {"bits": bits, "schedule": schedule, "saved": saved, "frozen_step": frozen_step}
    return {"conv": functools.partial(LtsConv2d, **options), "linear": functools.partial(LtsLinear, **options)}


def load_by_position(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a full-precision network's weights into its quantised version, entry by entry, whatever the names are.

    The order is that of the state dicts, the model's without the entries of its quantisers: their bounds and freezing
    state stay as they are. torchvision's networks have this order, and ours in full precision. Without BatchNorm's
    counters (``num_batches_tracked``), which older files have not, the model's stay as well.

    Args:
        model: receives the weights in place; a ResNet or MobileNet of this package, quantised or not.
        state: the full-precision network's state dict.

    Raises:
        TypeError: ``state`` is not a mapping of names to tensors.
        RuntimeError: two entries in the same place differ in shape, or one side has more of them: the message names the
            keys, and nothing is loaded.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(f"load_by_position: state must be a mapping of names to tensors, got {_summary(state)}")
    counted = any(key.endswith("num_batches_tracked") for key in state)
    quantizers = [name for name, m in model.named_modules() if isinstance(m, (LtsWeight, UnitActivation))]
    prefixes = tuple(f"{name}." for name in quantizers)
    own = [
        (key, value)
        for key, value in model.state_dict().items()
        if not key.startswith(prefixes) and (counted or not key.endswith("num_batches_tracked"))
    ]
    for (ours, target), (theirs, source) in itertools.zip_longest(own, state.items(), fillvalue=("", None)):
        if target is None:
            raise RuntimeError(f"load_by_position: the checkpoint goes on with {theirs} where the model has nothing")
        if source is None:
            raise RuntimeError(f"load_by_position: the checkpoint has nothing where the model goes on with {ours}")
        if target.shape != source.shape:
            raise RuntimeError(
                f"load_by_position: the checkpoint has {theirs} {tuple(source.shape)} where the model has {ours} "
                f"{tuple(target.shape)}"
            )
    with torch.no_grad():
        for (_, target), source in zip(own, state.values(), strict=True):
            target.copy_(source)


def _summary(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    other = next(key for key, value in state.items() if not isinstance(value, Tensor))
    return f"{type(state[other]).__name__} under {other!r}"


def check_images(where: str, input: Tensor, channels: int) -> None:
    check_floating(where, input=input)
    if input.dim() != 4 or input.shape[1] != channels:
        raise ValueError(f"{where}: input must be (N, {channels}, H, W), got shape {tuple(input.shape)}")


def init_convolution(module: nn.Module) -> None:
    """Weights from a normal distribution that keeps the variance of what flows backward; for ``nn.Module.apply``."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
