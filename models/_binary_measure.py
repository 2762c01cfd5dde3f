"""How many patches a second the networks of ``train_binary`` do: as trained, and packed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.models import _patches

BATCHES = (1, 64)
IMAGES = 64  # of a measurement

Speeds = dict[str, dict[int, float]]  # of every network and batch: patches a second


@torch.no_grad()
def measure(networks: Mapping[str, nn.Module], rounds: int, threads: int) -> Speeds:
    """The medians of the rounds. All networks take turns, so that a disturbance of the machine meets all."""
    torch.set_num_threads(threads)
    batches = {size: _patches.fixed_set("test", IMAGES)[0].split(size) for size in BATCHES}
    times: dict[tuple[str, int], list[float]] = {(name, size): [] for name in networks for size in BATCHES}
    for name, size in times:
        _seconds(networks[name], batches[size][:2])  # warms up
    for _ in range(rounds):
        for (name, size), found in times.items():
            found.append(_seconds(networks[name], batches[size]))
    return {name: {size: IMAGES / statistics.median(times[name, size]) for size in BATCHES} for name in networks}


def _seconds(model: nn.Module, batches: tuple[Tensor, ...]) -> float:
    model.eval()
    begin = time.perf_counter()
    for batch in batches:
        model(batch)
    return time.perf_counter() - begin
