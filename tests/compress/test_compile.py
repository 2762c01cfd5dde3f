"""torch.compile of whole prepared and converted models: one graph, no step compiled anew, the eager results."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from compressed_models import STEPS, images, prepared, trained
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tersor import compress
from tersor.compress.layers import CompressedLayer

# Each transform once, on one model or the other, with the levels of "lts" further down. The ViT has no convolutions
# between its ends, which ReCU is for.
CASES = [("vit", "lsq-srste"), ("resnet", "ddtb-lbc"), ("resnet", "recu"), ("vit", "reste")]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(model: Any, seed: int) -> Tensor:
    return F.cross_entropy(model(images(4, seed)), torch.arange(4))


def differences(model: nn.Module, other: nn.Module) -> float:
    """The greatest between two models' gradients, against the greatest of the parameter's gradient."""
    found = 0.0
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            scale = theirs.grad.abs().max().clamp(min=1e-6)
            found = max(found, float((ours.grad - theirs.grad).abs().max() / scale))
    return found


def train_both(model: nn.Module, compiled: Any, seeds: range) -> list[float]:
    """Training steps of both in step; the differences of the losses and gradients."""
    reference = copy.deepcopy(model)
    models = ((model, compiled), (reference, reference))
    optimizers = [torch.optim.SGD(compress.parameter_groups(each), lr=0.05) for each, _ in models]
    found = []
    for seed in seeds:
        losses = []
        for (_, called), optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(loss_of(called, seed))
            losses[-1].backward()
        found.append(float((losses[0] - losses[1]).abs()) + differences(model, reference))
        for (each, _), optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            compress.step(each)
    return found


@pytest.mark.parametrize(("kind", "transforms"), CASES)
def test_training_compiles_once_and_evaluation_once(kind: str, transforms: str) -> None:
    model = prepared(kind, transforms)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # The same operators in the same order; of ReSTE's gradient a compiled graph has the formula in plain torch.
    bound = 1e-5 if transforms == "reste" else 0.0
    assert max(train_both(model, compiled, range(3))) <= bound
    assert counter.frame_count == 1
    model.eval()
    with torch.no_grad():
        assert compiled(images(4, 9)).equal(model(images(4, 9)))
    assert counter.frame_count == 2


def test_a_new_plan_compiles_anew_and_a_step_without_one_does_not() -> None:
    model = prepared("vit", "all")
    layers = [module for module in model.modules() if isinstance(module, CompressedLayer)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts, levels = [], []
    for seed in range(STEPS):
        assert train_both(model, compiled, range(seed, seed + 1)) == [0.0]
        counts.append(counter.frame_count)
        levels.append([None if layer.plan is None else layer.plan.level for layer in layers])
    assert any(level not in (None, "dense") for level in levels[-1]), "nothing was frozen"
    assert counts[0] == counts[1] == 1  # the plan is made after the second step
    for before, after in ((1, 2), (3, 4)):
        assert counts[after] <= counts[before] + 1
        assert counts[after + 1] == counts[after]


def test_inductor_gives_the_eager_results_but_for_rounding() -> None:
    model = prepared("vit", "lsq-srste")
    compiled: Any = torch.compile(model, fullgraph=True)
    # 8-bit inputs, 0.4% of the range a level: a value that rounding moves to the next one is far within this.
    assert max(train_both(model, compiled, range(2))) <= 0.02
    model.eval()
    with torch.no_grad():
        expected = model(images(4, 9))
        torch.testing.assert_close(compiled(images(4, 9)), expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "transforms"), [("resnet", "all"), ("vit", "srste"), ("resnet", "recu")])
def test_a_converted_model_takes_any_batch_without_compiling_anew(kind: str, transforms: str) -> None:
    model = compress.convert_(trained(kind, transforms))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = images(4)
    torch._dynamo.mark_dynamic(first, 0)
    with torch.no_grad():
        assert compiled(first).equal(model(first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (2, 7, 15):  # from 16 on torch itself takes another kernel for a plain convolution
                assert compiled(images(batch, 1)).equal(model(images(batch, 1)))
