"""ONNX files of fake-quantised models: what ONNX Runtime computes from them, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from subject import in_ci
from torch import Tensor, nn

import tersor
from tersor.models.edsr import EDSR
from tersor.quantization import (
    BoundedActivation,
    QuantizedConv2d,
    QuantizedLinear,
    fake_quantize_add,
    fake_quantize_affine,
    fake_quantize_bounds,
    fake_quantize_lsq,
    fake_quantize_lsq_plus,
    fake_quantize_pact,
    weight_fake_quantize,
)
from tersor.quantization.onnx_export import export_onnx

NEEDED = ("onnx", "onnxruntime", "onnxscript")
if not in_ci() and not all(map(importlib.util.find_spec, NEEDED)):
    pytest.skip(f'needs {", ".join(NEEDED)}: pip install "tersor[onnx]"', allow_module_level=True)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

IMAGE = ({0: "batch", 2: "height", 3: "width"},)
# What ONNX Runtime changes of its own accord, see export_onnx.
EXACT = {"disabled_optimizers": ["WeightBiasQuantization"]}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def runtime(path: Path, *inputs: Tensor, optimize: bool = True, **options: Any) -> list[Tensor]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], **options)
    names = [each.name for each in session.get_inputs()]
    outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(output) for output in outputs]


@torch.no_grad()
def compute(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    outputs = model(*inputs)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def initializer_types(path: Path) -> dict[str, str]:
    return {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        for tensor in onnx.load(path).graph.initializer
    }


def ulps(actual: Tensor, expected: Tensor) -> int:
    """The greatest distance in units in the last place; -0 is 0."""
    a, b = ((t + 0.0).view(torch.int32).long() for t in (actual, expected))
    return int((a - b).abs().max())


class Each(nn.Module):
    """Several functions of one input, each with its own parameters."""

    def __init__(self, *functions: tuple[Callable[..., Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.functions = [function for function, _ in functions]
        self.parameter_lists = nn.ModuleList([nn.ParameterList(parameters) for _, parameters in functions])

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        lists = zip(self.functions, self.parameter_lists, strict=True)
        return tuple(function(input, *parameters) for function, parameters in lists)


def bounds_quantizer(
    bits: int, lower: float, upper: float, **options: Any
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def quantize(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return fake_quantize_bounds(x, low, high, bits, **options)

    return quantize, [torch.tensor([lower]), torch.tensor([upper])]


def around(*values: float) -> Tensor:
    """The values and their neighbours, far values and infinities."""
    middle = torch.tensor(values)
    infinity = torch.full_like(middle, float("inf"))
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e9, -3e9, float("inf"), -float("inf")])
    return torch.cat([middle, middle.nextafter(infinity), middle.nextafter(-infinity), far])


BOUNDS = [
    *[(bits, -1.3137, 1.7211) for bits in range(2, 9)],
    *[(bits, -0.171, 1.9) for bits in (2, 4, 8)],
    *[(bits, -u, u) for bits in (2, 3, 4, 7) for u in (1.5, 1.7, 1.9)],  # a level more; the bounds are on ties
    (2, 0.3, 1.7),
    (4, -1.9, -0.4),  # 0 is no level
    (4, 1.2, 1.9),
]


def test_activations_between_bounds_but_for_rare_neighbouring_levels(tmp_path: Path) -> None:
    model = Each(*[bounds_quantizer(*each) for each in BOUNDS], bounds_quantizer(4, -1.31, 1.72, relu=True)).eval()
    x = torch.cat([torch.rand(200_000) * 5 - 2.5, around(*{bound for each in BOUNDS for bound in each[1:]})])
    path = tmp_path / "model.onnx"
    export_onnx(model, x[:9], path, dynamic_shapes=({0: "count"},))
    onnx.checker.check_model(path, full_check=True)
    results = zip(runtime(path, x), compute(model, x), [*BOUNDS, (4, -1.31, 1.72)], strict=True)
    for actual, expected, (bits, lower, upper) in results:
        step = (upper - lower) / (2**bits - 1)
        moved = (actual - expected).abs() > step / 2
        assert moved.sum() <= 1e-5 * len(x), (bits, lower, upper)
        assert not moved[(x == torch.tensor(lower)) | (x == torch.tensor(upper))].any(), (bits, lower, upper)
        assert ulps(actual[~moved], expected[~moved]) <= 2, (bits, lower, upper)
        assert ((actual - expected)[moved].abs() < 1.01 * step).all(), (bits, lower, upper)
        place = x[moved].double().clamp(lower, upper) / step
        assert ((place - place.floor() - 0.5).abs() < 1e-4).all(), (bits, lower, upper)
    assert operators(path).count("QuantizeLinear") == len(BOUNDS) + 1


def test_the_middle_between_two_levels_goes_to_the_even_multiple(tmp_path: Path) -> None:
    # Steps of 1/4: with an even zero point the model's even q is the even multiple, with an odd one it is not.
    even, odd = bounds_quantizer(4, -2.0, 1.75), bounds_quantizer(4, -1.75, 2.0)
    model, x = Each(even, odd).eval(), torch.arange(-2.0, 2.0, 0.125)
    export_onnx(model, x, tmp_path / "model.onnx")
    (first, second), (same, other) = runtime(tmp_path / "model.onnx", x), compute(model, x)
    middle = (x * 4) % 1 == 0.5
    for actual, lower, upper in ((first, -2.0, 1.75), (second, -1.75, 2.0)):
        assert actual.equal(torch.round(x * 4).clamp(lower * 4, upper * 4) / 4)
    assert first.equal(same)
    assert second[~middle].equal(other[~middle])
    inside = middle & (x > -1.75)
    assert ((second - other)[inside].abs() == 0.25).all()


def test_other_rules(tmp_path: Path) -> None:
    scale, offset, alpha = torch.tensor([0.0137]), torch.tensor([-0.773]), torch.tensor([1.337])
    exact = [
        *[(lambda x, s, b=bits: fake_quantize_lsq(x, s, b, b % 2 == 0), [scale]) for bits in (2, 3, 7, 8)],
        *[(lambda x, s, o, b=bits: fake_quantize_lsq_plus(x, s, o, b), [scale, offset]) for bits in (2, 5, 8)],
        *[
            (
                lambda x, s, z, r=levels: fake_quantize_affine(x, s, z, *r, corrected=True),
                [scale, torch.tensor([zero])],
            )
            for levels, zero in (((0, 255), 121.3), ((-128, 127), -3.2), ((-7, 7), 0.0), ((0, 15), 99.0))
        ],
    ]
    near = [
        *[(lambda x, a, b=bits: fake_quantize_pact(x, a, b), [alpha]) for bits in (2, 4, 8)],
        (lambda x, s, z: fake_quantize_affine(x, s, z, 0, 255), [scale, torch.tensor([121.3])]),
    ]
    model = Each(*exact, *near).eval()
    x = torch.cat([torch.rand(200_000) * 5 - 2.5, around(0.0, 1.337, -0.773)])
    path = tmp_path / "model.onnx"
    export_onnx(model, x, path)
    actual, expected = runtime(path, x), compute(model, x)
    for i in range(len(exact)):
        assert actual[i].equal(expected[i]), i
    for i in range(len(exact), len(actual)):
        moved = ~torch.isclose(actual[i], expected[i], rtol=3e-7, atol=0)
        assert moved.sum() <= 1e-5 * len(x), i
    assert set(initializer_types(path).values()) == {"float", "uint8"}


def test_one_value_per_channel(tmp_path: Path) -> None:
    lower, upper = torch.tensor([-1.1, -0.3, 0.0]), torch.tensor([0.7, 2.2, 1.3])
    quantize = bounds_quantizer(4, 0.0, 1.0)[0]
    model = Each(
        (quantize, [lower.view(1, 3, 1, 1), upper.view(1, 3, 1, 1)]),
        (quantize, [lower.view(1, 3, 1, 1), torch.tensor([1.9])]),
        (lambda x, s: fake_quantize_lsq(x, s, 8, True), [torch.tensor([0.011, 0.02, 0.03]).view(1, 3, 1, 1)]),
    ).eval()
    export_onnx(model, torch.randn(2, 3, 5, 7), tmp_path / "model.onnx", dynamic_shapes=IMAGE)
    for x in (torch.randn(2, 3, 5, 7), torch.randn(1, 3, 31, 17)):
        for actual, expected in zip(runtime(tmp_path / "model.onnx", x), compute(model, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0)


WEIGHTS = [(bits, mode) for bits in (2, 3, 4, 5, 8) for mode in ("symmetric", "minmax", "percentile")]


class Weights(nn.Module):
    """Returns its quantised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(5, 3, 3, 3) + 0.1 for _ in WEIGHTS])
        self.lsq, self.scale = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.rand(4, 1) / 8 + 0.1)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        quantized = [weight_fake_quantize(w, *case) for w, case in zip(self.weights, WEIGHTS, strict=True)]
        return *quantized, fake_quantize_lsq(self.lsq, self.scale, 4, True), input + 1


