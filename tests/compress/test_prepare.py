"""prepare_, calibrate_, step and parameter_groups: which layers change, what they say of others, and resuming."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed import COMPOSITIONS, EAGER, TinyResNet, batch, prepared, tiny_vit, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tersor import compress
from tersor.binary import BinaryLinear, recu_tau, reste_o
from tersor.compress import Binarize, FakeQuantize, Freeze, NMSparse, Recipe, Rule, WindowAttentionByIndex
from tersor.compress.layers import CompressedLayer
from tersor.compress.prepare import Compression

QUANTIZE = FakeQuantize(4)


def changed(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def skipped(model: Any) -> dict[str, str]:
    return model.compression.skipped


class Net(nn.Module):
    """Layers by name, called in order."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name, layer in self.named_children():
            x = x if name == "compression" else layer(x)
        return x


def convs(*names: str, **more: nn.Module) -> Net:
    return Net(**{name: nn.Conv2d(4, 4, 1) for name in names}, **more)


def test_the_first_and_last_layer_stay_unless_they_are_named() -> None:
    every = {"a", "b", "c", "d"}
    for options, expected in (
        ({}, {"b", "c"}),
        ({"skip_first": False}, {"a", "b", "c"}),
        ({"skip_last": False}, {"b", "c", "d"}),
        ({"skip_first": False, "skip_last": False}, every),
    ):
        model = compress.prepare_(convs(*"abcd"), Recipe(QUANTIZE, **options))
        assert changed(model) == expected
        assert skipped(model) == dict.fromkeys(every - expected, "the first or last layer")
    assert changed(compress.prepare_(convs(*"abcd"), Rule(QUANTIZE, layers=["a", "b"]))) == {"a", "b"}
    assert changed(compress.prepare_(convs(*"abcd"), Rule(QUANTIZE, layers="[ab]"))) == {"b"}
    assert changed(compress.prepare_(convs("a"), QUANTIZE)) == {"a"}  # first and last at once


def test_the_last_rule_that_matches_holds() -> None:
    recipe = Recipe(
        Rule(QUANTIZE),
        Rule(FakeQuantize(8), NMSparse(2, 4), layers=["b", "c", "e"], exclude="c"),
        Rule(FakeQuantize(2), layers=lambda name, module: name == "e"),
    )
    model = compress.prepare_(convs(*"abcdef"), recipe)
    assert model.compression.applied == {
        "b": (FakeQuantize(8), NMSparse(2, 4)),
        "c": (QUANTIZE,),
        "d": (QUANTIZE,),
        "e": (FakeQuantize(2),),
    }
    assert (model.b.scores is None, model.c.scores is None) == (False, True)


def test_a_name_with_wildcard_signs_stands_for_itself() -> None:
    model = Net(first=nn.Conv2d(4, 4, 1), inner=nn.ModuleDict({"a[0]": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}))
    compress.prepare_(model, Rule(QUANTIZE, layers="inner.a[0]"))
    assert changed(model) == {"inner.a[0]"}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Rule(QUANTIZE, layers="bb"), "must name layers of the model, got 'bb', which has none; near to it are b"),
        (Rule(QUANTIZE, layers="norm"), "prepare_: norm: a BatchNorm2d cannot take 4-bit lsq, 4-bit input"),
        (
            Rule(QUANTIZE, layers="norm*"),
            "each rule must match a layer, got none for norm\\* \\(layers are such as a, b",
        ),
        (Recipe(Rule(QUANTIZE), Rule(NMSparse(), layers="x.*")), "each rule must match a layer, got none for x"),
        (Recipe(Rule(QUANTIZE, layers="b"), Rule(NMSparse())), "later ones match all that b does"),
        (Rule(NMSparse(3, 5), layers="b"), "prepare_: b: 5 does not divide its 4 inputs per group"),
        (NMSparse(3, 5), "must change a layer, got one that changes none \\(a: the first or last layer; b: 5 does not"),
        (Rule(WindowAttentionByIndex(), layers="b"), "prepare_: b: a Conv2d cannot take window attention by index"),
        (WindowAttentionByIndex(), "got none for \\* \\(attention to replace is not there"),
    ],
)
def test_recipes_that_do_not_fit_the_model_change_nothing(recipe: Any, message: str) -> None:
    model = convs("a", "b", norm=nn.BatchNorm2d(4), c=nn.Conv2d(4, 4, 1))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        compress.prepare_(model, recipe)
    assert str(model) == str(before)
    assert model.state_dict().keys() == before.state_dict().keys()
    assert not model._load_state_dict_post_hooks


