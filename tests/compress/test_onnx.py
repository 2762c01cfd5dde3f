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


class Refused(nn.Sequential):
    def __init__(self, transforms: Any) -> None:
        super().__init__(nn.Conv2d(4, 4, 3))
        compress.prepare_(self, compress.Recipe(*transforms, skip_first=False))
        compress.calibrate_(self, torch.randn(2, 4, 5, 5))
        self.eval()


def test_what_is_refused(tmp_path: Path) -> None:
    x, path = torch.randn(2, 4, 5, 5), tmp_path / "model.onnx"
    for method in ("recu", "reste", "ste"):
        with pytest.raises(ValueError, match=r"export_onnx: 0: .* not expressible in ONNX: it has no product of signs"):
            export_onnx(Refused([compress.Binarize(method)]), x, path)
    for transforms in ([FakeQuantize(4)], [NMSparse(2, 4, method="srste")]):
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
