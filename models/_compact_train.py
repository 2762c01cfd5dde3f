"""The runs that ``train_compact_scores`` compares, and what their scores take after every epoch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tersor.models._sparsity_train import Config, Progress, Run, predict
from tersor.sparsity import nm_remove_


@dataclasses.dataclass
class Found:
    """Of one run; lists have an entry per epoch."""

    bytes: list[float] = dataclasses.field(default_factory=list)  # per weight, see _bytes
    stored: list[int] = dataclasses.field(default_factory=list)  # scores of a group
    returned: list[float] = dataclasses.field(default_factory=list)  # see _returned; full scores only
    loss: list[float] = dataclasses.field(default_factory=list)  # mean of the steps
    accuracy: float = math.nan  # on the test patches, at the end


def train(config: Config, report: Callable[[int, int], None] = lambda epoch, step: None) -> Found:
    """Trains one LBC network and looks at its scores on the way.

    Args:
        config: the run, of method ``"lbc"``.
        report: called after every step with the numbers of the epoch and of the step.
    """
    torch.set_num_threads(config.threads)
    run, progress, found = Run(config), Progress(), Found()
    assert run.schedule is not None
    for epoch in range(config.epochs):
        removed = run.schedule.removed  # in the epoch before, of which nothing is removed in the first
        gone = _lowest(run, removed) if config.share is None else []
        run.epoch(epoch, progress, lambda step, epoch=epoch: report(epoch, step))  # type: ignore[misc]
        found.bytes.append(_bytes(run))
        found.stored.append(run.schedule.layers[0].alpha.shape[1])
        if gone:
            found.returned.append(_returned(run, gone))
    run.schedule.finish()
    logits, labels = predict(run.model, config.test_patches)
    found.accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
    found.loss = progress.loss
    return found


def _bytes(run: Run) -> float:
    """Of the scores, their gradients, what the optimiser keeps of them and their numbers, per N:M weight."""
    assert run.schedule is not None
    total = weights = 0
    for layer in run.schedule.layers:
        state = run.optimizer.state[layer.alpha].values()
        tensors = [layer.alpha, layer.alpha.grad, layer.combinations, *state]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        weights += len(layer.alpha) * layer.m
    return total / weights


def _lowest(run: Run, removed: Sequence[int]) -> list[Tensor]:
    """Of every layer, which of its full scores are the lowest."""
    assert run.schedule is not None
    masks = []
    for layer, k in zip(run.schedule.layers, removed, strict=True):
        scores = layer.alpha.detach().clone()
        nm_remove_(scores, k, layer.n, layer.m)
        masks.append(scores == 0)
    return masks


def _returned(run: Run, gone: Sequence[Tensor]) -> float:
    """Share of the groups that now have a combination which was removed up to the epoch's start."""
    assert run.schedule is not None
    now = _lowest(run, run.schedule.removed)
    found = [(before & ~after).any(1) for before, after in zip(gone, now, strict=True)]
    return torch.cat(found).float().mean().item()