@pytest.mark.parametrize("int4", [True, False])
def test_weights_are_stored_as_integers(tmp_path: Path, int4: bool) -> None:
    model, path, x = Weights().eval(), tmp_path / "model.onnx", torch.zeros(2)
    export_onnx(model, x, path, int4=int4, opset_version=21 if int4 else 18)
    onnx.checker.check_model(path, full_check=True)
    actual, expected = runtime(path, x), compute(model, x)
    for stored, weight in zip(actual, expected, strict=True):
        assert ulps(stored, weight) <= 2
    assert actual[-2].equal(expected[-2])
    small = 1 + sum(bits <= 4 for bits, _ in WEIGHTS) if int4 else 0
    codes = [kind for name, kind in initializer_types(path).items() if ".codes" in name]
    assert (codes.count("int4"), codes.count("int8")) == (small, 1 + len(WEIGHTS) - small)
    floats = [t.dims for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(len(dims) <= 1 for dims in floats), "a float weight is left in the file"


class Residual(nn.Module):
    """Convolutions, a residual sum and a linear layer, in which every sum is exact in float32.

    All steps are powers of two, so that no order of summation matters and no value is near the middle of two levels
    without being there. The biases are a quarter of the weights' and activations' joint step.
    """

    def __init__(self, bits: int, channels: int = 4) -> None:
        super().__init__()
        self.bits = bits
        self.first, self.second, self.third = (BoundedActivation(channels, bits) for _ in range(3))
        convolution = {"padding": 1, "bits": bits}
        self.convolution = QuantizedConv2d(channels, channels, 3, mode="minmax", **convolution)
        self.other = QuantizedConv2d(
            channels, channels, 3, mode="percentile", percentile=100, activation=self.second, **convolution
        )
        self.linear = QuantizedLinear(channels, 3, bits=bits, mode="minmax")
        self.branch = BoundedActivation(channels, bits)
        with torch.no_grad():
            for activation, step in zip((self.first, self.second, self.third, self.branch), (2, 3, 1, 2), strict=True):
                self._bound(activation, 2.0 ** (step - bits))
            for layer in (self.convolution, self.other, self.linear):
                self._weigh(layer)

    def _bound(self, activation: BoundedActivation, step: float) -> None:
        half = 2 ** (self.bits - 1)
        activation.alpha_lower.fill_(-half * step)
        activation.alpha_upper.fill_((half - 1) * step)

    def _weigh(self, layer: QuantizedConv2d | QuantizedLinear) -> None:
        half = 2 ** (self.bits - 1)
        levels = torch.randint(-half * 4, half * 4 - 3, layer.weight.shape) / 4
        levels.view(-1)[:2] = torch.tensor([-half, half - 1])  # the bounds
        layer.weight.copy_(levels * 2.0 ** (-2 - self.bits))
        layer.bias.copy_(torch.randint(-99, 99, layer.bias.shape) * 2.0 ** (-4 - 2 * self.bits))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(torch.relu(input))
        branch = self.other(self.convolution(x))
        bounds = (*self.third.bounds(branch), *self.branch.bounds(input))
        total = fake_quantize_add(branch, input, *bounds, self.bits)
        return total, self.linear(self.third(total, relu=True).permute(0, 2, 3, 1))


@pytest.mark.parametrize(("bits", "int4"), [(2, True), (4, True), (4, False), (8, True)])
def test_a_residual_network_is_the_same_bit_for_bit(tmp_path: Path, bits: int, int4: bool) -> None:
    model, path = Residual(bits).eval(), tmp_path / "model.onnx"
    export_onnx(model, torch.randn(2, 4, 8, 8), path, dynamic_shapes=IMAGE, int4=int4)
    onnx.checker.check_model(path, full_check=True)
    for shape in [(2, 4, 8, 8), (1, 4, 13, 32), (5, 4, 3, 6)]:
        x = torch.randint(-4096, 4096, shape) / 1024
        expected = compute(model, x)
        assert expected[0].unique().numel() > 2
        for optimize in (True, False):
            options = EXACT if bits == 8 else {}
            for actual, wanted in zip(runtime(path, x, optimize=optimize, **options), expected, strict=True):
                assert actual.equal(wanted), (shape, optimize)


def calibrated(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Static bounds from one batch."""
    for module in model.modules():
        if isinstance(module, BoundedActivation):
            module.pending, module.stage = True, "static"
    with torch.no_grad():
        model.train()(*inputs)
    for module in model.modules():
        if isinstance(module, BoundedActivation):
            module.stage = "dynamic"
    return model.eval()


@pytest.mark.parametrize("bits", [2, 8])
def test_edsr(tmp_path: Path, bits: int) -> None:
    images = torch.rand(2, 3, 16, 16) * 255
    model, path = calibrated(EDSR(2, blocks=2, channels=8, bits=bits), images), tmp_path / "edsr.onnx"
    export_onnx(model, images, path, dynamic_shapes=IMAGE, input_names=["low"], output_names=["high", "feature"])
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    assert [each.name for each in (*graph.input, *graph.output)] == ["low", "high", "feature"]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert operators(path).count("QuantizeLinear") == 6
    assert operators(path).count("DequantizeLinear") == 10
    for shape in [(2, 3, 16, 16), (1, 3, 9, 20)]:
        x = torch.rand(shape) * 255
        for actual, expected in zip(runtime(path, x, **(EXACT if bits == 8 else {})), compute(model, x), strict=True):
            error = (actual - expected).abs() / expected.abs().max()
            # Sums in another order; one that takes a value over the middle of two levels moves the pixels around.
            assert error.mean() < 1e-4
            assert error.median() < 1e-6


class Layer(nn.Module):
    """A quantiser below the model's root, so that it has a path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleList([layer])

    def forward(self, input: Tensor) -> Tensor:
        return self.body[0](input)


def activation(bits: int, lower: float, upper: float) -> BoundedActivation:
    layer = BoundedActivation(3, bits)
    nn.init.constant_(layer.alpha_lower, lower)
    nn.init.constant_(layer.alpha_upper, upper)
    return layer


def test_what_a_layer_is_in_the_file(tmp_path: Path) -> None:
    layer, path = QuantizedConv2d(3, 4, 3, bits=4, activation=activation(4, -1.3, 1.9)), tmp_path / "model.onnx"
    export_onnx(Layer(layer).eval(), torch.rand(2, 3, 8, 8), path)
    assert sorted(operators(path)) == ["Conv", "DequantizeLinear", "DequantizeLinear", "Min", "QuantizeLinear"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    scale = 15 / 3.2
    assert stored["body.0.activation.scale"] == pytest.approx(1 / scale)
    assert stored["body.0.activation.zero_point"] == -round(scale * -1.3) == 6  # 8 - z
    assert stored["body.0.activation.highest"] == pytest.approx(9 / scale)
    assert stored["body.0.quantize_weight.zero_point"] == 0
    codes = stored["body.0.quantize_weight.codes"].astype(int)
    assert abs(codes).max() == 7
    with torch.no_grad():
        weight = layer.quantized_weight()
    torch.testing.assert_close(torch.tensor(codes * stored["body.0.quantize_weight.scale"]).float(), weight)


def test_a_dynamic_gate_is_refused_and_its_layer_named(tmp_path: Path) -> None:
    layer = BoundedActivation(3, 4)
    layer.dynamic = True
    with pytest.raises(ValueError, match=r"export_onnx: body\.0: bounds, scale or offset depend on the model's input"):
        export_onnx(Layer(layer).eval(), torch.randn(2, 3, 4, 4), tmp_path / "model.onnx")
    layer.stage = "static"
    export_onnx(Layer(layer).eval(), torch.randn(2, 3, 4, 4), tmp_path / "model.onnx")


def test_levels_beyond_the_type_are_refused_or_stored_in_16_bits(tmp_path: Path) -> None:
    for layer, levels in [
        (activation(8, -10, 10), "257 levels, -128 to 128"),
        (activation(8, 0.5, 1.5), "255 levels, 128 to 382"),
        (activation(4, 100, 101), "16 levels, 1500 to 1515"),
    ]:
        x = torch.rand(2, 3, 16, 16) * 24 - 12 if levels.startswith("257") else torch.rand(2, 3, 16, 16) * 101
        model, path = Layer(layer).eval(), tmp_path / "model.onnx"
        with pytest.raises(ValueError, match=rf"export_onnx: body\.0: its {levels} steps from 0"):
            export_onnx(model, x, path)
        assert not path.exists()
        export_onnx(model, x, path, int16=True)
        assert initializer_types(path)["body.0.zero_point"] == "uint16"
        (actual,), (expected,) = runtime(path, x), compute(model, x)
        torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0)
        path.unlink()


def refused(tmp_path: Path, model: nn.Module, x: Tensor, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        export_onnx(model.eval(), x, tmp_path / "model.onnx", **options)
    assert not (tmp_path / "model.onnx").exists()


def test_other_refusals(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 4, 4)
    unit = bounds_quantizer(4, -1.0, 1.0, rule="unit")
    refused(tmp_path, Layer(Each(unit)), x, r"body\.0: rule 'unit'")
    samples = (bounds_quantizer(4, 0.0, 1.0)[0], [-torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1)])
    refused(tmp_path, Layer(Each(samples)), x, r"body\.0: one value per sample")
    refused(tmp_path, Layer(activation(4, 1, -1)), x, r"body\.0: .*lower must be less than upper, got lower 1\.0")
    refused(tmp_path, Layer(activation(4, -1, 1.1).double()), x.double(), r"body\.0: only float32 .* torch\.float64")
    constant = QuantizedConv2d(3, 4, 1, bits=4, mode="minmax")
    nn.init.ones_(constant.weight)
    refused(tmp_path, Layer(constant), x, r"body\.0\.quantize_weight: .*unequal bounds")
    refused(tmp_path, nn.Conv2d(3, 4, 1), x, "must run a fake-quantiser")
    bounds = nn.Sequential(activation(4, -1, 1.1), Each((lambda x: x * tersor.percentile_bounds(x)[1], [])))
    refused(tmp_path, Layer(bounds), x, r"body\.0\.1: percentile_bounds is not expressible in ONNX")
    clips = Each((lambda x, a: fake_quantize_pact(x, a, 32), [torch.ones(1)]))
    refused(tmp_path, Layer(clips), x, r"body\.0: bits=32 clips")
    refused(tmp_path, Layer(activation(4, -1, 1.1)), x, "opset_version must be at least 21", opset_version=20)
    refused(tmp_path, Layer(activation(4, -1, 1.1)), x, "at least 18", opset_version=17, int4=False)
    model = Layer(activation(4, -1, 1.1)).eval()
    model.body[0].train()
    with pytest.raises(ValueError, match=r"eval mode, got training mode in body\.0"):
        export_onnx(model, x, tmp_path / "model.onnx")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        export_onnx(refused, x, tmp_path / "model.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inputs must be tensors, got int"):
        export_onnx(model.eval(), (3,), tmp_path / "model.onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "tersor\[onnx\]"'):
        export_onnx(activation(4, -1, 1.1).eval(), torch.rand(2, 3, 4, 4), tmp_path / "model.onnx")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, x = Residual(4).eval(), torch.randn(2, 4, 8, 8)
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, compute(model, x)
    export_onnx(model, x, tmp_path / "model.onnx")
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    assert all(a.equal(b) for a, b in zip(compute(model, x), expected, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
