"""Layers that freeze their weights: formulas, bounds, training, plans, resuming, copies, compilation."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.freezing import (
    FreezeSchedule,
    FrozenSGD,
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

SCHEDULE = FreezeSchedule(2, 7, 1, momentum=0.9)  # the first weight freezes in step 3, the third of the second epoch
BOUNDS = (".lower", ".upper")


def network(bits: int = 2, schedule: FreezeSchedule | None = SCHEDULE, **options: Any) -> nn.Sequential:
    """For ``(N, 3, 5, 5)`` images and 4 classes."""
    torch.manual_seed(0)
    options |= {"bits": bits, "schedule": schedule}
    return nn.Sequential(
        LtsConv2d(3, 8, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        LtsConv2d(8, 8, 3, stride=2, padding=1, groups=2, **options),
        nn.ReLU(),
        nn.Flatten(),
        LtsLinear(8 * 9, 4, **options),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 6, 3, 5, 5, generator=generator)
    return list(zip(images, torch.randint(0, 4, (count, 6), generator=generator), strict=True))


def optimizers(model: nn.Module, frozen: bool = False) -> list[torch.optim.Optimizer]:
    """SGD for the weights, with powers of two, of which a product is exact in any order; Adam for the bounds."""
    named = dict(model.named_parameters())
    others = [p for name, p in named.items() if not name.endswith(BOUNDS)]
    kind, options = (FrozenSGD, {"masks": frozen_weights(model)}) if frozen else (torch.optim.SGD, {})
    sgd = kind(others, lr=2**-5, momentum=0.5, weight_decay=2**-10, **options)
    return [sgd, torch.optim.Adam([p for name, p in named.items() if name.endswith(BOUNDS)], 1e-3)]


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    model.zero_grad()
    F.cross_entropy(output, batch[1]).backward()
    for optimizer in optimizers:
        optimizer.step()
    return output.detach()


def trained(steps: int, **options: Any) -> nn.Sequential:
    model = network(**options)
    initialize_(model, batches(1)[0][0])
    chosen = optimizers(model, frozen=options.get("saved") is False)
    for batch in batches(steps):
        step(model, chosen, batch)
    return model


def lts_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (LtsConv2d, LtsLinear))]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


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
    assert not any(p.grad.any() for p in (layer.weight, *layer.quantize_weight.parameters()))
    assert all(p.grad.any() for p in (layer.bias, *layer.quantize_input.parameters()))
    assert int(layer.quantize_weight.counters[0]) == steps, "nothing is left to be counted for"


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
