"""What is special to quantisation between two bounds."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import straight_through
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import subject, values

import tersor
from tersor.quantization import fake_quantize_bounds

DDTB, UNIT = ("ddtb", "half"), ("unit", "half")


def _ddtb(bits: int, along: str = "", relu: bool = False, lower: float = -0.75, name: str = "fake_quantize_bounds"):
    function = functools.partial(fake_quantize_bounds, bits=bits, relu=relu)
    exact = functools.partial(straight_through.ddtb, bits=bits, relu=relu)
    bounds = [(lower, -0.0625), (1.5, 0.03125)]
    constants = (bits, *DDTB, False, relu, 1.0)
    return subject(function, exact, "fake_quantize_bounds", bounds, (), constants, along, name)


def _unit(signed: bool):
    function = functools.partial(fake_quantize_bounds, bits=3, rule="unit", signed=signed)
    exact = functools.partial(straight_through.unit, bits=3, signed=signed)
    constants = (3, *UNIT, signed, False, 1.0)
    name = "fake_quantize_bounds_unit" + "_signed" * signed
    return subject(function, exact, "fake_quantize_bounds", [(-0.75, -0.05), (1.5, 0.1)], (), constants, name=name)


SUBJECTS = [
    _ddtb(4),
    _ddtb(2, "_per_sample"),
    _ddtb(3, "_per_channel"),
    _ddtb(8, relu=True, name="fake_quantize_bounds_relu"),
    _unit(False),
    _unit(True),
]


def bounds(lower: float, upper: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([lower]), torch.tensor([upper])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_symmetric_bounds_have_a_level_more(bits: int, run: tuple[str, str]) -> None:
    """lower = -upper puts the zero point on a tie: 2^bits + 1 levels, and no clamp may hide it."""
    lower, upper = bounds(-10.0, 10.0)
    x = torch.linspace(-12, 12, 20001, device=run[0])
    levels = fake_quantize_bounds(x, lower.to(run[0]), upper.to(run[0]), bits).unique()
    assert len(levels) == 2**bits + 1
    assert 0 in levels


@pytest.mark.parametrize("tie", ["half", "bound"])
def test_ties_at_the_bounds(tie: str, run: tuple[str, str]) -> None:
    share = 0.5 if tie == "half" else 1.0
    lower, upper = (b.to(run[0]).requires_grad_() for b in bounds(-0.5, 1.0))
    x = torch.tensor([-0.5, 1.0], device=run[0], requires_grad=True)
    output = fake_quantize_bounds(x, lower, upper, 2, tie=tie)
    gradients = torch.autograd.grad(output, (x, lower, upper), torch.tensor([1.0, 10.0], device=run[0]))
    # Both bounds are levels here (scale 2, zero point 1), so that no rounding error adds to them.
    assert output.tolist() == [-0.5, 1.0]
    assert gradients[0].tolist() == [1 - share, 10 * (1 - share)]
    assert [g.item() for g in gradients[1:]] == [share, 10 * share]


def test_clipped_elements_move_both_bounds(run: tuple[str, str]) -> None:
    """The outermost level is not exactly the bound, so the rounding term is there for clipped elements too."""
    lower, upper = (b.to(run[0]).requires_grad_() for b in bounds(-0.81, 1.37))
    x = torch.tensor([5.0], device=run[0], requires_grad=True)
    output = fake_quantize_bounds(x, lower, upper, 2)
    gradients = torch.autograd.grad(output, (x, lower, upper))
    error = (output.item() - 1.37) / (1.37 + 0.81)
    assert error != 0
    assert gradients[0].item() == 0
    assert gradients[1].item() == pytest.approx(-error, rel=1e-5)
    assert gradients[2].item() == pytest.approx(1 + error, rel=1e-5)


def test_grad_scale_is_for_the_bounds_only(run: tuple[str, str]) -> None:
    results = []
    for factor in (1.0, 0.25):
        tensors = [t.requires_grad_() for t in (values((4, 5), torch.float32, run[0]), *bounds(-0.7, 1.1))]
        tensors = [t.detach().to(run[0]).requires_grad_() for t in tensors]
        output = fake_quantize_bounds(*tensors, 3, grad_scale=factor)
        results.append(torch.autograd.grad(output.sum(), tensors))
    assert torch.equal(results[0][0], results[1][0])
    for full, scaled in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(scaled, full * 0.25)


@pytest.mark.parametrize("rule", ["ddtb", "unit"])
def test_32_bits_pass_through(rule: str) -> None:
    x = torch.randn(5)
    assert fake_quantize_bounds(x, *bounds(-1.0, 1.0), 32, rule) is x
    assert torch.equal(fake_quantize_bounds(x, *bounds(-1.0, 1.0), 32, rule, relu=True), x.relu())


def test_relu_in_the_same_pass(run: tuple[str, str]) -> None:
    x = values((3, 4, 5, 6), torch.float32, run[0]).requires_grad_()
    limits = [b.to(run[0]).requires_grad_() for b in bounds(-0.3, 1.2)]
    for rule in ("ddtb", "unit"):
        fused, plain = (
            fake_quantize_bounds(x, *limits, 4, rule, relu=True),
            fake_quantize_bounds(x.relu(), *limits, 4, rule),
        )
        assert torch.equal(fused, plain)
        grads = [torch.autograd.grad(y.square().sum(), (x, *limits)) for y in (fused, plain)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_bounds_shapes_and_layouts(data: st.DataObject) -> None:
    """Bit by bit the reference's, whatever the bounds, the layout and the dimension that they lie along."""
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
    axis = data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1)))
    bits = data.draw(st.integers(2, 8))
    rule = data.draw(st.sampled_from(["ddtb", "unit"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    order = data.draw(st.permutations(range(len(shape))))
    x = torch.randn([shape[i] for i in order], generator=generator).permute([order.index(i) for i in range(len(shape))])
    if data.draw(st.booleans()):
        x = torch.stack([x, x], -1)[..., 0]
    size = [1] if axis is None else [n if i == axis else 1 for i, n in enumerate(shape)]
    magnitude = 10.0 ** data.draw(st.integers(-3, 3))
    lower = torch.randn(size, generator=generator) * magnitude
    upper = lower + (torch.rand(size, generator=generator) + 0.01) * magnitude
    x = x * magnitude
    results = []
    for backend in ("native", "reference"):
        with tersor.use_backend(backend):
            tensors = [t.detach().requires_grad_() for t in (x, lower, upper)]
            output = fake_quantize_bounds(*tensors, bits, rule)
            grads = torch.autograd.grad(output, tensors, torch.ones_like(output).cumsum(0) / 7)
        assert output.stride() == torch.empty_like(x).stride()
        results.append((output, *grads))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i < 2:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, magnitude, 1 / magnitude))


def test_division_by_reciprocal_is_exact() -> None:
    """The fast path and IEEE division take the same levels: a million inputs per order of magnitude."""
    generator = np.random.default_rng(0)
    for exponent in (-50, -20, -3, 0, 5, 30, 55):
        for _ in range(4):
            low = np.float32(generator.uniform(-1, 0.5) * 2.0**exponent)
            high = np.float32(low + np.float32(generator.uniform(0.5, 1.5) * 2.0**exponent))
            x = generator.uniform(low - (high - low) / 8, high + (high - low) / 8, 250_000).astype(np.float32)
            tensors = torch.from_numpy(x), torch.tensor([low]), torch.tensor([high])
            for rule in ("ddtb", "unit"):
                fast = fake_quantize_bounds(*tensors, 8, rule)
                with tersor.use_backend("reference"):
                    assert torch.equal(fast, fake_quantize_bounds(*tensors, 8, rule))


def test_bad_arguments() -> None:
    x, (lower, upper) = torch.randn(2, 3), bounds(-1.0, 1.0)
    for bad, message in (
        ({"bits": 1}, "bits must be 2 to 8, or 32 for none, got 1"),
        ({"bits": 9}, "bits must be 2 to 8, or 32 for none, got 9"),
        ({"rule": "lsq"}, "rule must be one of ddtb, unit, got 'lsq'"),
        ({"tie": "none"}, "tie must be one of half, bound, got 'none'"),
        ({"signed": True}, "signed must be False for rule 'ddtb'"),
        ({"lower": torch.zeros(3)}, r"lower must have one element, or .* got shape \(3,\) for input \(2, 3\)"),
        ({"lower": torch.zeros(2, 1), "upper": torch.ones(1, 3)}, "lower and upper must lie along the same dimension"),
        ({"lower": upper, "upper": lower}, r"lower must be less than upper, got lower 1\.0 and upper -1\.0"),
        ({"lower": upper}, r"lower must be less than upper, got lower 1\.0 and upper 1\.0"),
        ({"upper": torch.tensor([float("inf")])}, r"upper must be finite, got \[inf\]"),
        ({"lower": torch.tensor([float("nan")])}, r"lower must be finite, got \[nan\]"),
    ):
        for backend in ("native", "reference"):
            with tersor.use_backend(backend), pytest.raises(ValueError, match=f"fake_quantize_bounds.*{message}"):
                fake_quantize_bounds(**({"input": x, "lower": lower, "upper": upper, "bits": 2} | bad))
    with pytest.raises(TypeError, match="bits must be an int, got float"):
        fake_quantize_bounds(x, lower, upper, 2.0)
    with pytest.raises(TypeError, match=r"lower must be a torch\.Tensor, got float"):
        fake_quantize_bounds(x, -1.0, upper, 2)