def cast_forward(layer: Any) -> nn.Module:
    layer.forward = lambda x: F.linear(x.double(), layer.weight.double()).float()
    return layer


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def pruned() -> nn.Module:
    layer = nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


LARGE = nn.Linear(70000, 1, device="meta")


@pytest.mark.parametrize(
    ("layer", "transforms", "reason"),
    [
        (lambda: OwnConv(8, 8, 3), (QUANTIZE,), "OwnConv computes in its own way"),
        (lambda: OwnLinear(8, 8), (QUANTIZE,), "OwnLinear computes in its own way"),
        (lambda: cast_forward(nn.Linear(8, 8)), (QUANTIZE,), "Linear computes in its own way"),
        (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), (QUANTIZE,), "its weight is parametrized"),
        (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), (QUANTIZE,), "its weight is parametrized"),
        (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), (QUANTIZE,), "computes in its own way|parametrized"),
        (pruned, (QUANTIZE,), "its weight is parametrized"),
        (lambda: nn.LazyConv2d(8, 3), (QUANTIZE,), "its weight has no shape before the first forward pass"),
        (lambda: nn.Conv2d(6, 8, 3), (NMSparse(2, 4),), "4 does not divide its 6 inputs per group"),
        (lambda: nn.Conv2d(8, 8, 3, groups=4), (NMSparse(2, 4),), "4 does not divide its 2 inputs per group"),
        (lambda: nn.Linear(6, 8), (NMSparse(2, 4),), "4 does not divide its 6 inputs"),
        (lambda: nn.Conv2d(8, 8, 2, padding="same"), (QUANTIZE,), "its padding differs between the sides"),
        (lambda: nn.Conv2d(8, 8, 2, padding="same"), (NMSparse(2, 4),), "its padding differs between the sides"),
        (lambda: nn.Conv2d(8, 8, 2, padding="same"), (Binarize("ste"),), "its padding differs between the sides"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (NMSparse(2, 4),), "pads with zeros"),
        (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (Binarize("recu"),), "pads with zeros"),
        (lambda: nn.Linear(8, 8), (Binarize("recu"),), "ReCU is for convolutions"),
        (lambda: nn.Linear(8, 0), (QUANTIZE,), "its weight must be floating point and not empty"),
        (lambda: LARGE, (QUANTIZE,), "a sum in whole numbers has at most 65536 terms, its have 70000"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of old-style weight norm, and of empty and lazy layers
def test_layers_that_cannot_take_it_stay_as_they_are_with_the_reason(layer: Any, transforms: Any, reason: str) -> None:
    given = layer()
    model = Net(a=nn.Conv2d(8, 8, 1), b=given, c=nn.Conv2d(8, 8, 1), d=nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match=f"prepare_: b: .*({reason})"):
        compress.prepare_(model, Rule(*transforms, layers="b"))
    compress.prepare_(model, Rule(*transforms))
    assert model.b is given
    assert re.search(reason, skipped(model)["b"])
    assert type(model.c) is not nn.Conv2d


@pytest.mark.parametrize("wrong", [None, nn.Conv2d, [nn.Conv2d(1, 1, 1)]])
def test_what_is_no_model_is_refused(wrong: Any) -> None:
    for call in (compress.step, compress.calibrate_, compress.convert_, compress.report):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
            call(wrong)
    with pytest.raises(TypeError, match=r"prepare_: model must be a torch.nn.Module, got"):
        compress.prepare_(wrong, QUANTIZE)


def test_models_that_are_not_prepared_or_prepared_before() -> None:
    model = convs(*"abc")
    for call in (compress.step, compress.calibrate_, compress.convert_, compress.report):
        with pytest.raises(ValueError, match="model must have been prepared by prepare_, got Net that is not"):
            call(model)
    for steps, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="prepare_: steps must be"):
            compress.prepare_(model, QUANTIZE, steps)  # type: ignore[arg-type]
    compress.prepare_(model, QUANTIZE)
    for each in (model, nn.Sequential(model)):
        with pytest.raises(ValueError, match="model must not be prepared yet, got one that is"):
            compress.prepare_(each, QUANTIZE)
    with pytest.raises(ValueError, match="must have no attribute 'compression', got Net with one"):
        compress.prepare_(convs("compression", "b"), QUANTIZE)


