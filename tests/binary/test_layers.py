"""Binary layers for training against their formulas, what they refuse, and their state dicts."""

from __future__ import annotations

import math
from typing import Any

import binary_formula
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import (
    BinaryConv2d,
    BinaryLinear,
    ChannelBias,
    Estimator,
    PackedWeightConv2d,
    ReCUConv2d,
    ReSTEConv2d,
    convert_,
    pack_signs,
    recu_conv2d,
    reste_conv2d,
    reste_sign,
)

WINDOWS = [(1, 1, 1, 1), ((2, 1), (0, 2), (1, 2), 2)]  # stride, padding, dilation, groups


def compare(ours: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Values and gradients, in float64."""
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(ours)
    grads = [torch.autograd.grad(y, leaves, gradient, retain_graph=True) for y in (ours, expected)]
    for mine, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def images(channels: int = 4) -> Tensor:
    """With zeros, and numbers on either side of every bound of the estimators."""
    x = torch.randn(3, channels, 7, 6, dtype=torch.float64)
    x[0, 0, 0, :3] = 0
    return x.requires_grad_()


def layer_of(kind: type[Any], window: Any, **options: Any) -> Any:
    stride, padding, dilation, groups = window
    layer = kind(4, 6, (3, 2), stride, padding, dilation, groups, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        layer.weight[0, 0, 0, 0] = 0
    return layer


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tau", [0.7, 1.0])
def test_recu(window: Any, bias: bool, training: bool, tau: float) -> None:
    layer, x = layer_of(ReCUConv2d, window, bias=bias).train(training), images()
    layer.set_tau_(tau)
    leaves = [x, layer.weight, layer.alpha, *([layer.bias] if bias else [])]
    tau = layer.tau.float().item()
    expected = binary_formula.recu_conv(x, layer.weight, layer.alpha, tau, layer.bias, training, *window)
    compare(layer(x), expected, *leaves)
    compare(recu_conv2d(x, layer.weight, layer.alpha, tau, layer.bias, *window, training), expected, *leaves)


def test_tau_changes_gradients_only() -> None:
    layer, x = layer_of(ReCUConv2d, WINDOWS[0]), images()
    outputs, gradients = [], []
    for tau in (0.6, 0.95):
        layer.set_tau_(tau)
        outputs.append(layer(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), layer.weight)[0])
    assert torch.equal(*outputs)
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act_bits32", [False, True])
def test_reste(window: Any, bias: bool, act_bits32: bool) -> None:
    rule = {"o": 2.5, "o_a": 1.75, "t": 1.25, "t_a": 0.75}
    layer, x = layer_of(ReSTEConv2d, window, bias=bias, act_bits32=act_bits32, **rule), images()
    leaves = [x, layer.weight, *([layer.bias] if bias else [])]
    numbers = [rule[n] for n in ("o", "o_a", "t", "t_a")]
    expected = binary_formula.reste_conv(x, layer.weight, *numbers, layer.bias, act_bits32, *window)
    compare(layer(x), expected, *leaves)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    compare(reste_conv2d(x, layer.weight, *numbers, layer.bias, *window, act_bits32=act_bits32), expected, *leaves)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("scale", ["layer", "channel", None])
@pytest.mark.parametrize("estimator", ["ste", "approx", Estimator("reste", 3.0, 1.2, 0.2), None])
def test_other_estimators_and_scales(window: Any, scale: str | None, estimator: Any) -> None:
    layer, x = layer_of(BinaryConv2d, window, estimator=estimator, weight_estimator="approx", scale=scale), images()
    w = layer.weight
    signs = {"ste": binary_formula.ste, "approx": binary_formula.approx, None: lambda x: x}.get(
        estimator, lambda x: binary_formula.reste(x, 3.0, 1.2, 0.2)
    )(x)
    factor = {"layer": w.abs().mean(), "channel": w.abs().mean((1, 2, 3)).view(-1, 1, 1, 1), None: 1}[scale]
    compare(layer(x), F.conv2d(signs, binary_formula.approx(w) * factor, layer.bias, *window), x, w, layer.bias)


@pytest.mark.parametrize("scale", ["layer", "channel", None])
@pytest.mark.parametrize("estimator", ["ste", "reste", None])
def test_linear(scale: str | None, estimator: str | None) -> None:
    layer = BinaryLinear(5, 3, estimator=estimator, scale=scale).double()
    x, w = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True), layer.weight
    rule = (lambda x: binary_formula.reste(x, 1.0, 1.5)) if estimator == "reste" else binary_formula.ste
    factor = {"layer": w.abs().mean(), "channel": w.abs().mean(1)[:, None], None: 1}[scale]
    compare(layer(x), F.linear(x if estimator is None else rule(x), rule(w) * factor, layer.bias), x, w, layer.bias)
    assert layer(x[0, 0]).shape == (3,)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    for kind in (BinaryConv2d, ReCUConv2d):
        layer = kind(2, 3, 3, padding=padding, dilation=2).double().eval()
        x = images(2)
        size = 2 if padding == "same" else 0
        same = kind(2, 3, 3, padding=size, dilation=2).double().eval()
        same.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), same(x))
        assert torch.equal(convert_(layer)(x.detach().float()), convert_(same)(x.detach().float()))


def test_sums_of_zero_give_exactly_zero() -> None:
    layer = ReSTEConv2d(4, 8, 3, padding=1, bias=False)
    output = layer(torch.randn(2, 4, 9, 9))
    steps = (output / layer.weight.abs().mean()).round()
    assert 0.02 < (steps == 0).float().mean() < 0.5
    assert torch.equal(output == 0, steps == 0)


def test_nan_in_a_weight_reaches_all_of_restes_output() -> None:
    layer = ReSTEConv2d(2, 3, 3)
    with torch.no_grad():
        layer.weight[1, 0, 0, 0] = math.nan
    assert layer(torch.randn(1, 2, 5, 5)).isnan().all()


def test_state_dicts() -> None:
    recu = ReCUConv2d(2, 3, 3, bias=False)
    assert {k: tuple(v.shape) for k, v in recu.state_dict().items()} == {
        "weight": (3, 2, 3, 3),
        "alpha": (3, 1, 1),
        "tau": (),
    }
    assert recu.tau == 1
    assert 0 <= recu.alpha.min() < recu.alpha.max() < 1
    plain = nn.Conv2d(2, 3, 3)
    for kind in (BinaryConv2d, ReSTEConv2d):
        kind(2, 3, 3).load_state_dict(plain.state_dict())
        plain.load_state_dict(kind(2, 3, 3).state_dict())
    BinaryLinear(2, 3).load_state_dict(nn.Linear(2, 3).state_dict())


def test_tau_of_either_shape_loads() -> None:
    layer = nn.Sequential(ReCUConv2d(2, 3, 3))
    state = layer.state_dict()
    for shape in ((), (1,)):
        given = {**state, "0.tau": torch.full(shape, 0.9)}
        layer.load_state_dict(given)
        assert layer[0].tau.shape == ()
        torch.testing.assert_close(layer[0].tau.item(), 0.9, rtol=1e-6, atol=0)
        assert given["0.tau"].shape == shape, "the caller's dict is left alone"
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.tau"):
        layer.load_state_dict({**state, "0.tau": torch.ones(2)})


def test_channel_bias() -> None:
    layer, x = ChannelBias(3), torch.randn(2, 3, 4, 4)
    assert torch.equal(layer(x), x)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"bias": (1, 3, 1, 1)}
    with torch.no_grad():
        layer.bias += torch.arange(3.0)[:, None, None]
    assert torch.equal(layer(x)[:, 2], x[:, 2] + 2)


def test_descriptions() -> None:
    assert "input=reste, weight=reste, scale=layer" in repr(ReSTEConv2d(1, 1, 3))
    assert "input=float, weight=ste, scale=channel" in repr(BinaryLinear(1, 1, estimator=None, scale="channel"))


@pytest.mark.parametrize("training", [False, True])
def test_half_types(training: bool) -> None:
    for kind in (ReCUConv2d, ReSTEConv2d, BinaryConv2d):
        layer = kind(2, 3, 3).to(torch.bfloat16).train(training)
        x = torch.randn(2, 2, 5, 5, dtype=torch.bfloat16, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert output.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16


X, W = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3)
A = torch.rand(3, 1, 1)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: recu_conv2d(X, W, A, 0.5), ValueError, r"tau must be above 0\.5 and at most 1, got 0\.5"),
        (lambda: recu_conv2d(X, W, A, 1.01), ValueError, r"tau must be above 0\.5 and at most 1, got 1\.01"),
        (lambda: recu_conv2d(X, W, A, math.nan), ValueError, r"tau must be above 0\.5 and at most 1, got nan"),
        (lambda: ReCUConv2d(1, 1, 3).set_tau_(0.4), ValueError, r"ReCUConv2d: tau must be above 0\.5 .* got 0\.4"),
        (lambda: recu_conv2d(X[:, :1], W[:, :1, :1, :1], A, 1.0), ValueError, r"at least 2 weights"),
        (
            lambda: recu_conv2d(X[:, :1, :1, :1], W[:, :1], A, 1.0, padding=1),
            ValueError,
            r"at least 2 elements a sample in training, got shape \(2, 1, 1, 1\)",
        ),
        (lambda: recu_conv2d(X[:0], W, A, 1.0), ValueError, r"with N of at least 1, got shape \(0, 4, 6, 6\)"),
        (lambda: recu_conv2d(X[0], W, A, 1.0), ValueError, r"recu_conv2d: input must be \(N, C, H, W\), got shape"),
        (lambda: recu_conv2d(X, W[0], A, 1.0), ValueError, r"recu_conv2d: weight must be \(O, C / groups, KH, KW\)"),
        (
            lambda: recu_conv2d(X, W.int(), A, 1.0),
            TypeError,
            r"recu_conv2d: weight must be float16, .* got torch\.int32",
        ),
        (lambda: recu_conv2d(X, W, A[:2], 1.0), ValueError, r"alpha must be \(3, 1, 1\), got shape \(2, 1, 1\)"),
        (lambda: recu_conv2d(X, W, A.view(3), 1.0), ValueError, r"alpha must be \(3, 1, 1\), got shape \(3,\)"),
        (lambda: recu_conv2d(X, W * math.inf, A, 1.0), ValueError, r"weight must be finite, got NaN or infinity"),
        (lambda: recu_conv2d(X, W * math.nan, A, 1.0), ValueError, r"weight must be finite, got NaN or infinity"),
        (lambda: recu_conv2d(X, W, A, 1.0, A), ValueError, r"recu_conv2d: bias must be \(3,\), got shape \(3, 1, 1\)"),
        (lambda: reste_conv2d(X, W, 0.9, 1.0), ValueError, r"reste_conv2d: o must be at least 1 and finite, got 0\.9"),
        (lambda: reste_conv2d(X, W, 1.0, math.inf), ValueError, r"o must be at least 1 and finite, got inf"),
        (lambda: reste_conv2d(X, W, 1.0, 1.0, 0.1), ValueError, r"t must be above interval 0\.1, got 0\.1"),
        (lambda: reste_conv2d(X, W, 1.0, 1.0, 1.5, math.nan), ValueError, r"t must be above interval 0\.1, got nan"),
        (lambda: reste_conv2d(X, W, "1", 1.0), TypeError, r"reste_conv2d: o must be a number, got str"),
        (lambda: reste_sign(X, 1.0, interval=0.0), ValueError, r"interval must be above 0, got 0\.0"),
        (lambda: reste_sign(X, 1.0, t=0.05), ValueError, r"t must be above interval 0\.1, got 0\.05"),
        (
            lambda: reste_conv2d(X, W[:0], 1.0, 1.0),
            ValueError,
            r"weight must be .*, not empty, got shape \(0, 4, 3, 3\)",
        ),
        (lambda: reste_conv2d(X.int(), W, 1.0, 1.0), TypeError, r"input must be float16, .* got torch\.int32"),
        (lambda: reste_conv2d(X[0], W, 1.0, 1.0), ValueError, r"input must be \(N, C, H, W\), got shape \(4, 6, 6\)"),
        (
            lambda: reste_conv2d(X[0], W, 1.0, 1.0, act_bits32=True),
            ValueError,
            r"reste_conv2d: input must be \(N, C, H, W\), got shape \(4, 6, 6\)",
        ),
        (
            lambda: ReSTEConv2d(4, 3, 3, act_bits32=True)(pack_signs(X)),
            TypeError,
            r"ReSTEConv2d: input must be a torch\.Tensor, got PackedSigns",
        ),
        (
            lambda: PackedWeightConv2d(ReSTEConv2d(4, 3, 3, act_bits32=True))(pack_signs(X)),
            TypeError,
            r"PackedWeightConv2d: input must be a torch\.Tensor, got PackedSigns",
        ),
        (lambda: BinaryConv2d(4, 3, 3, estimator="sts"), ValueError, r"one of ste, approx, reste, got 'sts'"),
        (lambda: BinaryConv2d(4, 3, 3, weight_estimator=Estimator("x")), ValueError, r"BinaryConv2d: .* got 'x'"),
        (lambda: BinaryConv2d(4, 3, 3, scale="mean"), ValueError, r"one of layer, channel or None, got 'mean'"),
        (lambda: BinaryLinear(4, 3, estimator=3), TypeError, r"must be a name or an Estimator, got int"),
        (lambda: BinaryLinear(4, 3)(X), ValueError, r"binary_linear: input must be \(\.\.\., I\) and weight \(O, I\)"),
        (lambda: ReSTEConv2d(4, 3, 3, o=0), ValueError, r"ReSTEConv2d: o must be at least 1 and finite, got 0"),
        (lambda: ReSTEConv2d(4, 3, 3).set_o_(0.5), ValueError, r"ReSTEConv2d: o must be at least 1 and finite"),
        (
            lambda: ReCUConv2d(4, 3, 3, padding=1, padding_mode="reflect"),
            ValueError,
            r"ReCUConv2d: padding_mode must be 'zeros', got 'reflect'",
        ),
        (
            lambda: BinaryConv2d(4, 3, 2, padding="same"),
            ValueError,
            r"BinaryConv2d: padding must be as much on either side, got 'same'",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
