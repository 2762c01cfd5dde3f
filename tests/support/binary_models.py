"""What the tests of the binary networks share: sizes, published keys, formulas of steps, packing."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import binary_formula
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary import (
    BinaryConv2d,
    PackedBinaryConv2d,
    PackedSigns,
    ReCUConv2d,
    ReSTEConv2d,
    convert_,
    unpack_signs,
)

VECTORS = Path(os.environ.get("TERSOR_VECTORS") or Path(__file__).resolve().parents[3] / "shared" / "vectors")
TAU, O = 0.8, 2.5
BINARY = (BinaryConv2d, ReCUConv2d)


def state_of(build: Callable[..., nn.Module]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict, in order."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def parameters_of(build: Callable[..., nn.Module]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def published_state(system: str, network: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes that the published network has; skips the test where the vectors are not there."""
    path = VECTORS / system / "resnet20_tiny.npz"
    if not path.exists():
        pytest.skip(f"no {path}: set TERSOR_VECTORS to the folder that holds <system>/*.npz")
    with np.load(path, allow_pickle=False) as file:
        entry = json.loads(str(file["meta"]))["published_state_dicts"][network]
    return {name: tuple(shape) for name, shape in entry["state_dict"]}


def binary_and_float_macs(build: Callable[..., nn.Module], size: int) -> tuple[int, int]:
    """Multiply-adds for one image, of binary convolutions and of all other layers; computes none of them."""
    totals = [0, 0]

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        totals[not isinstance(module, BINARY)] += output.numel() * module.weight[0].numel()

    with torch.device("meta"):
        model = build().eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        with torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return totals[0], totals[1]


def spread(model: nn.Module) -> nn.Module:
    """Norms, slopes and shifts as after a training, some of them negative; tau and o away from their start."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif isinstance(module, ReCUConv2d):
            module.set_tau_(TAU)
        elif isinstance(module, ReSTEConv2d):
            module.set_o_(O)
    for name, parameter in model.named_parameters():
        if ".move" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


class Formula:
    """The parts of a network from its state alone; in training the norms use the batch's statistics."""

    def __init__(self, state: Mapping[str, Tensor], training: bool) -> None:
        self.state, self.training = state, training

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var = (self.state[f"{name}.running_{part}"].clone() for part in ("mean", "var"))
        affine = (self.state[f"{name}.weight"], self.state[f"{name}.bias"])
        return F.batch_norm(x, mean, var, *affine, self.training)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2)

    def recu(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, alpha = (self.state[f"{name}.{part}"] for part in ("weight", "alpha"))
        tau = self.state[f"{name}.tau"].float().item()
        return binary_formula.recu_conv(x, weight, alpha, tau, None, self.training, stride, 1)

    def reste(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """With the ReLU behind it. Sums are rounded, so that those of 0 are exactly 0, as the operator has them."""
        weight = self.state[f"{name}.weight"]
        sums = F.conv2d(binary_formula.reste(x, O, 1.5), binary_formula.reste(weight, O, 1.5), None, stride, 1)
        return F.relu((sums + (sums.round() - sums).detach()) * weight.abs().mean())


def compare_with(formula: Callable[[Formula, Tensor], Tensor], model: nn.Module, size: int, batch: int = 2) -> None:
    """Outputs in training and evaluation and the gradients of every parameter in training, in float64."""
    model = spread(model).double()
    images = torch.randn(batch, 3, size, size, dtype=torch.float64)
    x = images.clone().requires_grad_()
    state = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    state = {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in state.items()}
    model.eval()
    torch.testing.assert_close(model(images), formula(Formula(state, False), images), rtol=1e-9, atol=1e-9)
    leaves = {name: tensor for name, tensor in state.items() if tensor.requires_grad}
    expected = formula(Formula(state, True), x)
    gradient = torch.randn_like(expected)
    grads = torch.autograd.grad(expected, [x, *leaves.values()], gradient)
    ours = images.clone().requires_grad_()
    output = model.train()(ours)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    output.backward(gradient)
    results = [ours.grad, *(model.get_parameter(name).grad for name in leaves)]
    for name, mine, theirs in zip(["input", *leaves], results, grads, strict=True):
        assert mine is not None, name
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7 * max(1, theirs.abs().max().item()), msg=name)


@torch.no_grad()
def check_packed(model: nn.Module, images: Tensor, passes: list[str]) -> nn.Module:
    """Packs a copy: same predictions, outputs but for roundings, and from its state dict alone another one's.

    Args:
        model: in float32.
        passes: names of the convolutions that give bits; they are exactly the signs that the model computes.
    """
    model = spread(model).eval()
    packed = convert_(copy.deepcopy(model))
    expected, output = model(images), packed(images)
    assert torch.equal(output.argmax(1), expected.argmax(1))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    binary = {name: m for name, m in model.named_modules() if isinstance(m, BINARY)}
    layers = {name: packed.get_submodule(name) for name in binary}
    assert all(isinstance(layer, PackedBinaryConv2d) for layer in layers.values())
    assert [name for name, layer in layers.items() if layer.signs_for is not None] == passes
    for name, layer in layers.items():
        assert layer.packed.nbytes == binary[name].weight.nbytes / 32
        assert layer.nonzero is None
    check_signs(model, packed, images, list(binary), len(passes))
    skeleton = convert_(spread(copy.deepcopy(model)))
    assert not torch.equal(skeleton(images), output)
    skeleton.load_state_dict(packed.state_dict())
    assert torch.equal(skeleton(images), output)
    return packed


def check_signs(model: nn.Module, packed: nn.Module, images: Tensor, names: list[str], passed: int) -> None:
    """What goes into a convolution as bits are the signs of what goes into the model's."""
    taken: dict[str, tuple[Any, ...]] = {}
    for network in (model, packed):
        hooks = []
        for name in names:

            def keep(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                x = args[0]
                taken[name] = *taken.get(name, ()), x if isinstance(x, PackedSigns) else x.sign()

            hooks.append(network.get_submodule(name).register_forward_pre_hook(keep))
        network(images)
        for hook in hooks:
            hook.remove()
    bits = {name: pair for name, pair in taken.items() if isinstance(pair[1], PackedSigns)}
    assert len(bits) == passed
    for name, (theirs, ours) in bits.items():
        assert torch.equal(unpack_signs(ours), theirs), name
        assert theirs.unique().numel() > 1


def check_graph(packed: nn.Module, images: Tensor) -> None:
    """One graph without breaks, and exported."""
    with torch.no_grad():
        expected = packed(images)
        compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(images), expected)
        assert torch.equal(torch.export.export(packed, (images,)).module()(images), expected)


def check_a_step(model: nn.Module, images: Tensor) -> None:
    """Two steps move every parameter."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        loss = F.cross_entropy(model.train()(images), torch.arange(len(images)) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name