def test_a_sequential_still_runs() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    compress.prepare_(model, Recipe(QUANTIZE, skip_first=False))
    images = torch.randn(2, 4, 3, 3)
    assert compress.calibrate_(model, images).shape == images.shape
    assert isinstance(model[0], compress.CompressedConv2d)
    expected = model.eval()(images)
    torch.testing.assert_close(compress.convert_(model)(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 8, 3), nn.Linear(4, 8)], ids=["convolution", "linear"])
def test_a_layer_alone_is_replaced(layer: nn.Module) -> None:
    model: Any = compress.prepare_(layer, QUANTIZE)
    assert isinstance(model, CompressedLayer)
    assert model.weight is layer.weight
    assert isinstance(model.compression, Compression)
    x = torch.randn(2, 4, 4, 4)
    compress.calibrate_(model, x)
    assert compress.report(model).rows[0].transform == str(QUANTIZE)
    packed = compress.convert_(model)
    assert compress.report(packed).rows[0].transform == str(QUANTIZE)
    torch.testing.assert_close(packed(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_layer_in_several_places_stays_one() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model: Any = Net(a=nn.Conv2d(4, 4, 1), b=shared, c=nn.Sequential(shared), d=nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"c.0 is one layer with b: the recipe must name it so"):
        compress.prepare_(model, Rule(QUANTIZE, layers=r"c.0"))
    compress.prepare_(model, QUANTIZE)
    assert model.b is model.c[0]
    assert isinstance(model.b, compress.CompressedConv2d)
    images = torch.randn(2, 4, 3, 3)
    compress.calibrate_(model, images)
    compress.convert_(model)
    assert model.b is model.c[0]
    assert isinstance(model.b, compress.PackedCompressedConv2d)
    assert [row.layer for row in compress.report(model, images).rows] == ["a", "b", "d"]
    assert compress.report(model, images).rows[1].macs == 2 * 16 * 9  # it runs twice


def test_parameters_and_an_optimizer_of_them_stay_valid() -> None:
    model = TinyResNet()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compress.prepare_(model, (QUANTIZE, NMSparse(2, 4)))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    compress.calibrate_(model, batch()[0])
    weight = after["layers.0.conv1.weight"].detach().clone()
    model(batch()[0]).sum().backward()
    optimizer.step()
    assert not torch.equal(after["layers.0.conv1.weight"], weight)


def test_groups_of_parameters() -> None:
    model = prepared(TinyResNet, (FakeQuantize(4), NMSparse(2, 4)))
    decaying, others = compress.parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decaying["params"]} == {
        name for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1
    }
    assert {*map(id, decaying["params"]), *map(id, others["params"])} == set(names)
    next(model.parameters()).requires_grad_(False)
    assert sum(len(group["params"]) for group in compress.parameter_groups(model)) == len(names) - 1


def test_a_layer_that_does_not_run_is_told() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            read = self.b
            return self.c(F.linear(self.a(x), read.weight, read.bias))

    model = compress.prepare_(Reads(), QUANTIZE)
    with pytest.raises(ValueError, match="every compressed layer must run in the forward pass, but b did not"):
        compress.calibrate_(model, torch.randn(2, 4))
    Reads.weights_read_directly = ("b",)  # type: ignore[attr-defined]
    model = compress.prepare_(Reads(), Recipe(QUANTIZE, skip_last=False))
    assert skipped(model)["b"] == "Reads computes with its weight directly"
    assert changed(model) == {"c"}


def test_attention_that_reads_its_projections() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model: Any = nn.ModuleDict({"first": nn.Linear(8, 8), "block": layer, "mha": nn.MultiheadAttention(8, 2)})
    model["last"] = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="changes none"):
        compress.prepare_(model, QUANTIZE)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    compress.prepare_(decoder, Recipe(QUANTIZE, skip_first=False, skip_last=False))
    assert changed(decoder) == {"linear1", "linear2"}
    assert {name: "MultiheadAttention" in reason for name, reason in skipped(decoder).items()} == {
        "self_attn.out_proj": True,
        "multihead_attn.out_proj": True,
    }
    compress.calibrate_(decoder, torch.randn(2, 3, 8), torch.randn(2, 3, 8))


