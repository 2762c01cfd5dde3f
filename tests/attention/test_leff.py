"""LeFF: what is special to it. Everything common to all operators is in test_conformance.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subject import Subject

import tersor
from tersor._backends import running
from tersor.attention.leff import _reference
from tersor.models.eager_leff import leff_channels_last, leff_rearrange

OPERATORS = ("leff_forward", "leff_backward")
# (B, H, W, C, E, C_out): plain (no two sizes alike); another size of map; a single pixel and channel; more than one
# chunk of hidden channels; whole vectors, and rows longer than a block of tokens.
SIZES = [(2, 4, 5, 6, 10, 7), (2, 7, 4, 6, 10, 7), (3, 1, 1, 1, 2, 1), (2, 4, 3, 8, 150, 5), (1, 3, 70, 16, 32, 16)]
Size = tuple[int, ...]


def _inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    batch, height, width, channels, hidden, outputs = size
    shapes = [
        (batch, height, width, channels), (hidden, channels), (hidden,), (hidden, 1, 3, 3), (hidden,),
        (outputs, hidden), (outputs,),
    ]  # fmt: skip
    return tuple(torch.randn(s, dtype=dtype, device=device) * (1 if i == 0 else 0.5) for i, s in enumerate(shapes))


def _affine_inputs(size: Size, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    affine = [torch.randn(size[4], dtype=dtype, device=device) for _ in range(2)]
    return (*_inputs(size, dtype, device), *affine)


def _raw(name: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    tensors = (*_inputs(size, dtype, device), None, None)
    if name == OPERATORS[0]:
        return tensors
    return (torch.randn((*size[:3], size[5]), dtype=dtype, device=device), *tensors, True, True)


def _raw_affine(name: str, size: Size, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, w1, _, dw, _, w2, _, scale, shift = _affine_inputs(size, dtype, device)
    tensors = (x, w1, None, dw, None, w2, None, scale, shift)
    if name == OPERATORS[0]:
        return tensors
    return (torch.randn((*size[:3], size[5]), dtype=dtype, device=device), *tensors, False, True)


SUBJECTS = [
    Subject(tersor.leff, leff_rearrange, _inputs, (), OPERATORS, _raw, SIZES, alike=False, name="leff"),
    Subject(
        tersor.leff, leff_channels_last, _affine_inputs, (), OPERATORS, _raw_affine, SIZES[:2], alike=False,
        name="leff_affine",
    ),
]  # fmt: skip

NAMES = (
    "input", "weight1", "bias1", "depthwise_weight", "depthwise_bias", "weight2", "bias2", "hidden_scale",
    "hidden_shift",
)  # fmt: skip


def _gradients(function: Any, tensors: list[torch.Tensor | None], seed: int = 0) -> list[torch.Tensor]:
    """Output and gradients for an incoming gradient that the seed gives."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    output = function(*leaves)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return [output.detach(), *torch.autograd.grad(output, [t for t in leaves if t is not None], grad.to(output))]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 17, 32])
    return {
        "size": (
            draw(st.integers(0, 2)),
            draw(st.integers(1, 9)),
            draw(st.sampled_from([1, 2, 3, 6, 7, 14, 33, 65])),
            draw(size),
            draw(st.sampled_from([1, 7, 16, 40, 64, 65, 96, 130])),
            draw(size),
        ),
        "absent": draw(st.sets(st.sampled_from(["bias1", "depthwise_bias", "bias2", "affine"]))),
    }


@settings(max_examples=25)
@given(problem=problems(), data=st.integers(0, 2**31))
def test_sweep_of_shapes(problem: dict[str, Any], data: int) -> None:
    """float64 to rounding, float32 to 1e-5, on whatever the default backend is."""
    torch.manual_seed(data)
    tensors: list[torch.Tensor | None] = list(_affine_inputs(problem["size"], torch.float64, "cpu"))
    for i, name in enumerate(NAMES):
        if name in problem["absent"] or (name.startswith("hidden") and "affine" in problem["absent"]):
            tensors[i] = None
    expected = _gradients(leff_channels_last, tensors)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        narrow = [t if t is None else t.to(dtype) for t in tensors]
        if dtype != torch.float64:  # what is compared starts from the same, rounded numbers
            expected = _gradients(leff_channels_last, [t if t is None else t.double() for t in narrow])
        for ours, right in zip(_gradients(tersor.leff, narrow), expected, strict=True):
            assert ours.shape == right.shape
            if right.numel():
                error = (ours.double() - right).abs().max() / right.abs().max().clamp(min=1)
                assert error <= tolerance, f"{dtype} {error}"


