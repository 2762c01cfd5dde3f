"""Prepared models that compute their blocks again in the backward pass, or several times before a step."""

from __future__ import annotations

from typing import Any

import distributed_training as training
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tersor import compress


class Again(nn.Module):
    """Its module, computed again in the backward pass."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self.module, input, use_reentrant=False)


def again(model: Any) -> Any:
    """The same model with its blocks computed twice."""
    if isinstance(model, training.Convolutions):
        model.first, model.second = Again(model.first), Again(model.second)
    else:
        model.blocks[0] = Again(model.blocks[0])
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".module.", "."): value for name, value in model.state_dict().items()}


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = state_of(found), state_of(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("model", "recipe"), training.CASES)
def test_blocks_that_are_computed_again_change_nothing(model: str, recipe: str) -> None:
    plain, found = training.prepared(model, recipe), again(training.prepared(model, recipe))
    expected = training.train(plain, training.optimizer_of(plain))
    assert training.train(found, training.optimizer_of(found)) == expected
    assert_same(found, plain)


def train_by_halves(model: nn.Module) -> list[float]:
    """Each step's gradients are those of two forward and two backward passes."""
    optimizer, losses = training.optimizer_of(model), []
    for step in range(training.STEPS + 3):
        optimizer.zero_grad()
        images, labels = training.data(step)
        parts = zip(images.chunk(2), labels.chunk(2), strict=True)
        for half, label in parts:
            loss = F.cross_entropy(model(half), label) / 2
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        compress.step(model)
    return losses


@pytest.mark.parametrize("recipe", [each for each in training.RECIPES if "srste" not in each])
def test_gradients_of_several_passes_add_up_to_those_of_one(recipe: str) -> None:
    whole, found = training.prepared("convolutions", recipe), again(training.prepared("convolutions", recipe))
    expected = []
    optimizer = training.optimizer_of(whole)
    for step in range(training.STEPS + 3):
        images, labels = training.data(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(whole(images), labels)
        loss.backward()
        optimizer.step()
        compress.step(whole)
        expected.append(loss.item())
    losses = train_by_halves(found)
    sums = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)
    masks = {name: value for name, value in state_of(found).items() if not value.is_floating_point()}
    assert masks
    for name, value in masks.items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_the_decay_of_srste_comes_with_every_backward_pass() -> None:
    model = training.prepared("convolutions", "srste")
    layer = model.first[2]
    dropped = layer.sparsified_weight() == 0
    images, labels = training.data(0)
    gradients = []
    for passes in (1, 2):
        model.zero_grad()
        for _ in range(passes):
            (0 * F.cross_entropy(model(images), labels)).backward()
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(gradients[0][dropped], layer.sparsity.decay * layer.weight[dropped].detach())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["all", "recu"])
def test_blocks_that_are_computed_again_compile(recipe: str) -> None:
    torch._dynamo.reset()
    plain, found = (training.prepared("convolutions", recipe) for _ in range(2))
    again(found).first.compile(backend="aot_eager")
    optimizers = training.optimizer_of(plain), training.optimizer_of(found)
    for step in range(3):
        images, labels = training.data(step)
        losses = []
        for model, optimizer in zip((plain, found), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            compress.step(model)
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    masks = {name: value for name, value in state_of(found).items() if not value.is_floating_point()}
    for name, value in masks.items():
        assert torch.equal(value, plain.state_dict()[name]), name