def test_bounds_are_set_layer_by_layer_on_what_comes_before() -> None:
    model: Any = Net(a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), c=nn.Conv2d(3, 3, 1)).eval()
    compress.prepare_(model, Recipe(FakeQuantize(3, percentile=95.0), skip_first=False))
    with pytest.raises(ValueError, match=r"bounds are not set: run tersor\.compress.calibrate_"):
        model(torch.randn(2, 3, 4, 4))
    x = torch.randn(4, 3, 8, 8)
    output = compress.calibrate_(model, x)
    for layer in (model.a, model.b):
        bounds = torch.quantile(x.flatten(), torch.tensor([0.05, 0.95]))
        torch.testing.assert_close(torch.cat([layer.quantize_input.lower, layer.quantize_input.upper]).detach(), bounds)
        x = layer(x)
    torch.testing.assert_close(output, model.c(x))
    assert not output.requires_grad


@pytest.mark.parametrize("value", [0.0, 2.0, -3.0])
def test_a_constant_input_still_gives_bounds(value: float) -> None:
    model: Any = compress.prepare_(nn.Linear(4, 4), QUANTIZE)
    x = torch.full((2, 4), value)
    compress.calibrate_(model, x)
    assert model.quantize_input.lower < model.quantize_input.upper
    torch.testing.assert_close(model.quantize_input(x), x)
    mostly = torch.zeros(1000, 4)
    mostly[0, 0] = 5.0  # above the percentile, which is 0
    compress.calibrate_(model, mostly)
    assert model.quantize_input.upper == 5


def test_schedules_of_binary_layers() -> None:
    steps = 5
    model: Any = compress.prepare_(TinyResNet(), Binarize("recu"), steps)
    taus = [model.layers[0].conv1.tau.item()]
    for _ in range(steps + 1):
        compress.step(model)
        taus.append(model.layers[0].conv1.tau.item())
    expected = torch.tensor([recu_tau(min(i, steps - 1), steps) for i in range(steps + 2)])
    assert taus == expected.tolist()
    torch.testing.assert_close(
        model.layers[0].conv1.alpha.detach().flatten(), model.layers[0].conv1.weight.abs().mean((1, 2, 3)).detach()
    )

    model = compress.prepare_(tiny_vit(), Binarize("reste"), steps)
    layer = model.blocks[0].attn.qkv
    assert isinstance(layer, BinaryLinear)
    for i in range(steps + 2):
        assert layer.estimator.o == layer.weight_estimator.o == reste_o(min(i, steps - 1), steps)
        compress.step(model)


def test_the_state_dict_has_plain_tensors_under_the_keys_of_the_float_model() -> None:
    floats = TinyResNet()
    model = prepared(TinyResNet, (FakeQuantize(4, method="lts"), NMSparse(2, 4), EAGER))
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    missing, unexpected = model.load_state_dict(floats.state_dict(), strict=False)
    assert not unexpected
    assert all(".quantize_" in key or ".scores." in key or key.endswith((".skippable", ".step")) for key in missing)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in floats.state_dict().items())
    storages = [value.untyped_storage().data_ptr() for value in state.values() if value.numel()]
    assert len(storages) == len(set(storages))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


EARLY = Freeze(0.1, every=3, quantile=0.1, tile=(2, 2))
RESUMED = {**COMPOSITIONS, "freeze early": (FakeQuantize(2, method="lts"), EARLY)}


