"""Times that can be compared: calls take turns in rounds, and the median of each is what it takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 9
LEAST = 2e-3  # seconds of a round's share: shorter calls are repeated
MOST = 5.0  # seconds after which no round is begun, if there were three


@torch.inference_mode()
def medians(calls: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of one call of each."""
    repeats = {}
    for name, call in calls.items():
        call()  # what is made once
        repeats[name] = max(1, math.ceil(LEAST / max(_seconds(call, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - begin > MOST:
            break
        for name, call in calls.items():
            found[name].append(_seconds(call, repeats[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def _seconds(call: Callable[[], Any], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times


def model_medians(models: Mapping[str, nn.Module], input: Tensor, rounds: int = ROUNDS) -> dict[str, float]:
    """Of one forward pass of each model."""

    def call(model: nn.Module) -> Callable[[], Any]:
        return lambda: model(input)

    return medians({name: call(model.eval()) for name, model in models.items()}, rounds)
