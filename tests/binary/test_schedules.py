"""Schedules of tau and o against their formulas, and the two indicators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tersor.binary import (
    BinaryConv2d,
    BinaryLinear,
    BinarySchedule,
    Estimator,
    ReCUConv2d,
    ReSTEConv2d,
    estimating_error,
    gradient_stability,
    recu_tau,
    reste_o,
)


def test_tau_grows_from_its_minimum_and_does_not_reach_its_maximum() -> None:
    taus = [recu_tau(epoch, 7, 0.6, 0.9) for epoch in range(7)]
    for epoch, tau in enumerate(taus):
        assert tau == pytest.approx(0.6 + 0.3 * (math.e ** (epoch / 7) - 1) / (math.e - 1), rel=1e-14)
    assert taus[0] == 0.6
    assert taus == sorted(taus)
    assert taus[-1] < 0.9
    assert recu_tau(0, 1) == 0.85
    assert recu_tau(599, 600) == pytest.approx(0.99, abs=1e-3)


def test_o_grows_from_one() -> None:
    for epoch in range(7):
        expected = 1 + (1 - math.cos(math.pi / 2 * epoch / 7)) * 3
        assert reste_o(epoch, 7, 4.0) == pytest.approx(expected, rel=1e-14)
    assert reste_o(0, 9) == 1.0
    assert reste_o(8, 9, 1.0) == 1.0
    assert reste_o(998, 1000) == pytest.approx(3.0, abs=1e-2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: recu_tau(7, 7), ValueError, r"epoch must be from 0 to epochs - 1, got epoch 7 of 7"),
        (lambda: recu_tau(-1, 7), ValueError, r"got epoch -1 of 7"),
        (lambda: reste_o(0, 0), ValueError, r"reste_o: epoch must be from 0 to epochs - 1, got epoch 0 of 0"),
        (lambda: reste_o(0.5, 7), TypeError, r"reste_o: epoch must be an int, got float"),
        (lambda: recu_tau(0, 7, 0.5), ValueError, r"recu_tau: tau_min must be above 0\.5 and at most 1, got 0\.5"),
        (lambda: recu_tau(0, 7, math.nan), ValueError, r"tau_min must be above 0\.5 and at most 1, got nan"),
        (lambda: recu_tau(0, 7, "a"), TypeError, r"recu_tau: tau_min must be a number, got str"),
        (lambda: recu_tau(0, 7, 0.9, 0.8), ValueError, r"tau_max must be from tau_min 0\.9 to 1, got 0\.8"),
        (lambda: recu_tau(0, 7, 0.9, 1.1), ValueError, r"tau_max must be from tau_min 0\.9 to 1, got 1\.1"),
        (lambda: reste_o(0, 7, 0.9), ValueError, r"reste_o: o_end must be at least 1 and finite, got 0\.9"),
        (lambda: reste_o(0, 7, math.inf), ValueError, r"o_end must be at least 1 and finite, got inf"),
        (lambda: reste_o(0, 7, True), TypeError, r"o_end must be a number, got bool"),
        (lambda: BinarySchedule(nn.Conv2d(1, 1, 1), 7), ValueError, r"must hold binary layers, got Conv2d without one"),
        (lambda: BinarySchedule([], 7), TypeError, r"BinarySchedule: model must be a torch\.nn\.Module, got list"),
        (lambda: BinarySchedule(ReCUConv2d(1, 1, 3), 7, 0.4), ValueError, r"tau_min must be above 0\.5"),
        (lambda: BinarySchedule(ReCUConv2d(1, 1, 3), 7, o_end=0), ValueError, r"o_end must be at least 1"),
        (lambda: estimating_error([]), ValueError, r"estimating_error: weights must not be empty"),
        (lambda: estimating_error(torch.ones(2)), TypeError, r"weights must be an iterable of tensors, got one tensor"),
        (lambda: estimating_error([torch.ones(2)], 0.5), ValueError, r"o_end must be at least 1 and finite, got 0\.5"),
        (lambda: gradient_stability([None]), TypeError, r"gradients must be a torch\.Tensor, got NoneType"),
        (lambda: gradient_stability([torch.ones(1)]), ValueError, r"gradients must have at least 2 elements each"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_schedule_sets_every_layer() -> None:
    rule = Estimator("reste", 1.0, 2.0, 0.2)
    model = nn.Sequential(
        ReCUConv2d(1, 1, 3),
        ReSTEConv2d(1, 1, 3, t=1.25),
        nn.Sequential(
            ReSTEConv2d(1, 1, 3, act_bits32=True), BinaryLinear(2, 2, estimator="reste", weight_estimator=rule)
        ),
        BinaryConv2d(1, 1, 3, estimator="approx"),
    )
    schedule = BinarySchedule(model, 5, 0.7, 0.8, o_end=2.0)
    for epoch in (0, 3, 4, 1):  # also back, as after a restart
        if epoch:
            schedule.start_epoch(epoch)
        o = reste_o(epoch, 5, 2.0)
        torch.testing.assert_close(model[0].tau.item(), recu_tau(epoch, 5, 0.7, 0.8), rtol=1e-7, atol=0)
        assert model[1].estimator == Estimator("reste", o, 1.5, 0.1)
        assert model[1].weight_estimator == Estimator("reste", o, 1.25, 0.1)
        assert model[2][0].estimator is None
        assert model[2][0].weight_estimator.o == o
        assert model[2][1].estimator.o == o
        assert model[2][1].weight_estimator == rule._replace(o=o)
        assert model[3].estimator == model[3].weight_estimator == Estimator("approx")
    with pytest.raises(ValueError, match="got epoch 5 of 5"):
        schedule.start_epoch(5)


def test_indicators_add_up_over_layers() -> None:
    layers = [torch.randn(4, 3, 3, 3), torch.randn(7), torch.tensor([0.0, -8.0])]
    for o in (1.0, 3.0):
        expected = 0.0
        for w in layers:
            expected += math.sqrt(sum((abs(v) ** (1 / o) - 1) ** 2 for v in w.flatten().tolist() if v))
        torch.testing.assert_close(estimating_error(iter(layers), o).item(), expected, rtol=1e-5, atol=1e-6)
    assert estimating_error(layers).item() == pytest.approx(estimating_error(layers, 3).item())
    expected = sum(w.abs().double().numpy().var(ddof=1) for w in layers)
    assert gradient_stability(layers).item() == pytest.approx(expected, rel=1e-5)
    assert not estimating_error([nn.Parameter(layers[0])]).requires_grad