@pytest.mark.parametrize("peer", [leff_rearrange, leff_channels_last])
def test_published_ways_give_the_same(peer: Any, run: tuple[str, str]) -> None:
    for size in ((1, 7, 7, 6, 6, 6), (2, 3, 9, 4, 16, 4)):
        tensors = _affine_inputs(size, torch.float32, run[0])
        for count in (7, 9):
            expected = _gradients(peer, [t.double() for t in tensors[:count]])
            for e, g in zip(expected, _gradients(tersor.leff, list(tensors[:count])), strict=True):
                torch.testing.assert_close(g.double(), e, atol=1e-5, rtol=1e-5)


def test_padding_is_zero_after_activation_and_affine(run: tuple[str, str]) -> None:
    """A hidden map of ones everywhere: the convolution of ones counts the taps inside of the map."""
    ones = torch.ones(1, device=run[0])
    zeros = torch.zeros(1, device=run[0])
    x = torch.zeros(1, 3, 4, 1, device=run[0])
    output = tersor.leff(
        x, ones[None], 5 * ones, torch.ones(1, 1, 3, 3, device=run[0]), 10 * ones, ones[None], -10 * ones, zeros, ones
    )
    expected = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]], device=run[0]).float()
    torch.testing.assert_close(output[0, :, :, 0], expected)


def test_accuracy_of_the_activation(run: tuple[str, str]) -> None:
    """The first GELU alone, through identities, over its whole range; both tails go to exactly 0 and to the input."""
    t = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-100.0, 100.0, 0.0, 1e-30, -1e4, 1e4])])
    one = torch.ones(1, 1, device=run[0])
    identity = torch.zeros(1, 1, 3, 3, device=run[0])
    identity[..., 1, 1] = 1
    x = t.to(run[0]).view(1, -1, 1, 1).requires_grad_()
    large = 64.0  # where the second GELU is the identity
    output = tersor.leff(x, one, None, identity, large * one[0], one, -large * one[0]).flatten()
    exact = torch.nn.functional.gelu(t.double())
    assert ((output.cpu().double() - exact).abs() / exact.abs().clamp(min=large)).max() <= 2e-7
    wide = t.double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(wide).sum(), wide)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient.flatten().cpu().double(), expected, atol=5e-7, rtol=5e-7)


def test_nothing_of_the_hidden_size_is_kept() -> None:
    tensors = [t.requires_grad_() for t in _inputs((1, 8, 8, 4, 64, 4), torch.float32, "cpu")]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tersor.leff(*tensors)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in tensors}


def test_only_what_is_asked_for_is_computed() -> None:
    tensors = _inputs((1, 3, 4, 2, 5, 3), torch.float32, "cpu")
    grad = torch.randn(1, 3, 4, 3)
    backward = torch.ops.tersor.leff_backward
    both = backward(grad, *tensors, None, None, True, True)
    data = backward(grad, *tensors, None, None, True, False)
    parameters = backward(grad, *tensors, None, None, False, True)
    assert torch.equal(both[0], data[0])
    assert all(t.numel() == 0 for t in (*data[1:], parameters[0], *both[7:]))
    assert all(torch.equal(a, b) for a, b in zip(both[1:], parameters[1:], strict=True))


def test_layer_matches_the_function() -> None:
    layer = tersor.LeFF(6, 24)
    names = [f"{n}.0.{p}" for n in ("linear1", "dwconv", "linear2") for p in ("weight", "bias")]
    assert list(layer.state_dict()) == names
    x = torch.randn(2, 4, 9, 6)
    expected = tersor.leff(x, *layer.state_dict().values())
    assert torch.equal(layer(x), expected)
    assert torch.equal(
        layer(x.flatten(1, 2)), tersor.leff(x.view(2, 6, 6, 6), *layer.state_dict().values()).flatten(1, 2)
    )
    assert torch.equal(layer(x.flatten(1, 2), 4, 9), expected.flatten(1, 2))
    for sizes in ((4, 4), (36, None), (-4, -9)):
        with pytest.raises(ValueError, match="must multiply to the number of tokens"):
            layer(x.flatten(1, 2), *sizes)
    with pytest.raises(ValueError, match="must be a square"):
        layer(x.flatten(1, 2)[:, :35])
    with pytest.raises(ValueError, match=r"hidden_dim must be at least 1, got 0"):
        tersor.LeFF(6, 0)
    with pytest.raises(TypeError, match=r"dim must be an int, got float"):
        tersor.LeFF(6.0, 24)


