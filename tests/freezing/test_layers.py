"""Layers that freeze their weights: formulas, bounds, training, what a plan leaves out."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lts_network import SCHEDULE, batches, lts_layers, network, optimizers, step, trained
from torch import Tensor, nn

from tersor.freezing import (
    FreezeSchedule,
    LtsConv2d,
    LtsLinear,
    LtsWeight,
    UnitActivation,
    freeze_plan,
    frozen_ratio,
    frozen_weights,
    initialize_,
    refresh_,
    unpack_mask,
)
from tersor.quantization import fake_quantize_bounds

# What the layers compute


def quantized(layer: Any, input: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weight of a layer's product, by the other family's operator."""
    activation, transform = layer.quantize_input, layer.quantize_weight
    x = fake_quantize_bounds(input, activation.lower, activation.upper, activation.bits, rule="unit")
    bounds = transform.lower, transform.upper
    return x, fake_quantize_bounds(layer.weight, *bounds, transform.bits, rule="unit", signed=True)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_convolution(bits: int) -> None:
    window = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": 2}
    layer = LtsConv2d(4, 6, (3, 2), bits=bits, **window)
    input = torch.randn(2, 4, 7, 9, requires_grad=True)
    output = initialize_(layer, input.detach())
    x, weight = quantized(layer, input)
    expected = F.conv2d(x, weight, layer.bias, **window)
    assert torch.equal(output, expected), "the padding is the lower bound's level"
    assert torch.equal(layer(input), expected)
    wanted = [input, layer.weight, layer.bias, *layer.quantize_weight.parameters(), *layer.quantize_input.parameters()]
    gradient = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(layer(input), wanted, gradient),
        torch.autograd.grad(expected, wanted, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear() -> None:
    layer, input = LtsLinear(5, 3, bits=4), torch.randn(2, 3, 5)
    output = initialize_(layer, input)
    x, weight = quantized(layer, input)
    assert torch.equal(output, F.linear(x, weight, layer.bias))
    assert output.shape == (2, 3, 3)


def test_activation_levels() -> None:
    activation, input = UnitActivation(2), torch.randn(2000).relu()
    output = initialize_(activation, input)
    assert output.unique().tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert torch.equal(activation(input), output)
    assert "bits=2" in repr(activation)


def test_32_bits_let_everything_pass() -> None:
    model, plain = network(bits=32), nn.Conv2d(3, 8, 3, padding=1, bias=False)
    plain.weight = model[0].weight
    batch = batches(1)[0]
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    initialize_(model, batch[0])
    assert torch.equal(model[0](batch[0]), plain(batch[0]))
    step(model, optimizers(model), batch)
    after = model[0].state_dict()
    assert [name for name in after if not torch.equal(before[name], after[name])] == ["weight"]


# Bounds


def test_initial_bounds() -> None:
    model, (image, _) = network(bits=3), batches(1)[0]
    output = initialize_(model, image)
    assert not output.requires_grad
    assert model.training
    input = image
    for layer in model:
        if isinstance(layer, (LtsConv2d, LtsLinear)):
            transform, activation = layer.quantize_weight, layer.quantize_input
            spread = 3 * layer.weight.std()
            assert (transform.upper.item(), transform.lower.item()) == (spread.item(), -spread.item())
            top = 3 * input.std() / math.sqrt(1 - 2 / math.pi)
            torch.testing.assert_close(activation.upper.detach(), top)
            assert activation.lower.item() == input.min().item()
            assert int(transform.counters[0]) == -1, "that was no step"
            assert torch.equal(transform.saved, layer.weight)
        with torch.no_grad():
            input = layer(input) if not isinstance(layer, (LtsConv2d, LtsLinear)) else product(layer, input)
    assert torch.equal(input, output), "each layer has seen what the quantised ones before it give"
    assert model[1].num_batches_tracked == 2, "once in the initialisation, once here"


def product(layer: Any, input: Tensor) -> Tensor:
    x, weight = quantized(layer, input)
    if isinstance(layer, LtsLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize("training", [True, False])
def test_initialisation_leaves_the_mode_as_it_was(training: bool) -> None:
    model = network().train(training)
    initialize_(model, batches(1)[0][0])
    assert model.training == training
    with pytest.raises(RuntimeError, match="channels"):
        initialize_(model, torch.randn(2, 7, 5, 5))
    assert model.training == training
    assert not any(m.initializing for m in model.modules() if isinstance(m, (LtsWeight, UnitActivation)))


def test_initialisation_refuses() -> None:
    with pytest.raises(ValueError, match="model must hold LTS layers, got Linear without one"):
        initialize_(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="weight must have at least two elements for a deviation, got 1"):
        initialize_(LtsLinear(1, 1), torch.randn(4, 1))
    with pytest.raises(ValueError, match="input must have at least two elements for a deviation, got 1"):
        initialize_(LtsLinear(1, 3), torch.randn(1, 1))


@pytest.mark.parametrize("training", [True, False])
def test_bounds_that_were_not_initialised(training: bool) -> None:
    model, image = network().train(training), batches(1)[0][0]
    with pytest.raises(ValueError, match=r"bounds not initialised: run tersor\.freezing\.initialize_"):
        model(image)
    with pytest.raises(ValueError, match="bounds not initialised"):
        LtsWeight(torch.randn(3, 2), 4)(torch.randn(3, 2))
    initialize_(model, image)
    with torch.no_grad():
        model[0].quantize_weight.upper.fill_(-9.0)
    with pytest.raises(ValueError, match=r"^lts_quantize: lower must be less than upper, got lower -.* and upper -9"):
        model(image)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="LtsWeight: bits must be 2 to 8, or 32 for none, got 9"):
        LtsLinear(3, 2, bits=9)
    with pytest.raises(TypeError, match="schedule must be a FreezeSchedule or None, got dict"):
        LtsLinear(3, 2, schedule={})
    for options in ({"padding_mode": "reflect"}, {"padding": "same"}):
        with pytest.raises(ValueError, match="LtsConv2d: padding must be numbers, of mode 'zeros'"):
            LtsConv2d(3, 2, 3, **options)


# Training


def test_either_optimiser_gives_the_same_run() -> None:
    first, second = network(), network(saved=False)
    assert len(second.state_dict()) == len(first.state_dict()) - 3, "no copy of the weights"
    steps = batches(14)
    for model in (first, second):
        initialize_(model, steps[0][0])
    sgd, frozen_sgd = optimizers(first), optimizers(second, frozen=True)
    for batch in steps:
        assert torch.equal(step(first, sgd, batch), step(second, frozen_sgd, batch))
    assert 0.5 < frozen_ratio(first) == frozen_ratio(second) < 1
    for a, b in zip(lts_layers(first), lts_layers(second), strict=True):
        mask = unpack_mask(a.quantize_weight.frozen, a.weight.shape)
        assert torch.equal(mask, unpack_mask(b.quantize_weight.frozen, b.weight.shape))
        assert torch.equal(a.quantize_weight.effective(a.weight), b.weight)
        assert b.quantize_weight.effective(b.weight) is b.weight
        assert torch.equal(a.weight[~mask], b.weight[~mask])
        assert not torch.equal(a.weight[mask], b.weight[mask]), "SGD moves the raw weights on"


def test_frozen_weights_and_ratio() -> None:
    model = trained(8, frozen_step=True)
    layers = lts_layers(model)
    assert [(id(p), id(t)) for p, t in frozen_weights(model)] == [(id(m.weight), id(m.quantize_weight)) for m in layers]
    masks = [unpack_mask(m.quantize_weight.frozen, m.weight.shape) for m in layers]
    count = sum(int(mask.sum()) for mask in masks)
    assert count > 0
    assert frozen_ratio(model) == count / sum(mask.numel() for mask in masks)
    for mask, layer in zip(masks, layers, strict=True):
        steps = layer.quantize_weight.frozen_step
        assert torch.equal(steps != 0, mask)
        assert steps[mask].min() >= SCHEDULE.warmup_steps + 1
        assert steps.max() <= 7, "of the 8 steps, counted from 0"
    assert frozen_ratio(nn.Linear(2, 2)) == 0.0


def test_nothing_freezes_without_a_schedule_or_in_the_warm_up() -> None:
    assert frozen_ratio(trained(8, schedule=None)) == 0.0
    assert frozen_ratio(trained(SCHEDULE.warmup_steps + 1)) == 0.0
    assert frozen_ratio(trained(SCHEDULE.warmup_steps + 2)) > 0.0


def test_evaluation_changes_no_state_but_saved() -> None:
    model = trained(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        output = model(batches(1)[0][0])
        assert torch.equal(model(batches(1)[0][0]), output)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.endswith(".saved")}
    for layer in lts_layers(model):
        assert torch.equal(layer.quantize_weight.saved, layer.quantize_weight.effective(layer.weight))


# Plans


@pytest.mark.parametrize(
    ("granularity", "found", "forced"),
    [
        ("tile", {"tiles", "rows", "columns"}, None),
        ("channel", {"rows"}, None),
        ("layer", {"layer"}, None),
        ("tile", {"tiles"}, "tiles"),
        ("element", {"columns"}, "columns"),
    ],
)
def test_plans_give_the_dense_masked_gradient(granularity: str, found: set[str], forced: str | None) -> None:
    """Before each step a copy without plans computes the same batch's gradients."""
    schedule = FreezeSchedule(1, 24, 1, granularity=granularity, tile=(2, 4), quantile=0.5, momentum=0.9)
    model, steps, levels = network(schedule=schedule), batches(24), set()
    initialize_(model, steps[0][0])
    chosen = optimizers(model)
    for i, batch in enumerate(steps):
        if i % 3 == 2:
            plans = refresh_(model)
            assert list(plans) == ["0", "3", "6"]
            if forced:
                force(model[0], forced)
                force(model[6], forced)
            levels |= {layer.plan.level for layer in lts_layers(model)}
        dense = copy.deepcopy(model)
        for layer in lts_layers(dense):
            layer.plan = None
        expected = step(dense, [], batch)
        assert torch.equal(step(model, chosen, batch), expected)
        for layer, other in zip(lts_layers(model), lts_layers(dense), strict=True):
            if layer.plan is not None and layer.plan.level == "layer":
                assert layer.weight.grad is None
                assert not other.weight.grad.any()
            else:
                torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-6)
            for name in ("lower", "upper"):  # of the input: a plan leaves out nothing of these
                ours, theirs = (getattr(m.quantize_input, name).grad for m in (layer, other))
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert levels & found, f"only {levels}"
    assert frozen_ratio(model) > 0.5


