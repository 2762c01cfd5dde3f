"""Packed binary layers compute what the trained ones did: alone, in a Sequential, in modules that name their steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.binary import (
    BinaryConv2d,
    BinaryLinear,
    BinaryStep,
    ChannelBias,
    PackedBinaryConv2d,
    PackedBinaryLinear,
    PackedSigns,
    PackedWeightConv2d,
    ReCUConv2d,
    ReSTEConv2d,
    binary_step,
    convert_,
    pack_signs,
    unpack_signs,
)

KINDS = {
    "recu": ReCUConv2d,
    "reste": ReSTEConv2d,
    "ste": BinaryConv2d,
    "channel": lambda *args, **kwargs: BinaryConv2d(*args, scale="channel", **kwargs),
    "unscaled": lambda *args, **kwargs: BinaryConv2d(*args, scale=None, **kwargs),
}


def settled(model: nn.Module) -> nn.Module:
    """In evaluation, with statistics, weights and slopes as after a training; some norm weights negative, one 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, tensor in module.named_buffers():
                if name.startswith("running"):
                    nn.init.uniform_(tensor, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.weight.data[-1] = 0
        if isinstance(module, (ChannelBias, nn.PReLU)):
            nn.init.uniform_(next(module.parameters()), 0.1, 0.5)
        if isinstance(module, ReCUConv2d):
            nn.init.normal_(module.alpha)
        if isinstance(module, BinaryConv2d):
            module.weight.data[0, 0] = 0
    return model.eval()


@torch.no_grad()
def check(model: nn.Module, input: Any, **options: Any) -> nn.Module:
    """The packed model's output is the model's, but for roundings; so it is after its state dict went to another."""
    expected = model(input)
    packed = convert_(copy.deepcopy(model), **options)
    torch.testing.assert_close(packed(input), expected, rtol=1e-5, atol=1e-5)
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.uniform_(parameter)
    fresh = convert_(fresh, **options)
    assert not torch.equal(fresh(input), packed(input))
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(input), packed(input))
    return packed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_single_layers(kind: str, bias: bool) -> None:
    layer = settled(KINDS[kind](6, 4, (3, 2), (2, 1), (1, 2), (1, 2), 2, bias=bias))
    with torch.no_grad():
        layer.weight[0, :, 0, 0] = 0
    x = torch.randn(2, 6, 7, 8)
    x[0, 0] = 0
    packed = check(layer, x)
    assert isinstance(packed, PackedBinaryConv2d)
    has_zeros = kind != "recu"  # whose filters have their means taken off
    assert ("nonzero" in packed.state_dict()) == has_zeros
    assert packed.packed.nbytes == math.ceil(layer.weight.numel() / 8)
    assert torch.equal(packed(pack_signs(x, groups=2)), packed(x))
    assert packed(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", ["layer", "channel", None])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(scale: str | None, bias: bool) -> None:
    packed = check(BinaryLinear(70, 9, bias=bias, scale=scale), torch.randn(2, 3, 70))
    assert isinstance(packed, PackedBinaryLinear)
    with pytest.raises(ValueError, match=r"PackedBinaryLinear: input must be \(\.\.\., 70\), got shape \(2, 7\)"):
        packed(torch.randn(2, 7))


def test_input_in_float() -> None:
    layer = ReSTEConv2d(6, 4, 3, padding="same", groups=2, act_bits32=True)
    packed = check(nn.Sequential(layer, nn.BatchNorm2d(4)).eval(), torch.randn(2, 6, 7, 8))
    assert isinstance(packed[0], PackedWeightConv2d)
    assert isinstance(packed[1], nn.BatchNorm2d)


def sequence(kind: str) -> nn.Sequential:
    conv = KINDS[kind]
    return nn.Sequential(
        conv(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Hardtanh(),
        conv(8, 9, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(9),
        conv(9, 6, 1, groups=3),
        nn.BatchNorm2d(6),
        nn.MaxPool2d(2),
        conv(6, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        BinaryLinear(64, 5),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sequence(kind: str) -> None:
    model, x = settled(nn.Sequential(*list(sequence(kind))[:9])), torch.randn(2, 6, 12, 12)
    packed = check(model, x)
    gives = [layer.signs_for for layer in packed if isinstance(layer, PackedBinaryConv2d)]
    assert gives == [1, 3, None]
    assert [i for i, layer in enumerate(packed) if isinstance(layer, nn.Identity)] == [1, 2, 4, 5, 7]
    for end, channels in ((3, 8), (6, 9)):  # where bits pass, they are the trained model's signs
        assert torch.equal(unpack_signs(packed[:end](x)), torch.sign(model[:end](x)))
        assert packed[:end](x).channels == channels
    whole = settled(sequence(kind))
    rest = convert_(copy.deepcopy(whole))
    assert not rest[9].fused, "a norm without running statistics stays"
    assert isinstance(rest[12], PackedBinaryLinear)
    assert rest(x).shape == (2, 5)
    plain = check(model, x, fuse=False)
    assert not any(layer.fused for layer in plain if isinstance(layer, PackedBinaryConv2d))


class Steps(nn.Module):
    """Every kind of step; the residual is the input's."""

    def __init__(self, kind: str, relu: bool, activation: str | tuple[str, ...] | None, before: str | None) -> None:
        super().__init__()
        self.shift, self.before, self.after = (ChannelBias(6) for _ in range(3))
        self.conv1, self.conv2, self.conv3 = (KINDS[kind](6, 6, 3, padding=1, bias=False) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(6) for _ in range(3))
        self.hardtanh, self.prelu = nn.Hardtanh(inplace=True), nn.PReLU(6)
        self.options = relu, activation, before

    def binary_steps(self) -> Iterator[BinaryStep]:
        relu, activation, before = self.options
        yield BinaryStep("conv1", "bn1", relu, activation, before, next="conv2")
        yield BinaryStep("conv2", "bn2", relu, activation, next="conv3")
        yield BinaryStep("conv3", "bn3", relu, activation)

    def forward(self, input: Tensor) -> Tensor:
        first, second, third = self.binary_steps()
        x = binary_step(self, second, binary_step(self, first, input))
        return binary_step(self, third, x, input)


PRELUS = ["prelu", ("before", "prelu"), ("prelu", "after"), ("before", "prelu", "after")]


@pytest.mark.parametrize("kind", ["recu", "reste"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("activation", [None, "hardtanh", *PRELUS], ids=str)
@pytest.mark.parametrize("before", [None, "shift"])
def test_steps(kind: str, relu: bool, activation: Any, before: str | None) -> None:
    model, x = settled(Steps(kind, relu, activation, before)), torch.randn(2, 6, 9, 9)
    packed = check(model, x)
    assert [layer.signs_for for layer in (packed.conv1, packed.conv2, packed.conv3)] == [1, 1, None]
    assert all(isinstance(layer, nn.Identity) for layer in (packed.bn1, packed.bn2, packed.bn3))
    with torch.no_grad():
        first, second, _ = model.binary_steps()
        ours, theirs = (binary_step(m, first, x) for m in (packed, model))
        assert torch.equal(unpack_signs(ours), theirs.sign())
        ours, theirs = (binary_step(m, second, y) for m, y in ((packed, ours), (model, theirs)))
        assert torch.equal(unpack_signs(ours), theirs.sign())
    with pytest.raises(ValueError, match="residual must be None where the layer gives signs"):
        packed.conv1(x, x)


def test_no_bits_in_front_of_a_shift() -> None:
    class Shifted(Steps):
        def binary_steps(self) -> Iterator[BinaryStep]:
            first, second, third = super().binary_steps()
            yield from (first, second._replace(before="shift"), third)

    packed = check(settled(Shifted("recu", False, None, None)), torch.randn(2, 6, 9, 9))
    assert [layer.signs_for for layer in (packed.conv1, packed.conv2, packed.conv3)] == [None, 1, None]


def test_what_an_unfused_step_needs_stays() -> None:
    class Mixed(Steps):
        def __init__(self) -> None:
            super().__init__("reste", True, None, None)
            self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
            self.bn3 = nn.BatchNorm2d(6, track_running_stats=False)

    packed = check(settled(Mixed()), torch.randn(2, 6, 9, 9))
    assert isinstance(packed.bn1, nn.Identity)
    assert isinstance(packed.bn2, nn.BatchNorm2d)
    assert isinstance(packed.bn3, nn.BatchNorm2d)
    assert packed.conv1.fused
    assert packed.conv1.signs_for is None
    assert not packed.conv3.fused


def test_modules_shared_by_steps() -> None:
    class Shared(Steps):
        def __init__(self) -> None:
            super().__init__("reste", True, None, None)
            self.conv2, self.conv3 = nn.Conv2d(6, 6, 3, padding=1), self.conv1

        def binary_steps(self) -> Iterator[BinaryStep]:
            first, second, third = super().binary_steps()
            yield from (first, second._replace(norm="bn1"), third)

    packed = check(settled(Shared()), torch.randn(2, 6, 9, 9))
    assert packed.conv1 is packed.conv3
    assert not packed.conv1.fused, "two norms follow"
    model = settled(Shared())
    model.conv3 = ReSTEConv2d(6, 6, 3, padding=1)
    packed = check(model.eval(), torch.randn(2, 6, 9, 9))
    assert packed.conv1.fused
    assert isinstance(packed.bn1, nn.BatchNorm2d), "the second step needs it"


def test_shared_modules() -> None:
    """A shared activation is taken out only where its work is done; a shared convolution is packed by itself."""
    conv, norm, act = ReSTEConv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardtanh()
    model = nn.Sequential(ReCUConv2d(6, 6, 3), norm, act, nn.AvgPool2d(2), act, ReCUConv2d(6, 6, 1), norm, act)
    packed = check(settled(model), 3 * torch.randn(2, 6, 9, 9))
    assert [isinstance(layer, nn.Identity) for layer in packed] == [False, True, True, False, False, False, True, True]
    model = nn.Sequential(conv, nn.BatchNorm2d(6), conv, norm)
    packed = check(settled(model), torch.randn(2, 6, 9, 9))
    assert packed[0] is packed[2]
    assert not packed[0].fused
    assert isinstance(packed[3], nn.BatchNorm2d)


def test_thresholds_by_hand() -> None:
    """sign(weight * (s - mean) + bias) of whole numbers s from -4 to 4."""
    conv, norm = BinaryConv2d(4, 6, 1, bias=False, scale=None), nn.BatchNorm2d(6, eps=0)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([1.0, 1.5, 1.0, -9.0, 9.0, 0.0]))
        norm.weight.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -0.5]))
    packed = PackedBinaryConv2d(conv, norm, signs_for=1)
    direction, lower, upper = packed.thresholds.tolist()
    assert direction[0] == direction[1] == -direction[2] == 1
    sums = torch.arange(-4, 5)
    for i, expected in enumerate([(sums - 1).sign(), (sums * 2 - 3).sign(), (1 - sums).sign(), 1, 1, -1]):
        ours = direction[i] * ((sums > upper[i]).int() - (sums < lower[i]).int())
        assert torch.equal(ours, torch.as_tensor(expected).int().expand(9)), i


def test_signs_that_neither_grow_nor_fall_are_refused() -> None:
    model = settled(Steps("reste", False, ("prelu", "after"), None))
    nn.init.constant_(model.prelu.weight, -0.5)
    nn.init.constant_(model.after.bias, -0.1)
    check_refused(model, r"convert_: conv1: the signs of the output must grow or fall with the sums, got neither")


def check_refused(model: nn.Module, match: str) -> None:
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        convert_(model)
    assert {name: id(module) for name, module in model.named_modules()} == before, "nothing is changed"


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TypeError, match=r"convert_: model must be a torch\.nn\.Module, got list"):
        convert_([])
    with pytest.raises(ValueError, match="must hold a binary layer, got Linear without one"):
        convert_(nn.Linear(2, 2))
    good = ReSTEConv2d(2, 2, 3)
    check_refused(
        nn.Sequential(good, BinaryLinear(2, 2, estimator=None)),
        r"convert_: 1: PackedBinaryLinear: layer must binarise its input",
    )
    check_refused(
        nn.Sequential(good, nn.BatchNorm2d(3)),
        r"convert_: 0: PackedBinaryConv2d: norm must have 2 channels and running stat",
    )
    check_refused(Steps("recu", False, "conv3", None), r"convert_: conv\d: activation must be a Hardtanh from -1 to 1")
    broken = Steps("recu", False, ("prelu", "prelu"), None)
    check_refused(broken, r"or a PReLU that may have ChannelBias around it, got Sequential")
    check_refused(Steps("recu", False, ("before", "after"), None), r"or a PReLU that may have ChannelBias around it")
    nan = nn.Sequential(good, ReCUConv2d(2, 2, 3))
    nn.init.constant_(nan[1].weight, math.nan)
    check_refused(nan, r"convert_: 1: recu_weight: weight must be finite")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PackedBinaryConv2d(nn.Conv2d(1, 1, 1)), TypeError, "layer must be a binary convolution, got Conv2d"),
        (lambda: PackedBinaryConv2d(BinaryConv2d(1, 1, 1, estimator=None)), ValueError, "must binarise its input"),
        (lambda: PackedBinaryLinear(nn.Linear(1, 1)), TypeError, "layer must be a BinaryLinear, got Linear"),
        (lambda: PackedWeightConv2d(nn.Conv2d(1, 1, 1)), TypeError, "layer must be a BinaryConv2d, got Conv2d"),
        (lambda: PackedBinaryLinear(BinaryLinear(1, 1))([1.0]), TypeError, r"input must be a torch\.Tensor, got list"),
        (
            lambda: PackedBinaryConv2d(BinaryConv2d(2, 1, 1))(torch.ones(1, 2, 3, 3).double()),
            TypeError,
            r"input must be float16, bfloat16 or float32, got torch\.float64",
        ),
        (
            lambda: PackedBinaryConv2d(BinaryConv2d(2, 1, 1))(pack_signs(torch.ones(1, 3, 3, 3))),
            ValueError,
            "input must have 2 channels in 1 groups, got 3 in 1",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_zeros_come_and_go_with_the_state_dict() -> None:
    dense = ReSTEConv2d(3, 4, 3)
    sparse = copy.deepcopy(dense)
    nn.init.zeros_(sparse.weight[:, 1])
    x = torch.randn(1, 3, 6, 6)
    packed = [convert_(layer) for layer in (copy.deepcopy(dense), copy.deepcopy(sparse))]
    assert [len(p.state_dict()) for p in packed] == [2, 3]
    for given, other in (packed, packed[::-1]):
        receiver = copy.deepcopy(other)
        assert not torch.equal(receiver(x), given(x))
        receiver.load_state_dict(given.state_dict())
        assert torch.equal(receiver(x), given(x))
        assert list(receiver.state_dict()) == list(given.state_dict())
    receiver = copy.deepcopy(packed[1])
    receiver.load_state_dict({}, strict=False)
    assert torch.equal(receiver(x), packed[1](x)), "a dict without the layer leaves it"
    wrong = {**packed[0].state_dict(), "packed": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="size mismatch for packed"):
        receiver.load_state_dict(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype) -> None:
    """The packed model's numbers stay what they are; what lies between its layers, and comes out, is of the type."""
    layers = [
        ReSTEConv2d(6, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6),
        ReSTEConv2d(6, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 1),
    ]  # fmt: skip
    model, x = settled(nn.Sequential(*layers)), torch.randn(2, 6, 9, 9)
    packed = convert_(copy.deepcopy(model))
    lower = copy.deepcopy(packed).to(dtype)
    output = lower(x.to(dtype))
    assert output.dtype == dtype
    for name, buffer in packed.named_buffers():
        assert torch.equal(buffer, lower.get_buffer(name)), name
    assert isinstance(lower[0](x.to(dtype)), PackedSigns)
    x = x.to(dtype).float()  # the same signs
    torch.testing.assert_close(output.float(), model(x), rtol=0.05, atol=0.05)
    assert torch.equal(lower.float()[:6](x), packed[:6](x)), "and back"
    for layer in (lower, packed[0], packed[3]):
        assert layer.to(torch.float16) is layer
    assert PackedBinaryConv2d(ReSTEConv2d(2, 2, 1)).half()(x[:, :2].half()).dtype == torch.float16


def test_there_is_nothing_to_train() -> None:
    packed = convert_(settled(sequence("reste")))
    assert [name for name, p in packed.named_parameters() if not name.startswith("10.")] == []
    packed.train()
    assert not any(m.training for m in packed if isinstance(m, (PackedBinaryConv2d, PackedBinaryLinear)))
    assert "gives=signs" in repr(packed[0])
    assert "3, 8" not in repr(packed[0])
    assert "6, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=1, fused=True" in repr(packed[0])
    assert repr(packed[12]) == "PackedBinaryLinear(64, 5)"
