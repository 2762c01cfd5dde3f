"""convert_: the packed layers compute what was trained, norms go where they may, and errors change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from tersor.compress import Binarize, FakeQuantize, NMSparse, Recipe, Rule, convert
from tersor.compress.layers import CompressedLayer
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.models import ResNet
from tersor.models.resnet import BasicBlock
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


class Affine(nn.Module):
    """Traceable as a whole; the parts come from the test."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Untraceable(Affine):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            raise ValueError("too large")
        return self.run(self, x)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def norm(**options: Any) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(4, **options)
    for tensor in (made.running_mean, made.running_var, made.weight, made.bias):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return made


def straight(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)))


def two_users(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(m.b(y) + y)


def twice(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(m.b(m.a(x)))))


def conv_twice(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(m.a(x))))


def norm_twice(m: Any, x: Tensor) -> Tensor:
    return m.b(m.c(m.b(m.a(x))))


def activation_between(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(F.relu(m.a(x))))


def by_hand(m: Any, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x))) + F.conv2d(x, m.a.weight, padding=1)


def output_too(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return torch.cat([m.c(m.b(y)), y])


def iterated(m: Any, x: Tensor) -> Tensor:
    found = []
    for layer in m.b:
        x = layer(x)
        found.append(x)
    return m.c(m.a(torch.cat(found)))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


class Subclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


FOLDED: dict[str, tuple[Any, set[str]]] = {
    "conv, norm, conv": (lambda: Affine(straight, a=conv(), b=norm(), c=conv()), {"b"}),
    "without bias, affine": (lambda: Affine(straight, a=conv(bias=False), b=norm(affine=False), c=conv()), {"b"}),
    "synchronised": (
        lambda: Affine(straight, a=conv(), b=nn.SyncBatchNorm.convert_sync_batchnorm(norm()), c=conv()),
        {"b"},
    ),
    "sequence in one": (lambda: Affine(straight, a=nn.Sequential(conv(), norm()), b=nn.Identity(), c=conv()), {"a.1"}),
    "two sequences": (lambda: Affine(straight, a=nn.Sequential(conv()), b=nn.Sequential(norm()), c=conv()), {"b.0"}),
    "two users": (lambda: Affine(two_users, a=conv(), b=norm(), c=conv()), set()),
    "both twice": (lambda: Affine(twice, a=conv(), b=norm(), c=conv()), set()),
    "convolution twice": (lambda: Affine(conv_twice, a=conv(), b=norm(), c=conv()), set()),
    "norm twice": (lambda: Affine(norm_twice, a=conv(), b=norm(), c=conv()), set()),
    "activation between": (lambda: Affine(activation_between, a=conv(), b=norm(), c=conv()), set()),
    "output of the model too": (lambda: Affine(output_too, a=conv(), b=norm(), c=conv()), set()),
    "weight read by hand": (lambda: Affine(by_hand, a=conv(bias=False), b=norm(), c=conv()), set()),
    "no statistics": (lambda: Affine(straight, a=conv(), b=norm(track_running_stats=False), c=conv()), set()),
    "a norm of its own": (lambda: Affine(straight, a=conv(), b=Subclass(4), c=conv()), set()),
    "group norm": (lambda: Affine(straight, a=conv(), b=nn.GroupNorm(2, 4), c=conv()), set()),
    "hook on the convolution": (lambda: Affine(straight, a=hooked(conv()), b=norm(), c=conv()), {"b"}),
    "hook on the norm": (lambda: Affine(straight, a=conv(), b=hooked(norm()), c=conv()), set()),
    "norm before": (lambda: Affine(straight, a=norm(), b=conv(), c=conv()), set()),
    "sequence, iterated": (lambda: Affine(iterated, a=conv(), b=nn.Sequential(conv(), norm()), c=conv()), set()),
    "untraceable": (lambda: Untraceable(straight, a=conv(), b=norm(), c=conv()), set()),
    "untraceable, sequence": (
        lambda: Untraceable(straight, a=nn.Sequential(conv(), norm(), nn.ReLU()), b=norm(), c=conv()),
        {"a.1"},
    ),
    "untraceable, traceable part": (
        lambda: Untraceable(straight, a=Affine(straight, a=conv(), b=norm(), c=conv()), b=nn.ReLU(), c=conv()),
        {"a.b"},
    ),
    "untraceable, part with two users": (
        lambda: Untraceable(straight, a=Affine(two_users, a=conv(), b=norm(), c=conv()), b=nn.ReLU(), c=conv()),
        set(),
    ),
    "a bare sequence": (lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm()), {"1", "4"}),
}


