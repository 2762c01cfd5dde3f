"""The free elements move as torch's optimisers move them; the frozen ones, and their state, not at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tersor.freezing import FrozenAdamW, FrozenSGD, pack_mask

CASES: list[tuple[type, type, dict[str, Any]]] = [
    (FrozenSGD, torch.optim.SGD, {}),
    (FrozenSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    (FrozenSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    (FrozenSGD, torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3, "maximize": True}),
    (FrozenSGD, torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    (FrozenAdamW, torch.optim.AdamW, {}),
    (FrozenAdamW, torch.optim.AdamW, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-5, "maximize": True}),
]


def setting(dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
    mask = torch.rand(13, 150) < 0.4
    mask[3:6] = True
    return nn.Parameter(torch.randn(13, 150, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=dtype)), mask


def set_gradients(parameters: tuple[nn.Parameter, ...], like: tuple[nn.Parameter, ...]) -> None:
    for parameter, other in zip(parameters, like, strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.clone()


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES, ids=str)
def test_as_torch_where_free(ours: type, theirs: type, options: dict[str, Any]) -> None:
    weight, bias, mask = setting()
    other_weight, other_bias = copy.deepcopy(weight), copy.deepcopy(bias)
    before = weight.detach().clone()
    optimizer = ours([weight, bias], lr=0.05, masks=[(weight, pack_mask(mask))], **options)
    expected = theirs([other_weight, other_bias], lr=0.05, **options)
    for _ in range(5):
        set_gradients((weight, bias), (other_weight, other_bias))
        optimizer.step()
        expected.step()
    assert torch.equal(bias, other_bias)
    assert torch.equal(weight[mask], before[mask])
    torch.testing.assert_close(weight[~mask], other_weight[~mask], rtol=1e-5, atol=1e-6)
    for name, value in expected.state[other_weight].items():
        if name != "step" and value is not None:
            own = optimizer.state[weight][name]
            torch.testing.assert_close(own[~mask], value[~mask], rtol=1e-5, atol=1e-6)
            assert torch.all(own[mask] == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight, _, mask = setting(dtype)
    exact = nn.Parameter(weight.detach().double())
    optimizer = FrozenSGD([weight], lr=0.05, momentum=0.9, masks=[(weight, pack_mask(mask))])
    expected = torch.optim.SGD([exact], lr=0.05, momentum=0.9)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        exact.grad = weight.grad.double()
        optimizer.step()
        expected.step()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(weight.double()[~mask], exact[~mask], rtol=4 * rounding, atol=4 * rounding)


@pytest.mark.parametrize(("ours", "theirs", "options"), [CASES[1], CASES[-1]], ids=str)
def test_the_state_is_torchs(ours: type, theirs: type, options: dict[str, Any]) -> None:
    """Half of a run with each optimiser, in either order, ends as a whole run with torch's, where free."""
    weight, bias, mask = setting()
    masks = [(weight, pack_mask(torch.zeros_like(mask)))]
    expected_weight, expected_bias = copy.deepcopy(weight), copy.deepcopy(bias)
    expected = theirs([expected_weight, expected_bias], lr=0.05, **options)
    optimizer: Any = ours([weight, bias], lr=0.05, masks=masks, **options)
    for step in range(6):
        if step in (2, 4):
            other = theirs([weight, bias], lr=0.1) if step == 2 else ours([weight, bias], lr=0.1, masks=masks)
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
        set_gradients((weight, bias), (expected_weight, expected_bias))
        optimizer.step()
        expected.step()
    torch.testing.assert_close(weight, expected_weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(bias, expected_bias)


def test_closures_and_missing_gradients() -> None:
    weight, bias, mask = setting()
    optimizer = FrozenSGD([weight, bias], lr=0.1, masks=[(weight, pack_mask(mask))])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    loss = optimizer.step(closure)
    torch.testing.assert_close(loss, (before**2).sum())
    torch.testing.assert_close(weight.detach(), torch.where(mask, before, before * 0.8))
    assert weight.grad is not None, "the gradient is left where it was"
    weight.grad = None
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.where(mask, before, before * 0.8))


@pytest.mark.parametrize(("ours", "theirs", "options"), [CASES[1], CASES[-1]], ids=str)
def test_channels_last(ours: type, theirs: type, options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))
    other = copy.deepcopy(weight)
    mask = torch.rand(6, 5, 3, 3) < 0.4
    before = weight.detach().clone()
    optimizer = ours([weight], lr=0.05, masks=[(weight, pack_mask(mask))], **options)
    expected = theirs([other], lr=0.05, **options)
    for _ in range(3):
        set_gradients((weight,), (other,))
        optimizer.step()
        expected.step()
    assert weight.stride() == other.stride()
    torch.testing.assert_close(weight.detach(), torch.where(mask, before, other.detach()), rtol=1e-5, atol=1e-6)


def test_the_version_counts_up() -> None:
    """So that autograd notices a weight that changed between forward and backward pass."""
    weight, _, mask = setting()
    optimizer = FrozenSGD([weight], lr=0.1, masks=[(weight, pack_mask(mask))])
    loss = (weight**2).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_input() -> None:
    weight, bias, mask = setting()
    with pytest.raises(
        ValueError, match=r"masks must be of parameters that the optimiser has, got one of shape \(13, 150\)"
    ):
        FrozenSGD([bias], masks=[(weight, pack_mask(mask))])
    with pytest.raises(ValueError, match=r"frozen must have shape \(244,\)"):
        FrozenAdamW([weight], masks=[(weight, pack_mask(mask[0]))])
    with pytest.raises(TypeError, match="frozen must be a uint8 tensor"):
        FrozenSGD([weight], masks=[(weight, mask)])
    with pytest.raises(ValueError, match="amsgrad must be False"):
        FrozenAdamW([weight], amsgrad=True)
    with pytest.raises(RuntimeError, match="changes its arguments in place"):
        torch.ops.tersor.frozen_sgd_step(weight, weight, None, pack_mask(mask), 1, 0, 0, 0, False, False, False)
