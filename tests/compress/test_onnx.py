"""Prepared and trained models as ONNX files: what ONNX Runtime computes, how weights are stored, what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import STEPS, Several, images, prepared
from subject import in_ci
from torch import Tensor, nn

from tersor import compress
from tersor.binary import BinaryConv2d, BinaryLinear, ReCUConv2d
from tersor.binary.layers import BinaryLayer
from tersor.compress import FakeQuantize, NMSparse
from tersor.compress.layers import CompressedLayer
from tersor.quantization.onnx_export import export_onnx

NEEDED = ("onnx", "onnxruntime", "onnxscript")
if not in_ci() and not all(map(importlib.util.find_spec, NEEDED)):
    pytest.skip(f'needs {", ".join(NEEDED)}: pip install "tersor[onnx]"', allow_module_level=True)

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
CASES = [("resnet", "all"), ("resnet", "ddtb-lbc"), ("resnet", "lbc")]
CASES += [("vit", "lsq-srste"), ("vit", "freeze"), ("vit", "weight"), ("vit", "srste")]


def run(path: Path, x: Tensor) -> list[Tensor]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 1
    # What ONNX Runtime would change of its own accord, see export_onnx.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options: dict[str, Any] = {"disabled_optimizers": ["WeightBiasQuantization"]}
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], **options)
    return [torch.from_numpy(output) for output in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def stored(path: Path) -> dict[str, tuple[str, Any]]:
    """Type and values of the initializers."""
    return {
        tensor.name: (onnx.TensorProto.DataType.Name(tensor.data_type).lower(), onnx.numpy_helper.to_array(tensor))
        for tensor in onnx.load(path).graph.initializer
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A model of each kind side by side, and their file."""
    torch.manual_seed(0)
    model, path = Several(CASES), tmp_path_factory.mktemp("onnx") / "model.onnx"
    for _ in range(STEPS):
        compress.step(model)
    export_onnx(model.eval(), images(4), path, dynamic_shapes=({0: "batch"},))
    return model, path


