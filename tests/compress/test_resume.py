"""A state dict brings back all that a training goes by, plans and scores among it."""

from __future__ import annotations

import io
from typing import Any

import distributed_training as training
import pytest
import torch
from torch import nn

from tersor import compress
from tersor.compress import FakeQuantize, Freeze
from tersor.sparsity.layers import NMScores


def plans(model: nn.Module) -> list[tuple[str, Any]]:
    found: list[Any] = [module.plan for module in model.modules() if getattr(module, "plan", None) is not None]
    return [(plan.level, None if plan.listed is None else plan.listed.tolist()) for plan in found]


@pytest.mark.parametrize("steps", [3, 4, 5, 7])
def test_a_run_that_was_saved_between_two_looks_at_the_masks_goes_on_exactly(steps: int) -> None:
    model = training.prepared("convolutions", "freeze by tile")
    optimizer = training.optimizer_of(model)
    training.train(model, optimizer, steps=range(steps))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    before = plans(model)
    expected = training.train(model, optimizer, steps=range(steps, 9))

    again = training.prepared("convolutions", "freeze by tile")
    optimizer = training.optimizer_of(again)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert plans(again) == before
    assert training.train(again, optimizer, steps=range(steps, 9)) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_an_earlier_state_brings_its_own_plan() -> None:
    """Else what has thawed by loading would get no gradient."""
    model = compress.prepare_(
        nn.Linear(8, 8), [FakeQuantize(3, method="lts"), Freeze(warmup=0, growth="fixing", rate=1.0, every=1)], steps=4
    )
    images = torch.randn(4, 8)
    compress.calibrate_(model, images)
    early = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # the first only begins the distances
        compress.step(model)
    assert model.plan.level == "layer"
    model.load_state_dict(early)
    model.zero_grad()
    model(images).square().sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.count_nonzero() > 0


def test_the_mask_of_a_removal_goes_with_its_scores() -> None:
    """Also where other scores, of the same version, take their place."""
    weight = torch.randn(4, 8)
    scores = NMScores(weight, 2, 4)
    scores.remove_(5)
    alpha = torch.zeros_like(scores.alpha)
    alpha[:, 0] = 1
    other = nn.Parameter(alpha.clone())
    while other._version < scores.alpha._version:
        torch.autograd.graph.increment_version(other)
    kept = NMScores(weight, 2, 4)
    kept.alpha = nn.Parameter(alpha)
    assert scores.alpha._version == other._version
    assert not torch.equal(scores(weight), kept(weight))
    scores.alpha = other
    assert torch.equal(scores(weight), kept(weight))