@pytest.mark.parametrize("build", [TinyResNet, tiny_vit], ids=["resnet", "vit"])
@pytest.mark.parametrize("name", ["lsq+lbc", "ddtb+srste", "lts+lbc+freeze", "freeze early", "recu", "reste", "lbc"])
def test_a_run_resumes_bit_by_bit(build: Any, name: str) -> None:
    if (build, name) == (tiny_vit, "recu"):
        with pytest.raises(ValueError, match="ReCU is for convolutions"):
            compress.prepare_(build(), Binarize("recu"))
        return
    transforms, steps = RESUMED[name], 8
    whole = prepared(build, transforms, steps)
    losses, _ = train(whole, steps)

    half = prepared(build, transforms, steps)
    _, optimizer = train(half, 5)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = compress.prepare_(build(), transforms, steps)
    resumed.load_state_dict(saved["model"])
    _, optimizer = train(resumed, 0)
    optimizer.load_state_dict(saved["optimizer"])
    rest, _ = train(resumed, steps - 5, optimizer, first=5)

    assert rest == losses[5:]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_the_resumed_plan_is_that_of_the_last_look() -> None:
    model: Any = prepared(TinyResNet, RESUMED["freeze early"], 8)
    train(model, 5)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    assert any(layer.skips for layer in layers.values())
    assert any(not torch.equal(layer.skippable, layer.quantize_weight.frozen) for layer in layers.values())
    again: Any = compress.prepare_(TinyResNet(), RESUMED["freeze early"], 8)
    again.load_state_dict(model.state_dict())
    for name, layer in layers.items():
        other = again.get_submodule(name)
        assert other.plan.level == layer.plan.level
        if layer.plan.listed is not None:
            assert torch.equal(other.plan.listed, layer.plan.listed)
    again.load_state_dict(compress.prepare_(TinyResNet(), RESUMED["freeze early"], 8).state_dict())
    assert not any(
        again.get_submodule(name).skips for name in layers
    )  # what an earlier state has not frozen is trained


@pytest.mark.parametrize("name", ["lsq+lbc", "lts+lbc+freeze", "recu", "srste"])
def test_copies_go_their_own_way(name: str) -> None:
    model = prepared(TinyResNet, COMPOSITIONS[name])
    train(model, 2)
    images = batch()[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    expected = model.train()(images)
    for each in copies:
        assert torch.equal(each.train()(images), expected)
    state = copy.deepcopy(model.state_dict())
    train(copies[0], 2)
    for key, value in model.state_dict().items():
        if "running" not in key and "num_batches" not in key:  # the forward passes above have moved these
            assert torch.equal(value, state[key]), key


def test_a_copy_takes_its_mask_from_the_state_that_it_loads() -> None:
    """Without a forward pass in between, its number of changes is that of the original when it was copied."""
    model: Any = compress.prepare_(nn.Linear(8, 8), NMSparse(2, 4), steps=2)
    fresh = copy.deepcopy(model)
    compress.step(model)
    assert int((model.compressed_weight() == 0).sum()) == 32
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.compressed_weight(), model.compressed_weight())


@pytest.mark.parametrize("is_training", [True, False])
def test_a_step_moves_the_schedules_in_either_mode(is_training: bool) -> None:
    model: Any = prepared(TinyResNet, (FakeQuantize(2, method="lts"), Freeze(0.0, quantile=0.1, tile=(2, 2))), 4)
    model.train(is_training)
    for _ in range(4):
        compress.step(model)
    assert model.layers[0].conv1.quantize_weight.counters[0] == 3  # the first step is number 0
    assert compress.report(model).total.frozen > 0.5


def test_what_training_has_moved_too_far_is_made_valid() -> None:
    model: Any = prepared(TinyResNet, COMPOSITIONS["lsq"], 4)
    layer = model.layers[0].conv1
    with torch.no_grad():
        layer.quantize_weight.scale[2:4] = torch.tensor([-0.5, 0.0]).view(2, 1, 1, 1)
        layer.quantize_input.lower.fill_(2.0)
        layer.quantize_input.upper.fill_(-1.0)
    compress.step(model)
    assert layer.quantize_weight.scale[2] == 0.5
    assert layer.quantize_weight.scale[3] > 0
    assert (layer.quantize_input.lower.item(), layer.quantize_input.upper.item()) == (-1, 2)
    model(batch()[0])
    model = prepared(TinyResNet, COMPOSITIONS["lts"], 4)
    with torch.no_grad():
        model.layers[0].conv1.quantize_weight.lower.fill_(9.0)
    compress.step(model)
    assert model.layers[0].conv1.quantize_weight.upper == 9
    model(batch()[0])


class ReadsByHand(nn.Module):
    """Like BEiT's attention in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.other, self.proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.qkv.weight, self.qkv.bias).to(self.other.weight.dtype)
        return self.proj(self.other(x))


def test_weights_that_a_forward_pass_reads_are_found_in_its_source() -> None:
    model = compress.prepare_(ReadsByHand(), Recipe(QUANTIZE, skip_first=False, skip_last=False))
    assert skipped(model) == {"qkv": "ReadsByHand computes with its weight directly"}
    assert changed(model) == {"other", "proj"}
    compress.calibrate_(model, torch.randn(2, 4))
