"""How right the trained networks are at every setting, what an image costs there, and how many a second they do."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.models import _tokens_data
from tersor.models._tokens_train import MLP_RATIO, SIZES, Config
from tersor.models.cf_vit import CFViT

THRESHOLDS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
KEEP_RATES = (0.5, 0.7, 1.0)
PRUNED = (3, 6, 9)  # blocks of SuperViT, counted from 0
SPLIT = 0.5  # share of CF-ViT's coarse tokens
BATCH, BATCHES = 64, 8  # images that are timed


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run a trained network; the numbers are arguments of its call."""

    label: str
    arguments: tuple[Any, ...]

    @torch.no_grad()
    def run(self, model: nn.Module, images: Tensor) -> tuple[Tensor, int]:
        """Logits, and how many images went through the fine pass."""
        if isinstance(model, CFViT):
            found = model.infer(images, *self.arguments)
            return found.logits, int(found.unsure.sum())
        return model(images, *self.arguments), 0


def settings(method: str) -> tuple[Setting, ...]:
    if method == "CF-ViT":
        return tuple(Setting(f"{threshold:g}", (threshold,)) for threshold in THRESHOLDS)
    if method == "SuperViT":
        return tuple(Setting(f"{size}, {rate:g}", (size, rate)) for size in SIZES for rate in KEEP_RATES)
    return (Setting("", ()),)


def judge(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    """For every setting: accuracy (%) on the validation and the test images; of the latter, cost and the fine share."""
    model.eval()
    if isinstance(model, CFViT):
        model.selection = True
    points = []
    for setting in settings(config.method):
        point: dict[str, Any] = {"setting": setting.label}
        for part in ("validation", "test"):
            right = fine = 0
            images, labels = _tokens_data.fixed_set(part, config.test_images)
            for some, truth in zip(images.split(250), labels.split(250), strict=True):
                logits, unsure = setting.run(model, some.to(config.device))
                right, fine = right + int((logits.argmax(1).cpu() == truth).sum()), fine + unsure
            point[part] = 100 * right / len(labels)
        point["fine"] = fine / len(labels) if config.method == "CF-ViT" else None
        points.append(point | {"macs": macs(config, setting, fine / len(labels))})
    return points


def macs(config: Config, setting: Setting, fine: float) -> float:
    """Multiply-adds of all products of matrices for an image; ``fine`` is the share that goes through the fine pass."""
    width, pixels = config.width, _tokens_data.PATCH**2
    if config.method == "CF-ViT":
        count = (_tokens_data.SIDE // 32) ** 2
        split = math.ceil(SPLIT * count)
        again = blocks(config, [1 + count + 3 * split] * config.depth, 1.0)
        again += 4 * split * pixels * width + split * 2 * int(MLP_RATIO * width) * width
        return blocks(config, [1 + count] * config.depth, 1.0) + count * pixels * width + fine * again
    size, rate = setting.arguments or (config.size, 1.0)
    count = (size // _tokens_data.PATCH) ** 2
    return blocks(config, [1 + count] * config.depth, rate) + count * pixels * width


def blocks(config: Config, tokens: list[int], rate: float) -> int:
    """Of all blocks and the classifier; ``tokens`` of every block, before those are dropped that ``rate`` does not keep."""
    width, total = config.width, config.width * len(_tokens_data.NAMES)
    for number in range(len(tokens)):
        total += 4 * tokens[number] * width**2 + 2 * tokens[number] ** 2 * width
        if number in PRUNED and rate != 1:
            left = min(math.ceil(rate * tokens[number]), tokens[number] - 1) + 1
            tokens[number:] = [left] * (len(tokens) - number)
        total += 2 * tokens[number] * int(MLP_RATIO * width) * width
    return total


Speeds = dict[tuple[str, str], list[float]]  # method and setting: images a second, of every seed


def measure(
    networks: Mapping[str, Sequence[tuple[Config, nn.Module]]], rounds: int, threads: int
) -> Speeds:
    """Images a second at batches of 64, from images of full size to logits; for every seed the median of the rounds.

    All networks and settings take turns, so that a disturbance of the machine meets all.
    """
    torch.set_num_threads(threads)
    jobs = [
        (method, seed, setting, config, model)
        for method, group in networks.items()
        for setting in settings(method)
        for seed, (config, model) in enumerate(group)
    ]
    times: dict[tuple[str, str, int], list[float]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for method, seed, setting, config, model in jobs:
            seconds = _seconds(model, setting, config.device)
            if turn:
                times.setdefault((method, setting.label, seed), []).append(seconds)
    speeds: Speeds = {}
    for (method, label, _), found in times.items():
        speeds.setdefault((method, label), []).append(BATCH * BATCHES / statistics.median(found))
    return speeds


def _seconds(model: nn.Module, setting: Setting, device: str) -> float:
    batches = list(_batches(device))
    _wait(device)
    begin = time.perf_counter()
    for images in batches:
        setting.run(model, images)
    _wait(device)
    return time.perf_counter() - begin


def _batches(device: str) -> Iterator[Tensor]:
    images, _ = _tokens_data.fixed_set("test", BATCH * BATCHES)
    return (some.to(device) for some in images.split(BATCH))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