BAD_SHAPES = {
    "input": (torch.zeros(4, 5, 6), r"input must be \(B, H, W, C\), got shape \(4, 5, 6\)"),
    "weight1": (torch.zeros(10, 4), r"weight1 must be \(E, C\) with the 6 channels of input, got shape \(10, 4\)"),
    "bias1": (torch.zeros(9), r"bias1 must be \(10,\), got shape \(9,\)"),
    "depthwise_weight": (torch.zeros(10, 1, 3, 5), r"depthwise_weight must be \(10, 1, 3, 3\), got shape"),
    "depthwise_bias": (torch.zeros(10, 1), r"depthwise_bias must be \(10,\), got shape"),
    "weight2": (torch.zeros(7, 9), r"weight2 must be \(C_out, E\) with the 10 rows of weight1, got shape"),
    "bias2": (torch.zeros(10), r"bias2 must be \(7,\), got shape"),
    "hidden_scale": (torch.zeros(1), r"hidden_scale must be \(10,\), got shape"),
}


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_bad_shapes(name: str) -> None:
    tensors = dict(zip(NAMES, _affine_inputs(SIZES[0], torch.float32, "cpu"), strict=True))
    bad, message = BAD_SHAPES[name]
    with pytest.raises(ValueError, match=message):
        tersor.leff(**tensors | {name: bad})
    with pytest.raises(ValueError, match=f"{name} must be" if name == "input" else f"{name} must be on the device of"):
        tersor.leff(**tensors | {name: tensors[name][None] if name == "input" else tensors[name].to("meta")})
    wrong = {"weight1": tensors["weight1"].double()} if name == "input" else {name: tensors[name].double()}
    with pytest.raises(TypeError, match=r"must have the dtype of input torch\.float32, got torch\.float64"):
        tersor.leff(**tensors | wrong)
    with pytest.raises(TypeError, match=rf"{name} must be a torch\.Tensor, got list"):
        tersor.leff(**tensors | {name: [0.0]})


def test_half_an_affine() -> None:
    *tensors, scale, shift = _affine_inputs(SIZES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="hidden_shift must be given where hidden_scale is, got None"):
        tersor.leff(*tensors, scale, None)
    with pytest.raises(ValueError, match="hidden_scale must be given where hidden_shift is, got None"):
        tersor.leff(*tensors, None, shift)


@pytest.mark.parametrize("axis", range(6))
def test_empty_axes(axis: int, run: tuple[str, str]) -> None:
    size = [2, 3, 4, 5, 6, 7]
    size[axis] = 0
    tensors = _inputs(tuple(size), torch.float32, run[0])
    if axis:
        with pytest.raises(ValueError, match="must be"):
            tersor.leff(*tensors)
        return
    output, grad_input, *gradients = _gradients(tersor.leff, list(tensors))
    assert output.shape == (0, 3, 4, 7)
    assert grad_input.shape == tensors[0].shape
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, tensors[1:], strict=True))


@pytest.mark.skipif(running(OPERATORS[0], "cpu") != "native", reason="the C++ library was not built here")
def test_direct_call_with_bad_sizes_is_an_error_not_a_crash() -> None:
    """torch.ops has no Python checks in front: the C++ kernel itself guards its memory."""
    forward, backward = (getattr(torch.ops.tersor, name) for name in OPERATORS)
    tensors = list(_affine_inputs(SIZES[0], torch.float32, "cpu"))
    grad = torch.randn(*SIZES[0][:3], SIZES[0][5])
    for i, tensor in enumerate(tensors):
        for bad in (tensor[..., :-1], tensor.double(), tensor.long(), None if i > 6 else tensor[None]):
            with pytest.raises(RuntimeError):
                forward(*tensors[:i], bad, *tensors[i + 1 :])
            with pytest.raises(RuntimeError):
                backward(grad, *tensors[:i], bad, *tensors[i + 1 :], True, True)
    with pytest.raises(RuntimeError):
        backward(grad[:, :2], *tensors, True, True)


@pytest.mark.parametrize("size", [(2, 16, 16, 64, 128, 64), (1, 33, 8, 72, 256, 64)], ids=str)
@pytest.mark.parametrize("count", [7, 9])
def test_wide_bfloat16(size: Size, count: int) -> None:
    """Where torch's own products may run: twice torch's error, and a rounding. One strip an image, and several."""
    tensors: list[Any] = list(_affine_inputs(size, torch.bfloat16, "cpu"))[:count]
    tensors[1], tensors[5] = tensors[1] / 4, tensors[5] / 4
    exact = _gradients(leff_channels_last, [t.double() for t in tensors])
    plain, ours = _gradients(leff_channels_last, tensors), _gradients(tersor.leff, tensors)
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.shape, o.dtype) == (e.shape, torch.bfloat16)
        error, allowed = ((t.double() - e).abs().max() / e.abs().max().clamp(min=1) for t in (o, p))
        assert error <= max(2 * allowed, torch.finfo(torch.bfloat16).eps / 2)
    for a, b in zip(ours, _gradients(tersor.leff, tensors), strict=True):
        assert torch.equal(a, b)


def test_reference_accumulates_half_types_in_float32() -> None:
    tensors = _inputs((1, 4, 5, 8, 32, 8), torch.bfloat16, "cpu")
    wide = [t.float() for t in tensors]
    assert torch.equal(_reference(*tensors, None, None), _reference(*wide, None, None).bfloat16())
