"""The n largest of every m stay; the gradient passes straight through, and the others decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import nn
from torch.nn.utils import parametrize

from tersor.sparsity import SrSte, srste_sparsify

DECAY = 0.25


class Summed(torch.autograd.Function):
    """The decay does not depend on the incoming gradient, so that it cannot be a derivative of a chain."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight):
        order = weight.permute(0, 2, 3, 1)
        groups = order.reshape(-1, 4)
        smallest = torch.sort(groups.abs(), dim=1, stable=True).indices[:, :2]
        kept = torch.ones_like(groups).scatter(1, smallest, 0.0)
        return torch.where(kept != 0, groups, 0).reshape(order.shape).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, grad):
        weight, output = ctx.saved_tensors
        return grad + DECAY * torch.where(output == 0, weight, 0)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight = torch.randn(*size).to(dtype).to(device)
    if name.endswith("_forward"):
        return weight, 2, 4
    mask = torch.ops.tersor.srste_sparsify_forward(weight, 2, 4)[1]
    return torch.ones_like(weight), weight, mask, 4, DECAY


SUBJECTS = [
    Subject(
        function=lambda weight: srste_sparsify(weight, 2, 4, DECAY),
        exact=Summed.apply,
        inputs=lambda size, dtype, device: (torch.randn(*size).to(dtype).to(device),),
        options=(),
        operators=("srste_sparsify_forward", "srste_sparsify_backward"),
        raw=_raw,
        sizes=[(4, 8, 3, 3), (3, 12, 2, 2), (4, 6, 1, 2), (33, 64, 3, 3)],
        surrogate=True,
        alike=False,
        autocast=False,
        name="srste_sparsify",
    )
]


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 16), (5, 7)]),
    kernel=st.sampled_from([None, (3, 3)]),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_pattern(pattern: tuple[int, int], kernel: tuple[int, int] | None, ties: bool, seed: int) -> None:
    torch.manual_seed(seed)
    n, m = pattern
    shape = (m, 5) if kernel is None else (m, 5, *kernel)
    weight = (torch.randint(-2, 3, shape).float() if ties else torch.randn(shape)).requires_grad_()
    order = weight.detach().permute(0, 2, 3, 1) if kernel else weight.detach()
    groups = order.reshape(-1, m)
    smallest = torch.sort(groups.abs(), dim=1, stable=True).indices[:, : m - n]
    kept = torch.ones_like(groups).scatter(1, smallest, 0.0)
    mask = kept.reshape(order.shape).permute(0, 3, 1, 2) if kernel else kept.reshape(shape)
    output = srste_sparsify(weight, n, m, 0.5)
    assert torch.equal(output, weight * mask)
    incoming = torch.randn(shape)
    (gradient,) = torch.autograd.grad(output, weight, incoming)
    assert torch.equal(gradient, incoming + 0.5 * (1 - mask) * weight)


def test_parametrization() -> None:
    layer = nn.Linear(8, 4)
    weight = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", SrSte(1, 4))
    assert torch.equal(layer.weight, srste_sparsify(weight, 1, 4))
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.parametrizations.weight.original.grad.all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 8), 4, 4), ValueError, "1 <= n < m <= 16"),
        ((torch.zeros(4, 7), 1, 3), ValueError, "m must divide the 28 elements"),
        ((torch.zeros(4, 8).long(), 2, 4), TypeError, "weight must be float16"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        srste_sparsify(*arguments)
