"""Conversion to packed layers: what they compute, hold, store, load, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.quantization import (
    BoundedActivation,
    QuantizedConv2d,
    QuantizedLinear,
    fake_quantize_bounds,
    weight_fake_quantize,
)
from tersor.quantization.convert import convert_
from tersor.quantization.packed_layers import PackedActivation, PackedConv2d, PackedLinear, weight_codes

EPS = 2.0**-23
BITS = (2, 3, 4, 8)


def activation(
    channels: int, bits: int, lower: float = -1.3, upper: float = 2.0, dynamic: bool = False, **options: Any
):
    quantizer = BoundedActivation(channels, bits, **options)
    with torch.no_grad():
        quantizer.alpha_lower.fill_(lower)
        quantizer.alpha_upper.fill_(upper)
    quantizer.dynamic = dynamic
    return quantizer


class Block(nn.Module):
    """As in EDSR: the first convolution takes floats, the second one's input is quantised after a ReLU."""

    def __init__(self, channels: int, bits: int, dynamic: bool) -> None:
        super().__init__()
        options = {"padding": 1, "bits": bits, "mode": "percentile"}
        self.conv1, self.conv2 = (QuantizedConv2d(channels, channels, 3, **options) for _ in range(2))
        self.act1 = activation(channels, bits, 0.0, 1.5, dynamic)
        self.act2 = activation(channels, bits, -1.5, 1.7, dynamic)
        self.also = nn.ModuleList([self.act1])  # registered twice, as EDSR's is

    def quantized_pairs(self) -> Iterator[tuple[str, str, bool]]:
        yield "act1", "conv2", True

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(x)
        if getattr(self.conv2, "quantizes_input", False):
            branch = self.conv2(branch, relu=True)
        else:
            branch = self.conv2(self.act1(branch, relu=True))
        return branch + self.act2(x)


class Kept(nn.Module):
    """As in RDN: the activation's output is used besides."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.act = activation(4, bits)
        self.conv = QuantizedConv2d(4, 4, 1, bits=bits, mode="minmax")

    def quantized_pairs(self) -> Iterator[tuple[str, str, bool]]:
        yield "act", "conv", False

    def forward(self, x: Tensor) -> Tensor:
        kept = self.act(x)
        return kept + (self.conv(x) if getattr(self.conv, "quantizes_input", False) else self.conv(kept))


def net(bits: int, dynamic: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), *(Block(6, bits, dynamic) for _ in range(2)), nn.Conv2d(6, 3, 1)
    )


def fake_terms(layer: nn.Module, quantizer: nn.Module | None, x: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """The fake-quantised layer in float64 sums, and the sum of the terms' absolute values."""
    y = torch.relu(x) if quantizer is None and relu else x if quantizer is None else quantizer(x, relu=relu)
    weight = layer.quantized_weight()
    bias = layer.bias if layer.bias is not None else torch.zeros(weight.shape[0])
    tensors = [t.detach().double() for t in (y, weight, bias)]
    if isinstance(layer, QuantizedLinear):
        return F.linear(*tensors), F.linear(*(t.abs() for t in tensors))
    return layer._conv_forward(*tensors), layer._conv_forward(*(t.abs() for t in tensors))


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"padding": (2, 1), "stride": (1, 2), "bias": False},
    "dilated": {"padding": 2, "dilation": 2},
    "grouped": {"padding": 1, "groups": 3},
    "same": {"padding": "same"},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
    "wrapped": {"padding": (0, 1), "padding_mode": "circular"},
}


