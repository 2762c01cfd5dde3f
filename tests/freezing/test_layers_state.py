"""Layers that freeze their weights: resuming, copies, use as a parametrization, torch's transforms."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from lts_network import SCHEDULE, assert_same_state, batches, lts_layers, network, optimizers, step, trained
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.freezing import FreezeSchedule, LtsConv2d, LtsWeight, frozen_ratio, frozen_weights, initialize_, refresh_

# Resuming, copies


def through_torch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    torch_format = pytest.importorskip("safetensors.torch")
    return torch_format.load(torch_format.save(state))


@pytest.mark.parametrize("steps", [None, 0, 2, 9])
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("saved", [True, False])
def test_resumed_run_goes_on_bit_for_bit(steps: int | None, through: Any, saved: bool) -> None:
    """``None`` is before the initialisation."""
    data = batches(14)

    def start(model: nn.Module) -> None:
        initialize_(model, data[0][0])

    model, other = network(saved=saved, frozen_step=True), network(saved=saved, frozen_step=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    chosen, others = optimizers(model, not saved), optimizers(other, not saved)
    if steps is not None:
        start(model)
    for batch in data[: steps or 0]:
        step(model, chosen, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through(model.state_dict()))
    for ours, theirs in zip(others, chosen, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    if steps is None:
        start(model)
        start(other)
    for batch in data[steps or 0 :]:
        assert torch.equal(step(model, chosen, batch), step(other, others, batch))
    assert_same_state(model, other)
    assert frozen_ratio(model) > 0.5


def test_other_schedule_at_resume_warns() -> None:
    state = trained(5).state_dict()
    other = network(schedule=FreezeSchedule(2, 8, 1, momentum=0.9))
    with pytest.warns(
        UserWarning, match=r"made with another FreezeSchedule than .*epochs=8.*: its step 4 goes on"
    ) as seen:
        other.load_state_dict(state)
    assert len(seen) == 3, "one for each layer"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network().load_state_dict(state)
        network(schedule=None).load_state_dict(state)
        other.load_state_dict(network(schedule=None).state_dict())
        again = network(schedule=FreezeSchedule(2, 8, 1, momentum=0.9))
        again.load_state_dict(other.state_dict())


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copied, pickled])
def test_copies_go_on_by_themselves(make: Any) -> None:
    model = trained(9)
    refresh_(model)
    other = make(model)
    chosen, others = optimizers(model), optimizers(other)
    for batch in batches(4):
        first = step(model, chosen, batch)
        assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        assert torch.equal(first, step(other, others, batch))
    assert_same_state(model, other)


# Parametrization


def test_parametrization_of_any_layer() -> None:
    torch.manual_seed(0)
    plain, quantizer = nn.Conv1d(3, 4, 3), LtsConv2d(3, 4, (1, 3), bits=2, schedule=SCHEDULE)
    with torch.no_grad():
        quantizer.weight.copy_(plain.weight[:, :, None])
    transform = LtsWeight(plain.weight, 2, SCHEDULE)
    parametrize.register_parametrization(plain, "weight", transform, unsafe=True)
    for module, input in ((plain, torch.randn(2, 3, 8)), (quantizer, torch.randn(2, 3, 1, 8))):
        initialize_(module, input)
    ((parameter, found),) = frozen_weights(plain)
    assert (parameter, found) == (plain.parametrizations.weight.original, transform)
    optimizer = torch.optim.SGD([parameter], 0.1)
    for i in range(13):
        gradient = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(i))
        weight = plain.weight
        expected = quantizer.quantize_weight(quantizer.weight)
        assert torch.equal(weight, expected[:, :, 0])
        optimizer.zero_grad()
        weight.backward(gradient)
        quantizer.zero_grad()
        expected.backward(gradient[:, :, None])
        optimizer.step()
        with torch.no_grad():
            quantizer.weight.sub_(0.1 * quantizer.weight.grad)
    assert frozen_ratio(plain) == frozen_ratio(quantizer) > 0.5


def test_parametrized_weight_counts_each_reading_as_a_step() -> None:
    layer = nn.Linear(3, 2)
    transform = LtsWeight(layer.weight, 4, SCHEDULE, saved=False)
    parametrize.register_parametrization(layer, "weight", transform, unsafe=True)
    input = torch.randn(5, 3)
    initialize_(layer, input)
    with parametrize.cached():
        layer(input)
        layer(input)
    assert int(transform.counters[0]) == 0
    layer(input)
    assert int(transform.counters[0]) == 1
    layer.eval()
    layer(input)
    assert int(transform.counters[0]) == 1
    state = layer.state_dict()
    other = nn.Linear(3, 2)
    parametrize.register_parametrization(
        other, "weight", LtsWeight(other.weight, 4, SCHEDULE, saved=False), unsafe=True
    )
    other.load_state_dict(state)
    assert torch.equal(other.eval()(input), layer(input))


# Transforms of torch


def test_compiled_training_is_the_eager_one() -> None:
    model, other = network(), network()
    data = batches(6)
    for each in (model, other):
        initialize_(each, data[0][0])
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    chosen, others = optimizers(model), optimizers(other)
    for batch in data:
        assert torch.equal(step(model, chosen, batch), step(compiled, others, batch))
        assert_same_state(model, other)
    assert frozen_ratio(other) > 0
    with torch.no_grad():
        assert torch.equal(compiled(data[0][0]), model(data[0][0]))
        assert torch.equal(compiled.eval()(data[1][0]), model.eval()(data[1][0]))
    assert_same_state(model, other)


def test_exported_evaluation() -> None:
    model, image = trained(9).eval(), batches(1)[0][0]
    exported = torch.export.export(model, (image,))
    assert torch.equal(exported.module()(image), model(image))


def test_autocast_and_float64() -> None:
    model, batch = trained(6), batches(1)[0]
    refresh_(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch[0])
    assert output.dtype == torch.bfloat16
    model.zero_grad()
    output.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    double = network().double()
    assert initialize_(double, batch[0].double()).dtype == torch.float64
    step(double, optimizers(double), (batch[0].double(), batch[1]))


def test_loading_forgets_the_plan() -> None:
    model = network()
    initialize_(model, batches(1)[0][0])
    early = copy.deepcopy(model.state_dict())
    chosen = optimizers(model)
    for batch in batches(14):
        step(model, chosen, batch)
    assert any(plan.level != "dense" for plan in refresh_(model).values())
    model.load_state_dict(early)
    assert all(layer.plan is None for layer in lts_layers(model)), "or free weights would get no gradient"


def test_half_weights_keep_an_exact_state() -> None:
    model, (image, target) = trained(6), batches(1)[0]
    before = [(layer.quantize_weight.distance.clone(), layer.quantize_weight.settings) for layer in lts_layers(model)]
    model.to(torch.bfloat16)
    for layer, (distance, settings) in zip(lts_layers(model), before, strict=True):
        assert torch.equal(layer.quantize_weight.distance, distance)
        assert torch.equal(layer.quantize_weight.settings, settings)
        assert layer.quantize_weight.saved.dtype == torch.bfloat16
    model.load_state_dict(model.state_dict())
    step(model, optimizers(model), (image.bfloat16(), target))
    model.double()
    step(model, optimizers(model), (image.double(), target))


def test_channels_last_weights() -> None:
    model, other = network(), network().to(memory_format=torch.channels_last)
    assert other[0].weight.stride() == (27, 1, 9, 3)
    for each in (model, other):
        initialize_(each, batches(1)[0][0])
    chosen, others = optimizers(model), optimizers(other)
    for batch in batches(9):
        torch.testing.assert_close(step(model, chosen, batch), step(other, others, batch), rtol=1e-4, atol=1e-4)
    assert 0.3 < frozen_ratio(other) == frozen_ratio(model)
