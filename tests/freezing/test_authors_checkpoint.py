"""The published keys, both ways: names and order, what is in them, going on from them, refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.freezing import (
    FreezeSchedule,
    FrozenSGD,
    LtsConv2d,
    LtsLinear,
    authors_state_dict,
    frozen_ratio,
    frozen_weights,
    initialize_,
    load_authors_state_dict,
    unpack_mask,
)

SCHEDULE = FreezeSchedule(1, 9, 1, momentum=0.9)
STATE = ["uW", "lW", "uA", "lA", "init", "prev_Qweight", "distance", "unchange_step", "saved_weight"]


def network(bits: int = 3, **options: Any) -> nn.Sequential:
    options |= {"bits": bits, "schedule": SCHEDULE}
    return nn.Sequential(
        LtsConv2d(3, 4, 3, bias=False, **options),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Flatten(), LtsLinear(5 * 4, 3, **options)),
    )


def images(count: int) -> Tensor:
    return torch.randn(count, 5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: Tensor, **options: Any) -> list[Tensor]:
    optimizer = FrozenSGD(model.parameters(), 0.02, momentum=0.5, **options)
    outputs = []
    for batch in steps:
        output = model(batch)
        model.zero_grad()
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


def trained(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = network(**options)
    initialize_(model, images(1)[0])
    train(model, images(6), masks=frozen_weights(model) if options.get("saved") is False else ())
    assert 0.3 < frozen_ratio(model) < 0.95
    return model


def test_keys_and_their_order() -> None:
    norm = [f"1.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    expected = ["0.weight", *(f"0.{key}" for key in STATE), *norm, "2.0.weight", "2.0.bias"]
    expected += [f"2.3.{key}" for key in ("weight", "bias", *STATE)]
    assert list(authors_state_dict(network())) == expected
    assert list(authors_state_dict(network(saved=False, frozen_step=True))) == expected
    assert list(authors_state_dict(LtsLinear(2, 3))) == ["weight", "bias", *STATE], "a layer by itself"
    assert list(authors_state_dict(nn.Linear(2, 3))) == ["weight", "bias"]


@pytest.mark.parametrize("frozen_step", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_contents(saved: bool, frozen_step: bool) -> None:
    model = trained(saved=saved, frozen_step=frozen_step)
    state, layer, quantizer = authors_state_dict(model), model[2][3], model[2][3].quantize_weight
    mask = unpack_mask(quantizer.frozen, layer.weight.shape)
    own = {key: state[f"2.3.{key}"] for key in ("weight", "bias", *STATE)}
    assert {tuple(own[key].shape) for key in ("weight", *STATE[5:])} == {(3, 20)}
    assert [tuple(own[key].shape) for key in STATE[:5]] == [(), (), (), (), (1,)]
    assert {value.dtype for value in own.values()} == {torch.float32}
    bounds = quantizer.upper, quantizer.lower, layer.quantize_input.upper, layer.quantize_input.lower
    assert [own[key].item() for key in STATE[:4]] == [bound.item() for bound in bounds]
    assert own["init"].item() == 0
    levels = own["prev_Qweight"]
    assert torch.equal(levels.mul(7).round().to(torch.uint8), quantizer.code)
    assert 0 <= levels.min() < levels.max() <= 1
    assert torch.equal(own["distance"], quantizer.distance)
    assert torch.equal(own["unchange_step"] != 0, mask)
    assert (own["unchange_step"].max() > 1) == frozen_step, "1 where the step is not kept"
    assert torch.equal(own["saved_weight"][mask], quantizer.effective(layer.weight)[mask])
    assert not any(value.requires_grad for value in own.values())


def test_before_the_initialisation() -> None:
    model = network()
    assert authors_state_dict(model)["0.init"].item() == 1
    other = trained()
    load_authors_state_dict(other, authors_state_dict(model))
    assert frozen_ratio(other) == 0
    with pytest.raises(ValueError, match="bounds not initialised"):
        other(images(1)[0])


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("target", [True, False])
def test_loaded_model_evaluates_alike(source: bool, target: bool) -> None:
    """With or without ``saved``, on either side."""
    model, other = trained(saved=source, frozen_step=True), network(saved=target, frozen_step=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the numbers of the schedule are not part of it
        load_authors_state_dict(other, authors_state_dict(model))
    assert frozen_ratio(other) == frozen_ratio(model)
    for a, b in zip(frozen_weights(model), frozen_weights(other), strict=True):
        assert torch.equal(a[1].frozen_step, b[1].frozen_step)
        assert b[1].counters.tolist() == [-1, a[1].counters[1].item()], "the step starts anew"
    batch = images(1)[0]
    assert torch.equal(model.eval()(batch), other.eval()(batch))
    ours, theirs = authors_state_dict(model), authors_state_dict(other)
    raw = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    # Without `saved` on one side the raw weights are gone where frozen, which nothing depends on.
    assert set(raw) <= {"0.weight", "2.3.weight"}
    assert bool(raw) == (source and not target)


def test_loaded_model_goes_on_as_the_source_with_its_step_reset() -> None:
    model, other = trained(), network()
    load_authors_state_dict(other, authors_state_dict(model))
    for _, transform in frozen_weights(model):
        transform.counters[0] = -1
    steps = images(12)[6:]
    for a, b in zip(train(model, steps), train(other, steps), strict=True):
        assert torch.equal(a, b)
    assert frozen_ratio(model) == frozen_ratio(other)


def test_the_loaded_model_shares_nothing_with_the_state() -> None:
    model, other = trained(), network()
    state = {key: value.clone() for key, value in authors_state_dict(model).items()}
    load_authors_state_dict(other, state)
    before = {key: value.clone() for key, value in state.items()}
    train(other, images(6))
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_float64_and_single_layer() -> None:
    layer, other = (LtsConv2d(2, 3, 3, groups=1, bits=2, schedule=SCHEDULE).double() for _ in range(2))
    initialize_(layer, torch.randn(2, 2, 5, 5, dtype=torch.float64))
    train(layer, torch.randn(5, 2, 2, 5, 5, dtype=torch.float64))
    load_authors_state_dict(other, authors_state_dict(layer))
    input = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    assert torch.equal(layer.eval()(input), other.eval()(input))


def test_refusals() -> None:
    model = network()
    state = authors_state_dict(trained())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"missing keys \['2\.3\.uW'\], unexpected keys \['2\.3\.up'\]"):
        load_authors_state_dict(model, {("2.3.up" if k == "2.3.uW" else k): v for k, v in state.items()})
    with pytest.raises(RuntimeError, match=r"shapes differ: 0\.saved_weight \(3, 3, 3\) for \(4, 3, 3, 3\)"):
        load_authors_state_dict(model, state | {"0.saved_weight": state["0.saved_weight"][0]})
    with pytest.raises(RuntimeError, match="missing keys"):
        load_authors_state_dict(model, model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing is loaded"