def test_the_file_computes_what_the_model_does(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    onnx.checker.check_model(path, full_check=True)
    x = images(64, 1)
    with torch.no_grad():
        outputs = model(x)
    for actual, (name, expected) in zip(run(path, x), outputs.items(), strict=True):
        error = ((actual - expected).abs().amax(1) / expected.abs().max()).sort().values
        # Last bits, but for images of which a value lies in the middle of two levels and goes to the other one.
        assert error.median() < 2e-6, name
        assert error.max() < 0.05, name


def test_weights_are_stored_as_integers_wherever_they_are_quantised(exported: tuple[nn.Module, Path]) -> None:
    model, path = exported
    tensors = stored(path)
    for name, layer in model.named_modules():
        if not isinstance(layer, CompressedLayer) or layer.quantization is None:
            continue
        found = [each for key, each in tensors.items() if key.startswith(name + ".") and key.endswith(".codes")]
        ((kind, codes),) = found
        scale = next(v for k, (_, v) in tensors.items() if k.startswith(name + ".") and k.endswith("weight.scale"))
        bits, method = layer.quantization.bits, layer.quantization.method
        wide = method == "lts" and bits == 4  # odd multiples of half a step take one bit more
        assert kind == ("int8" if wide else "int4"), name
        values = torch.tensor(codes.astype("float32")).view(codes.shape)
        step = torch.tensor(scale).reshape(-1, *(1,) * (values.dim() - 1))
        with torch.no_grad():
            weight = layer.compressed_weight()
        if method != "ddtb":
            torch.testing.assert_close(values * step, weight, rtol=0, atol=1e-6 * float(weight.abs().max()))
            assert (values == 0).equal(weight == 0), name
    for key, (kind, values) in tensors.items():
        quantized = [name for name in ("all", "ddtb-lbc", "lsq-srste", "freeze", "weight") if f"-{name}." in key]
        ends = any(part in key for part in (".fc.", ".head.", "patch_embed", "conv1.weight", "token", "pos_embed"))
        assert kind != "float" or values.ndim < 2 or not quantized or ends, f"{key} is a float weight"


@pytest.mark.parametrize("method", ["recu", "reste", "ste"])
def test_binary_layers_are_signs_and_convolutions(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, path = prepared("resnet", method), tmp_path / "model.onnx"
    for _ in range(STEPS):
        compress.step(model)
    layers = {name: layer for name, layer in model.eval().named_modules() if isinstance(layer, BinaryLayer)}
    assert len(layers) > 3
    with torch.no_grad():
        next(iter(layers.values())).weight[0, 0, 0, 0] = 0  # stays one of three values, but for ReCU's, which moves it
    export_onnx(model, images(4), path, dynamic_shapes=({0: "batch"},))
    onnx.checker.check_model(path, full_check=True)
    with torch.no_grad():
        expected = model(images(32, 1))
    error = ((run(path, images(32, 1))[0] - expected).abs().amax(1) / expected.abs().max()).sort().values
    assert error.median() < 2e-6  # last bits, but where a value beside 0 goes to the other side
    assert error.max() < 0.3
    tensors = stored(path)
    for name, layer in layers.items():
        ((kind, codes),) = [each for key, each in tensors.items() if key.startswith(name + ".") and ".codes" in key]
        with torch.no_grad():
            assert torch.tensor(codes.astype("float32")).equal(layer.binary_weight().sign()), name
        assert kind == "int4"
        shapes = [
            values.size for key, (kind, values) in tensors.items() if key.startswith(name + ".") and kind == "float"
        ]
        assert max(shapes, default=1) <= codes.shape[0], f"{name} has floats of its weight in the file"


def test_binary_layers_of_every_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers: list[tuple[nn.Module, Tensor]] = [
        (BinaryConv2d(6, 8, 3, stride=2, padding=1, groups=2), torch.randn(2, 6, 9, 7)),
        (BinaryConv2d(6, 8, 3, estimator=None, weight_estimator="ste", scale="channel"), torch.randn(2, 6, 9, 7)),
        (BinaryConv2d(6, 8, (3, 1), dilation=2, bias=False, scale=None), torch.randn(2, 6, 9, 7)),
        (ReCUConv2d(6, 8, 3, padding=1), torch.randn(2, 6, 9, 7)),
        (BinaryLinear(12, 8), torch.randn(2, 5, 12)),
        (BinaryLinear(12, 8, estimator=None, weight_estimator="approx"), torch.randn(2, 5, 12)),
    ]
    for i, (layer, x) in enumerate(layers):
        x.flatten()[::7] = 0  # whose sign is 0
        export_onnx(layer.eval(), x, tmp_path / f"{i}.onnx")
        with torch.no_grad():
            expected = layer(x)
        torch.testing.assert_close(run(tmp_path / f"{i}.onnx", x)[0], expected, rtol=1e-6, atol=1e-6, msg=str(layer))
        kinds = {key: (kind, values.size) for key, (kind, values) in stored(tmp_path / f"{i}.onnx").items()}
        assert ("int4", layer.weight.numel()) in kinds.values()
        assert all(kind != "float" or size <= 8 for kind, size in kinds.values()), kinds


class Refused(nn.Sequential):
    def __init__(self, transforms: Any) -> None:
        super().__init__(nn.Conv2d(4, 4, 3))
        compress.prepare_(self, compress.Recipe(*transforms, skip_first=False))
        compress.calibrate_(self, torch.randn(2, 4, 5, 5))
        self.eval()


def test_what_is_refused(tmp_path: Path) -> None:
    x, path = torch.randn(2, 4, 5, 5), tmp_path / "model.onnx"
    for transforms in ([FakeQuantize(4)], [NMSparse(2, 4, method="srste")], [compress.Binarize("recu")]):
        model = compress.convert_(Refused(transforms))
        with pytest.raises(ValueError, match=r"must not be converted yet.*before tersor\.compress\.convert_"):
            export_onnx(model, x, path)
    with pytest.raises(ValueError, match="model must be in eval mode"):
        export_onnx(prepared("vit", "lsq"), images(2), path)
    assert not path.exists()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Refused([FakeQuantize(3, method="lts"), compress.Freeze(warmup=0.0)])
    compress.step(model)
    with torch.no_grad():
        model[0].weight.add_(0.01)  # since when the state has the former weight
        before = {key: value.clone() for key, value in model.state_dict().items()}
        export_onnx(model, torch.randn(2, 4, 5, 5), tmp_path / "model.onnx")
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