@pytest.mark.parametrize("bounds", [(-1.3, 2.0), (0.6, 2.0), (-2.0, -0.4)], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_convolution(kind: str, bits: int, bounds: tuple[float, float], dynamic: bool) -> None:
    for mode in ("symmetric", "minmax", "percentile"):
        quantizer = activation(9, bits, *bounds, dynamic=dynamic)
        layer = QuantizedConv2d(9, 12, 3, bits=bits, mode=mode, activation=quantizer, **LAYERS[kind])
        layer = layer.eval().requires_grad_(False)
        packed = convert_(copy.deepcopy(layer))
        assert isinstance(packed, PackedConv2d)
        assert packed.quantizes_input
        x = 2 * torch.randn(2, 9, 8, 11)
        for relu in (False, True):
            exact, terms = fake_terms(layer, quantizer, x, relu)
            assert ((packed(x, relu=relu).double() - exact).abs() <= 3 * EPS * terms).all()


@pytest.mark.parametrize("bits", BITS)
def test_linear(bits: int) -> None:
    for mode in ("symmetric", "minmax"):
        quantizer = activation(9, bits)
        layer = QuantizedLinear(9, 7, bits=bits, mode=mode, activation=quantizer).eval().requires_grad_(False)
        packed = convert_(copy.deepcopy(layer))
        assert isinstance(packed, PackedLinear)
        for shape in ((9,), (4, 9), (2, 3, 9)):
            x = 2 * torch.randn(shape)
            exact, terms = fake_terms(layer, quantizer, x, False)
            assert ((packed(x).double() - exact).abs() <= 3 * EPS * terms).all()


@pytest.mark.parametrize("mode", ["symmetric", "minmax", "percentile"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_only(bits: int, mode: str) -> None:
    """The very same float weights, hence the very same results."""
    model = nn.Sequential(
        QuantizedConv2d(3, 8, 3, padding=1, padding_mode="reflect", bits=bits, mode=mode),
        nn.Flatten(),
        QuantizedLinear(8 * 20, 5, bias=False, bits=bits, mode=mode),
    ).eval()
    x = torch.randn(2, 3, 4, 5)
    with torch.no_grad():
        expected = model(x)
        weights = [weight_fake_quantize(model[i].weight, bits, mode) for i in (0, 2)]
        converted = convert_(model)
        assert not any(converted[i].quantizes_input for i in (0, 2))
        assert "computes in float" in repr(converted)
        for i, weight in zip((0, 2), weights, strict=True):
            if converted[i].stored_bits <= 8 and bits < 8:
                assert torch.equal(converted[i].dequantized_weight(), weight)
        if bits < 8:
            assert torch.equal(converted(x), expected)
        assert converted.double()(x.double()).dtype == torch.float64
        assert converted.half()(x.half()).dtype == torch.float16


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bits", BITS)
def test_network(bits: int, dynamic: bool) -> None:
    """Layer by layer within the bound, on the inputs that the layers get; as a whole close, but for flipped levels."""
    model = net(bits, dynamic).eval().requires_grad_(False)
    converted = copy.deepcopy(model)
    assert convert_(converted) is converted
    x = torch.rand(2, 3, 12, 13)
    pairs = 0
    for before, after in zip(model[1:3], converted[1:3], strict=True):
        assert isinstance(after.conv1, PackedConv2d)
        assert not after.conv1.quantizes_input
        assert isinstance(after.also[0], PackedActivation)
        assert after.also[0] is after.act1
        assert isinstance(after.act2, BoundedActivation)
        branch = before.conv1(model[0](x))
        assert torch.equal(after.conv1(model[0](x)), branch)
        exact, terms = fake_terms(before.conv2, before.act1, branch, True)
        assert ((after.conv2(branch, relu=True).double() - exact).abs() <= 3 * EPS * terms).all()
        pairs += 1
    assert pairs == 2
    expected, output = model(x), converted(x)
    assert (output - expected).abs().mean() <= 1e-3 * expected.abs().max()
    assert ((output - expected).abs() <= 1e-5 * expected.abs().max()).float().mean() >= 0.95


@pytest.mark.parametrize("bits", BITS)
def test_activation_that_is_used_besides(bits: int) -> None:
    model = Kept(bits).eval().requires_grad_(False)
    x = torch.randn(2, 4, 5, 6)
    kept, expected = model.act(x), model(x)
    convert_(model)
    assert torch.equal(model.act(x), kept)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(key.startswith("act.") for key in model.state_dict())


def test_sequential_takes_the_activation_in_front() -> None:
    shared = activation(5, 3)
    model = nn.Sequential(
        QuantizedConv2d(3, 5, 1, bits=3),
        nn.ReLU(),
        shared,
        QuantizedConv2d(5, 5, 3, padding=1, bits=3),
        shared,
        nn.Dropout(),
        nn.Sequential(activation(5, 3), QuantizedConv2d(5, 5, 1, bits=3)),
    ).eval()
    x = torch.randn(2, 3, 6, 7)
    with torch.no_grad():
        expected = model(x)
        convert_(model)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    kinds = [type(m) for m in (*model, *model[6])]
    identity, packed = nn.Identity, PackedConv2d
    assert kinds[:3] == [packed, nn.ReLU, identity]
    assert kinds[3:] == [packed, BoundedActivation, nn.Dropout, nn.Sequential, identity, packed]
    assert [m.quantizes_input for m in (model[0], model[3], model[6][1])] == [False, True, True]


def test_shared_layer_stays_shared() -> None:
    conv = QuantizedConv2d(4, 4, 1, bits=4, activation=activation(4, 4))
    model = convert_(nn.Sequential(conv, nn.ReLU(), conv))
    assert model[0] is model[2]
    assert isinstance(model[0], PackedConv2d)


def saved(model: nn.Module, way: str) -> dict[str, Tensor]:
    """The state dict, out of a file's bytes."""
    if way == "safetensors":
        return safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["torch", "safetensors"])
@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded(bits: int, way: str) -> None:
    """Into a model that was converted untrained, with other layers dynamic and other levels taken."""
    model = nn.Sequential(net(bits, True), net(bits, False)).eval()
    x = torch.rand(1, 6, 5, 7)

    def run(m: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [m[0](x[:, :3]), m[1](x[:, 3:])]

    convert_(model)
    other = convert_(nn.Sequential(net(bits, False), net(bits, True)).eval())
    other.load_state_dict(saved(model, way))
    assert all(torch.equal(a, b) for a, b in zip(run(other), run(model), strict=True))
    assert [m[1].conv2.activation is not None for m in other] == [True, False]
    assert all(torch.equal(other.state_dict()[key], value) for key, value in model.state_dict().items())
    again = copy.deepcopy(other)
    assert all(torch.equal(a, b) for a, b in zip(run(again), run(model), strict=True))


def test_extra_level_takes_one_bit_more_and_loads() -> None:
    """2-bit weights of four levels and of five: 1/16 of float32, and 3/32."""
    four, five = (QuantizedConv2d(16, 16, 3, bits=2, mode="minmax") for _ in range(2))
    with torch.no_grad():
        for layer, least in ((four, -1.0), (five, -1.5)):
            layer.weight.clamp_(least, 1.5 if layer is five else 2.0)
            layer.weight.view(-1)[:2] = torch.tensor([least, 1.5 if layer is five else 2.0])
    a, b = convert_(four), convert_(five)
    elements = 16 * 16 * 9
    assert (a.stored_bits, b.stored_bits) == (2, 3)
    assert a.packed.numel() == elements * 4 // 16
    assert b.packed.numel() == elements * 4 * 3 // 32
    assert len(b.dequantized_weight().unique()) <= 5
    state = {key: t.clone() for key, t in a.state_dict().items()}
    a.load_state_dict(b.state_dict())
    assert torch.equal(a.dequantized_weight(), b.dequantized_weight())
    b.load_state_dict(state)
    assert b.packed.numel() == elements * 4 // 16


def test_sizes() -> None:
    """A static 2-bit layer stores a sixteenth of its weights and a few numbers, and nothing else."""
    layer = QuantizedConv2d(64, 64, 3, bits=2, activation=activation(64, 2))
    float_bytes = layer.weight.numel() * 4
    state = convert_(layer).state_dict()
    assert state["packed"].numel() * 16 == float_bytes
    assert state["packed"].dtype == torch.uint8
    assert all(type(t) is Tensor for t in state.values())
    rest = {key: t.numel() for key, t in state.items() if key != "packed"}
    assert rest == {"weight_scale": 2, "weight_zero": 1, "bias": 64, "bits": 3, "lower": 1, "upper": 1}


def test_stays_in_eval_mode_and_float32() -> None:
    layer = QuantizedConv2d(4, 5, 3, bits=4, activation=activation(4, 4, dynamic=True))
    packed = convert_(nn.Sequential(layer)).train()[0]
    x = torch.randn(2, 4, 6, 6)
    before = packed.activation.atten_c[1].running_mean.clone()
    expected = packed(x)
    assert not packed.activation.training
    assert torch.equal(packed.activation.atten_c[1].running_mean, before)
    assert not any(p.requires_grad for p in packed.parameters())
    packed.half()
    assert torch.equal(packed(x), expected)
    assert {t.dtype for t in packed.state_dict().values() if t.is_floating_point()} == {torch.float32}
    for dtype in (torch.float16, torch.bfloat16):
        output = packed(x.to(dtype))
        assert output.dtype == dtype
        exact = packed(x.to(dtype).float())
        torch.testing.assert_close(output.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_stage_decides_whether_bounds_are_dynamic() -> None:
    layer = QuantizedConv2d(4, 5, 3, bits=4, activation=activation(4, 4, dynamic=True)).eval()
    layer.activation.stage = "static"
    assert convert_(copy.deepcopy(layer)).activation is None
    layer.activation.stage = "dynamic"
    assert convert_(layer).activation is not None


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes(bits: int) -> None:
    for mode in ("symmetric", "minmax", "percentile"):
        weight = torch.randn(5, 7)
        codes, scale, zero, clamped = weight_codes(weight, bits, mode)
        assert codes.dtype == torch.int8
        if not clamped:
            assert torch.equal((codes.float() + zero) * scale[0] / scale[1], weight_fake_quantize(weight, bits, mode))


def test_warns_of_levels_without_a_code() -> None:
    layer = QuantizedConv2d(2, 2, 1, bits=8, mode="minmax", activation=activation(2, 8, -1.0, 1.0))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-1.0, 1.0, 0.3, 0.2]).view(2, 2, 1, 1))
    with pytest.warns(RuntimeWarning, match=r"convert_: 0: ") as caught:
        model = convert_(nn.Sequential(layer))
    assert sorted(str(w.message).split(" is of")[0] for w in caught) == [
        "convert_: 0: its activation",
        "convert_: 0: the weight",
    ]
    assert "test_convert" in caught[0].filename
    expected = layer.activation(torch.tensor(0.9).view(1, 1, 1, 1).expand(1, 2, 1, 1))
    top = model(torch.full((1, 2, 1, 1), 5.0)) - model(torch.full((1, 2, 1, 1), -5.0))
    assert top.isfinite().all()
    assert expected.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_(QuantizedConv2d(2, 2, 1, bits=7, mode="symmetric", activation=activation(2, 7, -1.0, 1.0)))


class _Claims(nn.Module):
    def __init__(self, activation_name: str, layer_name: str) -> None:
        super().__init__()
        self.names = activation_name, layer_name
        self.act, self.relu = activation(3, 4), nn.ReLU()
        self.conv = QuantizedConv2d(3, 3, 1, bits=4)
        self.full = QuantizedConv2d(3, 3, 1, bits=4, activation=activation(3, 4))

    def quantized_pairs(self) -> Iterator[tuple[str, str, bool]]:
        yield *self.names, False


def _with(layer: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), "model must hold a quantised layer, got Sequential without one"),
        (nn.Sequential(QuantizedConv2d(3, 3, 1, bits=32)), "0: must quantise to 2 to 8 bits, got bits 32"),
        (
            nn.Sequential(activation(3, 32), QuantizedConv2d(3, 3, 1, bits=4)),
            "1: its activation must quantise to 2 to 8 bits, got bits 32",
        ),
        (_with(QuantizedConv2d(3, 3, 1, bits=4), stage="float"), "QuantizedConv2d: must be in stage static or dynamic"),
        (
            QuantizedConv2d(3, 3, 1, bits=4, activation=_with(activation(3, 4), stage="record")),
            "its activation must be in stage static or dynamic, got 'record'",
        ),
        (
            nn.Sequential(QuantizedConv2d(3, 3, 1, bits=4, activation=nn.ReLU())),
            "0: its activation must be a BoundedActivation, got ReLU",
        ),
        (
            QuantizedLinear(3, 3, bits=4, activation=activation(3, 4, dynamic=True)),
            "QuantizedLinear: the activation of a linear layer must be static",
        ),
        (QuantizedConv2d(3, 3, 2, padding="same", bits=4), "padding must be the same on both sides, got 'same'"),
        (_Claims("relu", "conv"), "conv: its activation must be a BoundedActivation, got ReLU"),
        (_Claims("act", "relu"), "quantized_pairs must name a quantised layer, got ReLU"),
        (_Claims("act", "full"), "full must have one activation, got two"),
    ],
)
def test_refused(model: nn.Module, message: str) -> None:
    before = repr(model)
    with pytest.raises(ValueError, match="convert_: .*" + message):
        convert_(model)
    assert repr(model) == before, "nothing has been changed"