FOLDINGS = [
    (name, which)
    for name in FOLDED
    for which in ("plain", "quantised", "sparse", "float input")
    if which == "plain" or name != "weight read by hand"  # a packed layer has no weight to read
]


@pytest.mark.parametrize(("name", "which"), FOLDINGS)
def test_exactly_those_norms_that_may_be_are_folded(name: str, which: str) -> None:
    build, expected = FOLDED[name]
    torch.manual_seed(2)
    model = build()
    norms = {each for each, module in model.named_modules() if "Norm" in type(module).__name__}
    x = torch.randn(2, 4, 6, 6)
    last = max(each for each, module in model.named_modules() if isinstance(module, nn.Conv2d))
    transforms = {"sparse": NMSparse(2, 4), "float input": FakeQuantize(4, 32)}.get(which, FakeQuantize(8))
    if which == "plain":  # all others
        recipe = Recipe(Rule(transforms, layers=last))
        if "hook on the convolution" in name:
            expected = set()  # a compressed one has left its hook behind
    else:
        recipe = Recipe(Rule(transforms, exclude=last), skip_first=False)
    if "hook" in name and which != "plain":
        model.eval()
    compress.prepare_(model, recipe, 1)
    compress.calibrate_(model.eval(), x)
    compress.step(model)
    with torch.no_grad():
        apart = compress.convert_(copy.deepcopy(model), fold_norms=False)
        output = apart(x)
        folded: Any = compress.convert_(model)
        assert norms - {each for each, module in folded.named_modules() if "Norm" in type(module).__name__} == expected
        assert {fold.norm for fold in folded.compression.folded.values()} == expected
        difference = (folded(x) - output).abs()
    scale = output.abs().max()
    if which in ("plain", "quantised"):  # an element may cross a threshold
        assert difference.mean() < 1e-3 * scale
    else:
        assert difference.max() < 1e-5 * scale


def test_a_weight_in_two_layers_is_folded_into_one() -> None:
    first, second = conv(bias=False), conv(bias=False)
    second.weight = first.weight
    model = Affine(lambda m, x: m.d(m.c(m.b(m.a(x)))), a=first, b=norm(), c=second, d=conv())
    model.eval()
    x = torch.randn(2, 4, 6, 6)
    compress.prepare_(model, Rule(FakeQuantize(8, 32), layers="d"))
    with torch.no_grad():
        expected = model(x)
        folded: Any = compress.convert_(model)
        assert folded.compression.folded == {"a": convert.Fold("b")}
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_layer_in_the_file_is_refused() -> None:
    model: Any = prepared(TinyResNet, COMPOSITIONS["lsq"])
    for conv, fold, message in (
        ("layers.0.conv1", convert.Fold("fc"), "fc is no norm that can go into"),
        ("layers.0.conv1", convert.Fold("layers.1.bn1"), "is no norm that can go into"),
        ("fc", convert.Fold("layers.0.bn1"), "is no norm that can go into"),
        ("layers.0.conv1", convert.Fold("layers.0.bn1", "fc"), "fc is no ReLU that can go into"),
        ("layers.0.conv1", convert.Fold("layers.0.bn1", residual=True), "conv1 takes no residual"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.convert_with(copy.deepcopy(model), copy.deepcopy(model).compression, {conv: fold})


def test_this_packages_resnet_folds_what_it_says_of_itself() -> None:
    """It checks its input's size, which torch.fx cannot trace; its blocks have norm_pairs()."""
    model: Any = ResNet(BasicBlock, (1, 1), 8, 4, 3, stem="cifar", shortcut="shortcut")
    x = torch.randn(4, 3, 8, 8)
    compress.prepare_(model, FakeQuantize(4))
    compress.calibrate_(model, x)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    compress.convert_(model)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert count - len(left) == len(model.compression.folded) >= 5
    assert all("stage" not in name and "layer" not in name for name in left)


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
