"""The sign and its estimated gradients, and ReCU's scaling of the samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor
from tersor.binary import Estimator, approx_sign, binarize_activation, binary_sign, reste_sign, ste_sign

# Bounds that all types hold exactly, for the exact formula is computed in float64.
RULES = {"ste": Estimator("ste", t=1.0), "approx": Estimator("approx"), "reste": Estimator("reste", 2.5, 1.5, 0.125)}


class _Through(torch.autograd.Function):
    """The sign with the published gradients, written out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, name, o, t, interval):
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.rule = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        name, o, t, interval = ctx.rule
        a = x.abs()
        if name == "ste":
            slope = (a <= t).to(x.dtype)
        elif name == "approx":
            slope = torch.where(a >= 1, torch.zeros_like(a), 2 - 2 * a)
        else:
            far = (1 / o) * torch.where(a > interval, a, 1.0) ** ((1 - o) / o)
            slope = torch.where(a <= interval, interval ** (1 / o) / interval, torch.where(a <= t, far, 0.0))
        return grad * slope, None, None, None, None


def through(x: Tensor, rule: Estimator) -> Tensor:
    return _Through.apply(x, *rule)


def scaled(x: Tensor) -> Tensor:
    variance = x.flatten(1).var(1) + 1e-5
    return through(x / variance.sqrt().view(-1, 1, 1, 1), RULES["approx"])


def _raw(rule: Estimator, is_scaled: bool) -> Any:
    def raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        x = torch.randn(size).to(device, dtype)
        if name.endswith("_forward"):
            return x, *rule, is_scaled
        _, inside, statistics = torch.ops.tersor.binary_sign_forward(x, *rule, is_scaled)
        bits = rule.name == "ste" and not is_scaled
        kept = (None if bits else x, inside if bits else None, statistics if is_scaled else None)
        return torch.ones_like(x), *kept, False, *rule

    return raw


def _subject(name: str, function: Any, exact: Any, rule: Estimator, is_scaled: bool = False) -> Subject:
    return Subject(
        function, exact, lambda size, dtype, device: (torch.randn(size).mul(0.8).to(device, dtype),), (),
        ("binary_sign_forward", "binary_sign_backward"), _raw(rule, is_scaled),
        [(2, 3, 4, 5), (3, 2, 5, 7), (1, 2, 3, 1), (3, 5, 17, 9), (1, 64, 33, 20)],
        surrogate=True, autocast=False, alike=False, name=name,
    )  # fmt: skip


SUBJECTS = [
    _subject(f"binary_sign_{n}", lambda x, r=r: _four(binary_sign)(x, r), lambda x, r=r: through(x, r), r)
    for n, r in RULES.items()
] + [_subject("binarize_activation", binarize_activation, scaled, RULES["approx"], True)]


def _four(function: Any) -> Any:
    """With the refusal of other than four dimensions, which the conformance tests ask for."""

    def checked(x: Any, *options: Any) -> Tensor:
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"got shape {tuple(x.shape)}")
        return function(x, *options)

    return checked


