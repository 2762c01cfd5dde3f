"""ReCU's weights: standardised, clamped for the gradient, and their signs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor.binary import recu_weight

TAU = 0.85


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def exact(weight: Tensor, tau: float = TAU) -> Tensor:
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    standard = centred / ((centred.var(1, keepdim=True) + 1e-5).sqrt() / 2 / math.sqrt(2))
    bound = standard.detach().abs().mean() * -math.log(2 - 2 * tau) if tau < 1 else torch.inf
    inside = standard.abs() <= bound  # clamp's gradient changed in torch 2.14, at a bound and for NaN
    clipped = torch.where(inside, standard, standard.detach().clamp(-bound, bound))
    return _Through.apply(clipped).view(weight.shape)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight = torch.randn(size).to(device, dtype)
    tau = torch.tensor(TAU, device=device)
    if name.endswith("_forward"):
        return weight, tau
    _, statistics, bound = torch.ops.tersor.recu_weight_forward(weight, tau)
    return torch.ones_like(weight), weight, statistics, bound


def _function(weight: Any) -> Tensor:
    """With what the operator itself makes of weights that the function refuses."""
    try:
        return recu_weight(weight, TAU)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return torch.ops.tersor.recu_weight_forward(weight, torch.tensor(TAU))[0]


SUBJECTS = [
    Subject(
        _function, exact, lambda size, dtype, device: (torch.randn(size).to(device, dtype),), (),
        ("recu_weight_forward", "recu_weight_backward"), _raw,
        [(4, 2, 3, 5), (3, 5, 2, 7), (2, 3, 1, 1), (33, 7, 3, 3), (5, 300, 3, 3)],
        surrogate=True, autocast=False, alike=False, quantizer=False, name="recu_weight",
    )
]  # fmt: skip


@given(
    shape=st.sampled_from([(1, 2, 1, 1), (5, 3), (7, 1, 3, 3), (16, 40, 3, 3), (3, 129)]),
    tau=st.sampled_from([0.6, 0.85, 0.99, 1.0]),
    seed=st.integers(0, 100),
)
def test_any_shape(shape: tuple[int, ...], tau: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64).mul(0.1).add(0.02).requires_grad_()
    incoming = torch.randn(shape, dtype=torch.float64)
    for quantile in (tau, torch.tensor([tau], dtype=torch.float64)):
        output = recu_weight(weight, quantile)
        assert torch.equal(output, exact(weight, tau))
        grads = [torch.autograd.grad(f, weight, incoming)[0] for f in (output, exact(weight, tau))]
        # tau reaches the kernel in float32
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_the_tails_get_no_gradient_of_their_own(run: tuple[str, str]) -> None:
    """Those that are clamped move only with their filter: their gradients differ by what the standardisation gives."""
    weight = torch.randn(4, 64, 3, 3, device=run[0]).requires_grad_()
    clipped = []
    for tau in (0.6, 0.85, 1.0):
        grad = torch.autograd.grad(recu_weight(weight, tau).sum(), weight)[0]
        inner = torch.autograd.grad(exact(weight, tau).sum(), weight)[0]
        torch.testing.assert_close(grad, inner, rtol=1e-4, atol=1e-4)
        flat = weight.detach().flatten(1)
        standard = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True) * 2 * math.sqrt(2)
        bound = standard.abs().mean() * -math.log(2 - 2 * tau) if tau < 1 else torch.inf
        clipped.append(int((standard.abs() > bound).sum()))
    assert clipped[0] > clipped[1] > clipped[2] == 0


def test_constant_filters(run: tuple[str, str]) -> None:
    """Of numbers whose mean is exact."""
    weight = torch.randn(3, 4, 3, 3, device=run[0])
    weight[1] = 0.5
    weight.requires_grad_()
    output = recu_weight(weight, TAU)
    assert output[1].eq(0).all()
    incoming = torch.randn_like(output)
    grad = torch.autograd.grad(output, weight, incoming)[0]
    expected = 2 * math.sqrt(2) / math.sqrt(1e-5) * (incoming[1] - incoming[1].mean())
    torch.testing.assert_close(grad[1], expected, rtol=1e-4, atol=1e-2)
    assert recu_weight(torch.full((2, 3, 1, 1), 0.25, device=run[0]), TAU).eq(0).all()


@pytest.mark.parametrize(
    ("weight", "tau", "error", "message"),
    [
        (torch.zeros(3, 2, 3, 3), 0.5, ValueError, "tau must be above 0.5 and at most 1, got 0.5"),
        (torch.zeros(3, 2, 3, 3), 1.01, ValueError, "tau must be above 0.5 and at most 1, got 1.01"),
        (torch.zeros(3, 2, 3, 3), float("nan"), ValueError, "tau must be above 0.5 and at most 1, got nan"),
        (torch.zeros(3, 2, 3, 3), torch.tensor(0.3), ValueError, "tau must be above 0.5 and at most 1, got 0.3"),
        (torch.zeros(3, 2, 3, 3), torch.zeros(2), ValueError, "tensor of one element"),
        (torch.zeros(3, 2, 3, 3), "0.9", TypeError, "tau must be a number, got str"),
        (torch.zeros(3, 1, 1, 1), 0.9, ValueError, "at least 2 weights a filter"),
        (torch.zeros(0, 2, 3, 3), 0.9, ValueError, r"got shape \(0, 2, 3, 3\)"),
        (torch.full((3, 2, 3, 3), torch.nan), 0.9, ValueError, "weight must be finite"),
        (torch.full((3, 2, 3, 3), torch.inf), 0.9, ValueError, "weight must be finite"),
        (torch.zeros(3, 2, 3, 3).long(), 0.9, TypeError, "weight must be float16"),
    ],
)
def test_bad_input(weight: Tensor, tau: Any, error: type[Exception], message: str, run: tuple[str, str]) -> None:
    if run[0] != "cpu":
        pytest.skip("values are checked on the CPU")
    with pytest.raises(error, match=message):
        recu_weight(weight, tau)
