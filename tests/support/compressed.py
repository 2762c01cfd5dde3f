"""What the tests of tersor.compress share: what composes with what, tiny networks, how exact packed layers are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import compress
from tersor.compress import Binarize, FakeQuantize, Freeze, NMSparse, WindowAttentionByIndex
from tersor.compress.quantizers import FreezingWeight
from tersor.models import DeiT

EPS = 2.0**-23
STEPS = 4
EAGER = Freeze(warmup=0.25, every=2, quantile=0.1, tile=(4, 4))  # freezes something within these few steps

KINDS: dict[str, Any] = {
    "lsq": FakeQuantize(4),
    "ddtb": FakeQuantize(4, method="ddtb"),
    "lts": FakeQuantize(4, method="lts"),
    "lbc": NMSparse(2, 4),
    "srste": NMSparse(2, 4, method="srste"),
    "freeze": EAGER,
    "recu": Binarize("recu"),
    "reste": Binarize("reste"),
    "ste": Binarize("ste"),
    "approx": Binarize("approx"),
    "window": WindowAttentionByIndex(),
}
# Every composition that makes sense.
COMPOSITIONS: dict[str, tuple[Any, ...]] = {
    **{name: (KINDS[name],) for name in KINDS if name not in ("freeze", "window")},
    "lsq-2": (FakeQuantize(2),),
    "lsq-8": (FakeQuantize(8),),
    "ddtb-8": (FakeQuantize(8, method="ddtb"),),
    "lts-7": (FakeQuantize(7, method="lts"),),
    "lsq, float input": (FakeQuantize(4, 32),),
    "ddtb, float input": (FakeQuantize(3, 32, "ddtb"),),
    "lsq+lbc": (KINDS["lsq"], KINDS["lbc"]),
    "lsq+srste": (KINDS["lsq"], KINDS["srste"]),
    "ddtb+lbc": (KINDS["ddtb"], KINDS["lbc"]),
    "ddtb+srste": (KINDS["ddtb"], KINDS["srste"]),
    "lts+lbc": (KINDS["lts"], KINDS["lbc"]),
    "lts+freeze": (KINDS["lts"], KINDS["freeze"]),
    "lts+lbc+freeze": (KINDS["lts"], KINDS["lbc"], KINDS["freeze"]),
    "lsq+lbc, float input": (FakeQuantize(4, 32), NMSparse(1, 4)),
    "lsq+srste 5:8": (FakeQuantize(6), NMSparse(5, 8, method="srste")),
}
BINARY = ("recu", "reste", "ste", "approx")
# Of two kinds, those that go together; what else there is must be refused for the reason.
PAIRS = {("lsq", "lbc"), ("lsq", "srste"), ("ddtb", "lbc"), ("ddtb", "srste"), ("lts", "lbc"), ("lts", "freeze")}


def refused_pairs() -> list[tuple[str, str, str]]:
    """All other pairs, with the reason."""
    found = []
    for first, second in itertools.combinations_with_replacement(KINDS, 2):
        if (first, second) in PAIRS:
            continue
        pair = {first, second}
        if type(KINDS[first]) is type(KINDS[second]):
            reason = "must come once per layer"
        elif pair & set(BINARY):
            reason = "one bit leaves nothing to round, drop or freeze"
        elif "window" in pair:
            reason = "replaces attention, not a layer with a weight"
        elif "freeze" in pair:
            reason = "Freeze must come with FakeQuantize\\(method='lts'\\)"
        else:
            assert pair == {"lts", "srste"}
            reason = "NMSparse must have method 'lbc' beside FakeQuantize\\(method='lts'\\)"
        found.append((first, second, reason))
    return found


class Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), as torchvision writes it."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TinyResNet(nn.Module):
    """Two blocks of 8 and 16 channels; torch.fx can trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def tiny_vit() -> nn.Module:
    return DeiT(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2, mlp_ratio=2.0, num_classes=4)


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 4


def train(
    model: nn.Module, steps: int = STEPS, optimizer: torch.optim.Optimizer | None = None, first: int = 0
) -> tuple[list[float], torch.optim.Optimizer]:
    """The losses of so many steps on batches that depend on the step's number alone, and the optimiser."""
    model.train()
    optimizer = optimizer or torch.optim.SGD(compress.parameter_groups(model, 1e-4), lr=0.01, momentum=0.9)
    losses = []
    for i in range(first, first + steps):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(100 + i))
        loss = F.cross_entropy(model(images), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        compress.step(model)
        losses.append(loss.item())
    return losses, optimizer


def prepared(build: Callable[[], nn.Module], transforms: Any, steps: int = STEPS, **options: Any) -> nn.Module:
    """Prepared and calibrated."""
    torch.manual_seed(3)
    model = compress.prepare_(build(), compress.Recipe(compress.Rule(*transforms), **options), steps)
    compress.calibrate_(model, batch()[0])
    return model


def inputs_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each compressed layer is given."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, (compress.CompressedConv2d, compress.CompressedLinear)):
            hook = lambda _, inputs, name=name: found.__setitem__(name, inputs[0].detach())  # noqa: E731
            hooks.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(images)
    for each in hooks:
        each.remove()
    return found


def compute(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's convolution or product of other tensors."""
    if isinstance(layer, nn.Linear):
        return F.linear(input, weight, bias)
    return nn.Conv2d._conv_forward(layer, input, weight, bias)


@torch.no_grad()
def assert_packed(layer: Any, packed: Any, input: Tensor) -> None:
    """The packed layer's output is the trained one's within what is documented.

    In whole numbers that is 2 eps times the sum of the terms' absolute values against the sum of fake-quantised float32
    tensors without rounding (:func:`tersor.quantization.quantized_conv2d`), and 1 eps more for a weight that is scaled
    in another order. The levels of "lts" are differences from one half, which costs 2 eps of the half range. In float,
    each of n additions may round.
    """
    exact = compute(layer, *(each if each is None else each.double() for each in parts(layer, input)))
    size = compute(layer, *(each if each is None else each.double().abs() for each in parts(layer, input)))
    assert layer.quantization is not None or layer.sparsity is not None
    terms = layer.weight[0].numel() if layer.quantize_input is None else 1
    bound = (2 + terms) * EPS * size
    if isinstance(layer.quantize_weight, FreezingWeight):
        ones = torch.ones_like(layer.weight).double() * layer.quantize_weight.half_range.double()
        bound += 2 * EPS * compute(layer, parts(layer, input)[0].double().abs(), ones, None)
    output = packed(input)
    assert output.shape == exact.shape
    assert output.dtype == input.dtype
    assert ((output.double() - exact).abs() <= bound).all(), ((output.double() - exact).abs() / bound).max()


def parts(layer: Any, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return layer.compressed_input(input), layer.compressed_weight(), layer.bias