@given(
    shape=st.lists(st.integers(0, 9), max_size=5),
    rule=st.sampled_from(sorted(RULES)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_any_shape(shape: list[int], rule: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(shape).mul(4).round().div(4).to(dtype).requires_grad_()  # many zeros and bounds
    output = binary_sign(x, RULES[rule])
    assert torch.equal(output, torch.sign(x))
    incoming = torch.randn(shape).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(through(exact, RULES[rule]), exact, incoming.double())[0]
    given = torch.autograd.grad(output, x, incoming)[0]
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(given.double(), expected, rtol=4 * eps, atol=4 * eps)


def test_borders_and_odd_values(run: tuple[str, str]) -> None:
    nan, inf, below = float("nan"), float("inf"), torch.nextafter(torch.tensor(1.5), torch.tensor(2.0)).item()
    values = [0.0, -0.0, 0.1, -0.1, 1.0, -1.0, 1.5, -1.5, below, nan, inf, -inf, 1e-30]
    signs = [0.0, 0.0, 1, -1, 1, -1, 1, -1, 1, 0, 1, -1, 1]
    chord = 0.1 ** (1 / 3) / 0.1

    def slopes(function: Any) -> list[float]:
        x = torch.tensor(values, device=run[0], requires_grad=True)
        output = function(x)
        assert output.tolist() == signs
        output.sum().backward()
        assert x.grad is not None
        return x.grad.tolist()

    assert slopes(ste_sign) == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert slopes(lambda x: reste_sign(x, 1.0)) == pytest.approx([1] * 8 + [0] * 4 + [1])
    power = 1.5 ** (-2 / 3) / 3
    expected = [chord] * 4 + [1 / 3] * 2 + [power] * 2 + [0] * 4 + [chord]
    assert slopes(lambda x: reste_sign(x, 3.0)) == pytest.approx(expected, rel=2e-6)
    assert slopes(approx_sign) == pytest.approx([2, 2, 1.8, 1.8] + [0] * 5 + [nan, 0, 0, 2], rel=1e-6, nan_ok=True)


def test_a_sample_without_a_deviation_has_no_signs(run: tuple[str, str]) -> None:
    for value in (float("nan"), float("inf")):
        x = torch.randn(3, 2, 4, 4, device=run[0])
        x[1, 0, 0, 0] = value
        x.requires_grad_()
        output = binarize_activation(x)
        assert output[1].eq(0).all()
        assert output[[0, 2]].ne(0).all()
        output.sum().backward()
        assert x.grad is not None
        assert x.grad[1].isnan().all()
        assert x.grad[[0, 2]].isfinite().all()


def test_far_from_zero(run: tuple[str, str]) -> None:
    """The variance of numbers with a large mean is not lost in the squares."""
    x = (torch.randn(2, 3, 40, 41) * 0.5 + 200).to(run[0]).requires_grad_()
    exact = x.detach().cpu().double().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    statistics = torch.ops.tersor.binary_sign_forward(x.detach(), *RULES["approx"], True)[2].cpu().double()
    assert (statistics[:, 0] - exact.detach().flatten(1).mean(1)).abs().max() < 1e-4
    torch.testing.assert_close(statistics[:, 1], (exact.detach().flatten(1).var(1) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
    expected = torch.autograd.grad(scaled(exact), exact, weights.double())[0]
    given = torch.autograd.grad(binarize_activation(x), x, weights.to(run[0]))[0]
    torch.testing.assert_close(given.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_evaluation_is_the_plain_sign(run: tuple[str, str]) -> None:
    x = torch.randn(2, 3, 5, 4, device=run[0], requires_grad=True)
    for training in (True, False):
        assert torch.equal(binarize_activation(x, training), torch.sign(x))
    plain = torch.autograd.grad(approx_sign(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(binarize_activation(x, False).sum(), x)[0], plain)


@pytest.mark.parametrize("rule", [*RULES, "scaled"])
def test_memory_format_is_kept(rule: str, run: tuple[str, str]) -> None:
    def function(x: Tensor) -> Tensor:
        return binarize_activation(x) if rule == "scaled" else binary_sign(x, RULES[rule])

    x = torch.randn(2, 3, 5, 4, device=run[0])
    last = x.clone(memory_format=torch.channels_last).requires_grad_()
    first = x.clone().requires_grad_()
    outputs = function(first), function(last)
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(*outputs)
    incoming = torch.randn_like(x)
    grads = [torch.autograd.grad(o, i, incoming)[0] for o, i in zip(outputs, (first, last), strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_what_is_kept_for_the_backward_pass() -> None:
    def kept(function: Any) -> int:
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        storages = {}

        def keep(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                storages[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function(x)
        return sum(storages.values())

    elements = 4 * 8 * 16 * 16
    assert kept(ste_sign) == elements // 8
    assert kept(approx_sign) == kept(lambda x: reste_sign(x, 2.0)) == 0
    assert kept(binarize_activation) == 4 * 2 * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: binary_sign(x, "sign"), ValueError, "estimator must be one of ste, approx, reste, got 'sign'"),
        (lambda x: binary_sign(x, 3), TypeError, "estimator must be a name or an Estimator, got int"),
        (lambda x: reste_sign(x, 0.5), ValueError, "o must be at least 1 and finite, got 0.5"),
        (lambda x: reste_sign(x, float("inf")), ValueError, "o must be at least 1 and finite, got inf"),
        (lambda x: reste_sign(x, float("nan")), ValueError, "o must be at least 1 and finite, got nan"),
        (lambda x: reste_sign(x, 2, 0.1, 0.1), ValueError, "t must be above interval 0.1, got 0.1"),
        (lambda x: reste_sign(x, 2, 1.5, 0), ValueError, "interval must be above 0, got 0"),
        (lambda x: reste_sign(x, "2"), TypeError, "o must be a number, got str"),
        (lambda x: ste_sign(x, -1), ValueError, "t must be above 0, got -1"),
        (lambda x: binarize_activation(x[0]), ValueError, r"input must be \(N, C, H, W\) with N of at least 1"),
        (lambda x: binarize_activation(x[:0]), ValueError, r"with N of at least 1, got shape \(0, 3, 2, 2\)"),
        (lambda x: binarize_activation(x[:, :1, :1, :1]), ValueError, "at least 2 elements a sample in training"),
        (lambda x: binarize_activation(x.int()), TypeError, "input must be float16"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 2, 2))


def test_they_are_public() -> None:
    assert tersor.binary_sign is binary_sign
    assert tersor.reste_sign is reste_sign
