"""How right the trained networks are at every setting, what an image costs there, and how many a second they do."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor import rank_tokens
from tersor.models import _tokens_data
from tersor.models._tokens_train import MLP_RATIO, SIZES, Config, Progress
from tersor.models.cf_vit import CFViT

THRESHOLDS = (0.0, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0)
KEEP_RATES = (0.5, 0.7, 1.0)
PRUNED = (3, 6, 9)  # blocks of SuperViT, counted from 0
SPLIT = 0.5  # share of CF-ViT's coarse tokens
BATCH, BATCHES = 256, 2  # images that are timed; at 64 plain ones do a third to 0.44 fewer a second
CHUNK = 250  # images that are judged at once


@dataclasses.dataclass(frozen=True)
class Setting:
    """A way to run a trained network; the numbers are arguments of its call."""

    label: str
    arguments: tuple[Any, ...]

    @torch.no_grad()
    def run(self, model: Any, images: Tensor) -> tuple[Tensor, int]:
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


def judge(config: Config, model: Any) -> list[dict[str, Any]]:
    """For every setting: accuracy (%) on the validation and on the test images, and how many of these looked twice."""
    model.eval()
    if isinstance(model, CFViT):
        model.selection = True
    points = []
    for setting in settings(config.method):
        point: dict[str, Any] = {"setting": setting.label}
        for part in ("validation", "test"):
            right = fine = 0
            images, labels = _tokens_data.fixed_set(part, config.test_images)
            for some, truth in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
                logits, unsure = setting.run(model, some.to(config.device))
                right, fine = right + int((logits.argmax(1).cpu() == truth).sum()), fine + unsure
            point[part] = 100 * right / len(labels)
        point["fine"] = fine / len(labels) if config.method == "CF-ViT" else None
        points.append(point)
    return points


def macs(config: Config, setting: Setting, fine: float) -> float:
    """Multiply-adds of all products of matrices for an image; ``fine`` is the share that goes through the fine pass.

    Of the last block as the models compute it: keys and values of all tokens, the rest for those that are used.
    """
    width, pixels = config.width, _tokens_data.PATCH**2
    classifier, mlp = width * len(_tokens_data.NAMES), 2 * int(MLP_RATIO * width) * width
    if config.method != "CF-ViT":
        size, rate = setting.arguments or (config.size, 1.0)
        count = (size // _tokens_data.PATCH) ** 2
        return count * pixels * width + _blocks(config, 1 + count, rate) + classifier
    count = (_tokens_data.SIDE // 32) ** 2
    split = math.ceil(SPLIT * count)
    coarse = count * pixels * width + _blocks(config, 1 + count) + classifier
    reused = split * (2 * width**2 + 2 * (1 + count) * width + 2 * mlp)  # the last coarse block, and the MLP for reuse
    again = reused + 4 * split * pixels * width + _blocks(config, 1 + count + 3 * split) + classifier
    return coarse + fine * again


def _blocks(config: Config, tokens: int, rate: float = 1.0) -> int:
    """Of all blocks; ``tokens`` go in, and those that prune keep the share ``rate``."""
    width, total = config.width, 0
    mlp = 2 * int(MLP_RATIO * width) * width
    for number in range(config.depth - 1):
        total += tokens * (4 * width**2 + 2 * tokens * width)
        if number in PRUNED and rate != 1:
            tokens = min(math.ceil(rate * tokens), tokens - 1) + 1
        total += tokens * mlp
    return total + 2 * tokens * width**2 + 2 * width**2 + 2 * tokens * width + mlp


Groups = dict[str, list[Progress]]  # of every method, a run for each seed


def measure(networks: Mapping[str, Sequence[tuple[Config, Any]]], groups: Groups, rounds: int, threads: int) -> None:
    """Writes into every point its ``macs`` per image and its ``speed``: images a second, the median of the rounds.

    From images of full size to logits, in batches of 256 test images. All networks and settings take turns, so that a
    disturbance of the machine meets all.
    """
    torch.set_num_threads(threads)
    jobs = [
        (model, setting, config, groups[method][number].points[place])
        for method, group in networks.items()
        for place, setting in enumerate(settings(method))
        for number, (config, model) in enumerate(group)
    ]
    for model, setting, config, _ in jobs:
        _seconds(model, setting, config.device, 1)  # warms up
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(rounds):
        for (model, setting, config, _), found in zip(jobs, times, strict=True):
            found.append(_seconds(model, setting, config.device, BATCHES))
    for (_, setting, config, point), found in zip(jobs, times, strict=True):
        point["macs"] = macs(config, setting, point["fine"] or 0.0)
        point["speed"] = BATCH * BATCHES / statistics.median(found)


def _seconds(model: Any, setting: Setting, device: str, count: int) -> float:
    images, _ = _tokens_data.fixed_set("test", BATCH * BATCHES)
    batches = [some.to(device) for some in images.split(BATCH)[:count]]
    _wait(device)
    begin = time.perf_counter()
    for batch in batches:
        setting.run(model, batch)
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def compare(groups: Groups) -> None:
    """Writes into the points of CF-ViT and SuperViT how much better they are than plain networks of the same seed.

    ``"against plain by seconds"`` and ``"... by macs"`` are of the test images, with ``" (validation)"`` behind of the
    validation images; None where every plain network costs more.
    """
    plain = [runs for method, runs in groups.items() if method.startswith("ViT")]
    for method in ("CF-ViT", "SuperViT"):
        for number, run in enumerate(groups[method]):
            for point in run.points:
                for name, cost in (("seconds", _seconds_per_image), ("macs", _macs)):
                    for part, suffix in (("test", ""), ("validation", " (validation)")):
                        rivals = [(cost(runs[number].points[0]), runs[number].points[0][part]) for runs in plain]
                        there = frontier(rivals, cost(point))
                        key = f"against plain by {name}{suffix}"
                        point[key] = None if there is None else point[part] - there


def _seconds_per_image(point: Mapping[str, Any]) -> float:
    return 1 / point["speed"]


def _macs(point: Mapping[str, Any]) -> float:
    return float(point["macs"])


def frontier(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """The highest value of a point, or of a mixture of two, that costs no more on average; None if there is none."""
    found = [value for own, value in points if own <= cost]
    for low, value in points:
        for high, other in points:
            if low < cost < high:
                found.append(value + (other - value) * (cost - low) / (high - low))
    return max(found, default=None)


def best(groups: Groups, method: str, cost: str) -> int:
    """The setting that gains most over plain networks, on the validation images: the test decides nothing.

    ``cost`` is ``"seconds"`` or ``"macs"``.
    """
    key = f"against plain by {cost} (validation)"
    gains = []
    for points in zip(*(run.points for run in groups[method]), strict=True):
        each = [point[key] for point in points]
        gains.append(-math.inf if None in each else statistics.fmean(each))
    return gains.index(max(gains))


class Sample(NamedTuple):
    """A test image and what CF-ViT does with it."""

    image: Tensor  # (SIDE, SIDE)
    label: int
    first: int  # the coarse pass's answer
    last: int
    confidence: float  # of the first
    unsure: bool
    split: list[int]  # coarse tokens, numbered row by row, that the fine pass replaces; empty if sure


@torch.no_grad()
def samples(config: Config, model: CFViT, threshold: float, count: int = 6) -> list[Sample]:
    """The first test images that leave early, then the first that do not: up to ``count`` of each."""
    images, labels = _tokens_data.fixed_set("test", config.test_images)
    images = images[:CHUNK].to(config.device)
    found, first = model.infer(images, threshold), model.infer(images, 0.0).logits.argmax(1)
    order = _split(model, images)
    sure = (~found.unsure).nonzero().flatten().tolist()[:count]
    return [
        Sample(
            images[i, 0].cpu(),
            int(labels[i]),
            int(first[i]),
            int(found.logits[i].argmax()),
            float(found.confidence[i]),
            bool(found.unsure[i]),
            sorted(order[i].tolist()) if found.unsure[i] else [],
        )
        for i in (*sure, *found.unsure.nonzero().flatten().tolist()[:count])
    ]


@torch.no_grad()
def coverage(config: Config, model: CFViT) -> float:
    """The share of the windows' pixels that is in the coarse tokens which would be split; mean of the test images."""
    shares = []
    for images in _tokens_data.fixed_set("test", config.test_images)[0].split(CHUNK):
        inside = images.ne(0).float().unfold(2, 32, 32).unfold(3, 32, 32).sum((1, 4, 5)).flatten(1)  # pixels by token
        split = inside.gather(1, _split(model, images.to(config.device)).cpu()).sum(1)
        shares += (split / inside.sum(1))[inside.sum(1) > 0].tolist()  # some windows are flat
    return statistics.fmean(shares)


def _split(model: CFViT, images: Tensor) -> Tensor:
    """The coarse tokens ``(B, k)`` that the fine pass would replace, by falling class attention."""
    scores = model.coarse_pass(model.check_images(images, None)).scores
    assert scores is not None  # selection is on
    return rank_tokens(scores)[:, : math.ceil(SPLIT * scores.shape[1])]
