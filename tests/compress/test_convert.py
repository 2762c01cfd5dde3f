"""convert_: the packed layers compute what was trained, norms go where they may, and errors change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed import (
    BINARY,
    COMPOSITIONS,
    STEPS,
    TinyResNet,
    assert_packed,
    batch,
    compute,
    inputs_of,
    prepared,
    tiny_vit,
    train,
)
from torch import Tensor, nn

from tersor import compress
from tersor.compress import Binarize, FakeQuantize, NMSparse
from tersor.compress.layers import CompressedLayer
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.sparsity import PackedNMConv2d, PackedNMLinear

ENDS = [(name, build) for name in COMPOSITIONS for build in ("resnet", "vit") if (name, build) != ("recu", "vit")]
BUILDS: dict[str, Callable[[], nn.Module]] = {"resnet": TinyResNet, "vit": tiny_vit}


@pytest.mark.parametrize(("name", "build"), ENDS)
def test_from_a_recipe_to_a_file_and_back(name: str, build: str, tmp_path: Any) -> None:
    """Each composition: prepare, calibrate, train, convert with and without folding, save, load, report."""
    model = prepared(BUILDS[build], COMPOSITIONS[name], STEPS)
    train(model)
    model.eval()
    images = batch()[0]
    inputs = inputs_of(model, images)
    layers = {each: model.get_submodule(each) for each in inputs}
    assert bool(layers) == (name not in BINARY)
    with torch.no_grad():
        expected = model(images)
        states = {}
        for fold in (False, True):
            packed = compress.convert_(copy.deepcopy(model), fold_norms=fold)
            assert not any(module.training for module in packed.modules())
            if not fold:
                for each, layer in layers.items():
                    assert_packed(layer, packed.get_submodule(each), inputs[each])
            output = packed(images)
            # A rounding error that crosses a threshold of a later layer moves an element by one level: few do.
            assert (output - expected).norm() < 0.02 * expected.norm()
            compress.save(packed, tmp_path / "model.safetensors")
            loaded = compress.load(tmp_path / "model.safetensors", BUILDS[build]())
            assert torch.equal(loaded(images), output)
            assert str(compress.report(loaded, images).rows) == str(compress.report(packed, images).rows)
            states[fold] = len(packed.state_dict())
    assert (states[True] < states[False]) == (build == "resnet")


GEOMETRY: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(8, 12, 3),
    "stride": lambda: nn.Conv2d(8, 12, (3, 2), stride=(2, 3), padding=(1, 0)),
    "dilation": lambda: nn.Conv2d(8, 12, 3, padding=(2, 4), dilation=2, bias=False),
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=2, padding=1),
    "reflect": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(8, 12, 3, padding=(0, 2), padding_mode="replicate", bias=False),
    "circular": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular", stride=2),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(8, 12, 3, padding="valid"),
    "1x1": lambda: nn.Conv2d(8, 12, 1, bias=False),
    "linear": lambda: nn.Linear(8, 12),
    "linear without bias": lambda: nn.Linear(8, 12, bias=False),
}
QUANTIZED: dict[str, tuple[Any, ...]] = {
    "lsq-2": (FakeQuantize(2),),
    "lsq-8": (FakeQuantize(8),),
    "lsq-3-8": (FakeQuantize(3, 8),),
    "lsq+lbc": (FakeQuantize(4), NMSparse(2, 4)),
    "lsq+srste 1:2": (FakeQuantize(4), NMSparse(1, 2, method="srste")),
    "ddtb-2": (FakeQuantize(2, method="ddtb"),),
    "ddtb-8": (FakeQuantize(8, method="ddtb"),),
    "ddtb+lbc": (FakeQuantize(5, method="ddtb"), NMSparse(3, 4)),
    "ddtb+srste": (FakeQuantize(5, method="ddtb"), NMSparse(2, 4, method="srste")),
    "lts-2": (FakeQuantize(2, method="lts"),),
    "lts-7": (FakeQuantize(7, 8, method="lts"),),
    "lts+lbc": (FakeQuantize(4, method="lts"), NMSparse(1, 4)),
    "float": (FakeQuantize(4, 32), NMSparse(2, 4)),
}


def input_for(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (3, 5, 8) if isinstance(layer, nn.Linear) else (3, 8, 9, 10)
    return torch.randn(shape, dtype=dtype)


def ready(layer: nn.Module, transforms: Any, x: Tensor) -> Any:
    model = compress.prepare_(layer, transforms, 1)
    compress.calibrate_(model, x)
    compress.step(model)
    return model.eval()


def packed_of(layer: nn.Module) -> Any:
    return compress.convert_(copy.deepcopy(layer))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("kind", GEOMETRY)
def test_a_packed_layer_computes_what_was_trained(kind: str, name: str) -> None:
    layer = GEOMETRY[kind]()
    x = input_for(layer)
    layer = ready(layer, QUANTIZED[name], x)
    packed = packed_of(layer)
    assert_packed(layer, packed, x)
    weight, stored = layer.compressed_weight(), packed.dense_weight()
    assert stored.dtype == torch.float32
    if name.startswith(("lsq", "float")):
        assert torch.equal(stored, weight)
    else:  # the same levels, multiplied in another order
        torch.testing.assert_close(stored, weight, rtol=1e-5, atol=1e-6 * float(weight.abs().max()))
        assert torch.equal(stored == 0, weight == 0)
    if x.dim() == 4:
        last = x.to(memory_format=torch.channels_last)
        assert_packed(layer, packed, last)
        if kind != "circular":  # where torch's padding loses it
            assert packed(last).is_contiguous(memory_format=torch.channels_last)
    empty = x[:0]
    assert packed(empty).shape == layer(empty).shape


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a channel of zeros": lambda w: w.index_fill(0, torch.tensor([1, 4]), 0.0),
    "many zeros": lambda w: w * (torch.arange(w.numel()).view_as(w) % 3 == 0),
    "all positive": lambda w: w.abs() + 0.05,
    "all negative": lambda w: -w.abs() - 0.05,
    "far from zero": lambda w: w + 30,
    "symmetric, so that there is a level more": lambda w: torch.linspace(-1, 1, w.numel()).view_as(w),
    "tiny": lambda w: w * 1e-12,
    "huge": lambda w: w * 1e12,
}


@pytest.mark.parametrize("transforms", [("lsq", 4), ("lsq", 8), ("ddtb", 4), ("ddtb", 7), ("lts", 4), ("lts", 7)])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_odd_ranges(name: str, transforms: Any) -> None:
    method, bits = transforms
    layer = nn.Conv2d(8, 12, 3)
    with torch.no_grad():
        layer.weight.copy_(WEIGHTS[name](layer.weight))
    x = input_for(layer)
    model = ready(layer, FakeQuantize(bits, method=method), x)
    packed = packed_of(model)
    assert_packed(model, packed, x)
    other: Any = packed_of(ready(nn.Conv2d(8, 12, 3), FakeQuantize(bits, method=method), x))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))


def test_an_eighth_bit_has_no_room_for_the_level_more() -> None:
    """As documented: its weights take the level below."""
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 256).view(16, 16))
    model = ready(layer, FakeQuantize(8, 32, "ddtb"), torch.randn(2, 16))
    difference = model.compressed_weight() - packed_of(model).dense_weight()
    top = model.compressed_weight() == model.compressed_weight().max()
    step = 2 * 0.98 / 255
    torch.testing.assert_close(difference[top], torch.full_like(difference[top], step), rtol=0.02, atol=0)
    assert difference[~top].abs().max() < 1e-6


def test_the_code_of_a_dropped_weight_must_fit() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.uniform_(1, 1.1)
    model: Any = nn.Sequential(ready(layer, (FakeQuantize(6, method="ddtb"), NMSparse(2, 4)), torch.randn(2, 8)))
    model.add_module("compression", model[0]._modules.pop("compression"))
    before = str(model)
    with pytest.raises(ValueError, match=r"convert_: 0: the code of a dropped weight must fit 8 bits, got -\d\d\d"):
        compress.convert_(model)
    assert str(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["lsq", "ddtb", "lts-7", "lsq+lbc", "lbc", "lsq, float input"])
@pytest.mark.parametrize("kind", ["plain", "linear"])
def test_other_dtypes_before_preparing_and_after_converting(
    kind: str, name: str, when: str, dtype: torch.dtype
) -> None:
    """The output is that of float32, but for the rounding of input, bias and output."""
    layer = GEOMETRY[kind]()
    layer = layer.to(dtype) if when == "before" else layer
    x = input_for(layer, dtype)
    model = ready(layer, COMPOSITIONS[name], x if when == "before" else x.float())
    packed = packed_of(model)
    packed = packed.to(dtype) if when == "after" else packed
    output = packed(x)
    assert output.dtype == dtype
    exact = x.double()
    if model.quantize_input is not None:  # whose threshold are those of float32 in any case
        exact = copy.deepcopy(model.quantize_input).float()(x.float()).double()
    weight = packed.dense_weight().double()
    bias = None if layer.bias is None else layer.bias.to(dtype if model.quantization is None else layer.bias.dtype)
    bias = None if bias is None else bias.double()
    expected = compute(model, exact, weight, bias)
    size = compute(model, exact.abs(), weight.abs(), None if bias is None else bias.abs())
    terms = 4 if model.quantize_input is not None else weight[0].numel()
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert ((output.double() - expected).abs() <= terms * eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["lsq", "ddtb", "lts"])
def test_codes_of_half_precision_weights_are_those_trained(method: str, dtype: torch.dtype) -> None:
    for bits in (3, 7):
        model = ready(nn.Linear(64, 64).to(dtype), FakeQuantize(bits, 32, method), torch.randn(2, 64, dtype=dtype))
        packed = packed_of(model)
        difference = (packed.dense_weight() - model.compressed_weight().float()).abs()
        assert (difference < 0.3 * packed.scale.view(-1, 1)).all()  # rounding, far from another level


def test_kinds_of_packed_layers() -> None:
    for name, kinds in (
        ("lsq", (PackedCompressedConv2d, PackedCompressedLinear)),
        ("lsq, float input", (PackedCompressedConv2d, PackedCompressedLinear)),
        ("srste", (PackedNMConv2d, PackedNMLinear)),
    ):
        for build, kind in zip((TinyResNet, tiny_vit), kinds, strict=True):
            model = prepared(build, COMPOSITIONS[name], 1)
            names = [each for each, module in model.named_modules() if isinstance(module, CompressedLayer)]
            compress.convert_(model)
            assert {type(model.get_submodule(each)) for each in names} == {kind}
            model.train()
            assert not any(model.get_submodule(each).training for each in names)


def snapshot(model: nn.Module) -> Any:
    kinds = {name: (type(module), module.training) for name, module in model.named_modules()}
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


def test_errors_name_the_layer_and_change_nothing() -> None:
    def break_weight(model: Any) -> None:
        model.layers[1].conv2.weight.data[0, 0, 0, 0] = float("nan")

    def break_step(model: Any) -> None:
        model.layers[1].conv2.quantize_weight.scale.data[3] = -1.0

    def break_bounds(model: Any) -> None:
        model.layers[1].conv2.quantize_input.upper.data.fill_(-100.0)

    def nothing(model: Any) -> None:
        pass

    for name, damage, message in (
        ("lsq", break_weight, "weight must be finite, got 1 elements that are not"),
        ("lsq", break_step, "scale must be finite and greater than 0"),
        ("lsq", break_bounds, "the input's bounds must be finite and not equal, got .*run tersor.compress.calibrate_"),
        ("lbc", nothing, "one combination of each group must be left, got 6: call tersor.compress.step once per step"),
        ("lsq+lbc", nothing, "one combination of each group must be left"),
        ("srste", break_weight, "weight must be finite"),
    ):
        model = prepared(TinyResNet, COMPOSITIONS[name], 4).train()
        damage(model)
        kinds, state = snapshot(model)
        with pytest.raises(ValueError, match=f"convert_: layers.[01].conv[12]: .*{message}"):
            compress.convert_(model)
        assert snapshot(model)[0] == kinds
        for key, value in snapshot(model)[1].items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0, equal_nan=True)


def test_only_the_prepared_model_itself_is_converted_and_once() -> None:
    model = prepared(TinyResNet, COMPOSITIONS["lsq"])
    with pytest.raises(ValueError, match="model must be the one that prepare_ returned, got Sequential around it"):
        compress.convert_(nn.Sequential(model))
    compress.convert_(model)
    with pytest.raises(ValueError, match="model must not be converted yet, got one that is"):
        compress.convert_(model)


def test_a_converted_model_is_copied_compiled_from_its_state_and_has_no_parameters_of_packed_layers() -> None:
    model = prepared(TinyResNet, (FakeQuantize(4), NMSparse(2, 4)), 1)
    compress.step(model)
    compress.convert_(model)
    images = batch()[0]
    assert torch.equal(copy.deepcopy(model)(images), model(images))
    assert {name for name, _ in model.named_parameters()} == {
        "stem.0.weight",
        "stem.0.bias",
        "fc.weight",
        "fc.bias",
    }
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    other = prepared(TinyResNet, (FakeQuantize(4), NMSparse(2, 4)), 1)
    compress.step(other)
    compress.convert_(other).load_state_dict(state)
    assert torch.equal(other(images), model(images))


def test_binary_layers_are_packed_as_by_their_own_conversion() -> None:
    model = prepared(TinyResNet, (Binarize("reste"),), 1).eval()
    expected = model(batch()[0])
    compress.convert_(model)
    torch.testing.assert_close(model(batch()[0]), expected, rtol=1e-4, atol=1e-4)


def test_a_sequential_model_runs_prepared_and_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    images = torch.randn(4, 3, 8, 8)
    compress.prepare_(model, compress.FakeQuantize(4))
    compress.calibrate_(model, images)
    expected = model.eval()(images)
    assert expected.shape == (4, 4)
    compress.convert_(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
