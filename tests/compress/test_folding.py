"""Norms go into the convolutions before them exactly where that changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed import (
    COMPOSITIONS,
    TinyResNet,
    prepared,
)
from torch import Tensor, nn

from tersor import compress
from tersor.compress import FakeQuantize, NMSparse, Recipe, Rule, convert
from tersor.models import ResNet
from tersor.models.resnet import BasicBlock


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