def test_refused_for_its_values() -> None:
    model = nn.Sequential(QuantizedConv2d(3, 3, 1, bits=4), QuantizedConv2d(3, 3, 1, bits=4, mode="minmax"))
    nn.init.ones_(model[1].weight)
    with pytest.raises(ValueError, match=r"convert_: 1: .*weight must have unequal bounds"):
        convert_(model)
    assert isinstance(model[0], QuantizedConv2d)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        convert_([])  # type: ignore[arg-type]


def test_refused_state() -> None:
    packed = convert_(QuantizedConv2d(3, 3, 1, bits=4))
    state = {key: t.clone() for key, t in packed.state_dict().items()}
    for bits, message in (
        ([4, 6, 0], "must be three numbers"),
        ([4, 4, 3], "the input's codes here are not quantised"),
    ):
        with pytest.raises(RuntimeError, match="bits: " + message):
            packed.load_state_dict({**state, "bits": torch.tensor(bits)})
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        packed.load_state_dict({**state, "packed": torch.zeros(2, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({key: t for key, t in state.items() if key != "weight_zero"})
    packed.load_state_dict(state)


def test_compiled() -> None:
    torch._dynamo.reset()
    model = convert_(net(4, False).eval())
    x = torch.rand(1, 3, 8, 9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


def test_bounds_are_those_of_the_activation() -> None:
    quantizer = activation(3, 4, dynamic=True).eval().requires_grad_(False)
    packed = convert_(QuantizedConv2d(3, 3, 1, bits=4, activation=quantizer))
    x = torch.randn(2, 3, 4, 4)
    expected = fake_quantize_bounds(x, *quantizer.bounds(x), 4)
    assert torch.equal(PackedActivation(packed)(x), expected)