def force(layer: Any, level: str) -> None:
    layer.plan = freeze_plan(layer.quantize_weight.frozen, layer.weight.shape, (2, 4), level=level)


def test_plan_of_a_layer_without_a_schedule() -> None:
    model = trained(14)
    for layer in lts_layers(model):
        layer.quantize_weight.schedule = None
    plans = refresh_(model)
    for layer in lts_layers(model):
        expected = freeze_plan(layer.quantize_weight.frozen, layer.weight.shape, groups=getattr(layer, "groups", 1))
        assert layer.plan.level == expected.level
    assert plans["3"].level in ("dense", "layer"), "which are all that several groups allow"


class Kept:
    """The sizes of what autograd keeps for the backward pass."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.numel())
        return tensor

    def __exit__(self, *reason: Any) -> None:
        self.hooks.__exit__(*reason)


@pytest.mark.parametrize(
    ("layer", "shape"), [(LtsConv2d(3, 5, 3, bits=2), (4, 3, 6, 6)), (LtsLinear(6, 5, bits=2), (4, 7, 6))]
)
def test_frozen_layer_keeps_no_input(layer: Any, shape: tuple[int, ...]) -> None:
    layer.quantize_weight.schedule = FreezeSchedule(1, 9, growth="fixing", rate=1e6, granularity="layer", momentum=0)
    input = torch.randn(shape)
    initialize_(layer, input)
    kept = []
    for _ in range(4):
        refresh_(layer)
        with Kept() as seen:
            output = layer(input)
        output.sum().backward()
        kept.append(seen.sizes.count(input.numel()))
    assert layer.plan.level == "layer"
    assert kept == [2, 2, 1, 1], "the raw input for its bounds, and the quantised one until all is frozen"
    steps = int(layer.quantize_weight.counters[0])
    layer.zero_grad()
    layer(input).sum().backward()
    assert all(p.grad is None for p in (layer.weight, *layer.quantize_weight.parameters()))
    assert all(p.grad.any() for p in (layer.bias, *layer.quantize_input.parameters()))
    assert int(layer.quantize_weight.counters[0]) == steps, "nothing is left to be counted for"


def test_the_constant_weight_follows_its_sources() -> None:
    """A layer that is frozen as a whole quantises its weight once, and anew when a bound or the weight changes."""
    layer = LtsLinear(6, 5, bits=2, schedule=FreezeSchedule(1, 9, growth="fixing", rate=1e6, granularity="layer"))
    input = torch.randn(4, 6)
    initialize_(layer, input)
    for _ in range(3):
        layer(input)
    refresh_(layer)
    assert layer.plan.level == "layer"
    first = layer._quantized_weight()
    assert layer._quantized_weight() is first
    with torch.no_grad():
        layer.quantize_weight.upper.mul_(3)
    changed = layer._quantized_weight()
    assert changed is not first
    layer.eval()
    assert torch.equal(layer._quantized_weight(), changed)
