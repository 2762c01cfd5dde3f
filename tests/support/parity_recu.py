"""Parity with vector files of the system ``recu``: one check per ``meta["case"]``, sizes all from the file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from binary_network import arrays_error, load_arrays, step_of, tensor_of
from torch import Tensor, nn

from tersor.binary import approx_sign, binarize_activation, recu_conv2d, recu_tau, recu_weight
from tersor.models.binary_resnet import CIFAR, RECU, BinaryBlock, ShiftedBlock, recu_block
from tersor.models.resnet import ResNet

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Values = dict[str, Tensor]

OPERATOR = 2e-6  # spec recu.md 6
NETWORK = 5e-6
ALPHA = 1e-5  # gradients of alpha in front of a norm, which are 0 but for roundings


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[tuple[str, float, float]]:
    """Runs what the file is of and measures every ``out_``, ``grad_`` and ``state_after_`` array.

    Raises:
        ValueError: the file is of a case that is not known here.
    """
    function, tolerance = _check_of(arrays, meta)
    ours = function(arrays, meta, dtype, device)
    return [
        (n, arrays_error(value, arrays[n]), ALPHA if tolerance == NETWORK and n.endswith("alpha") else tolerance)
        for n, value in ours.items()
    ]


def _check_of(arrays: Arrays, meta: Meta) -> tuple[Any, float]:
    if any(n.startswith("param_") and "bn" in n for n in arrays):
        return check_network, NETWORK
    for kind, function in CHECKS.items():
        if any(n.startswith(kind) for n in arrays):
            return function, OPERATOR
    raise ValueError(f"no check for case {meta['case']!r}")


def check_weight(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.recu_weight`; its clamped weights, which no one needs, written out."""
    values = {}
    for case in meta["cases"]:
        i, tau = case["i"], float(case["tau"])
        weight = tensor_of(arrays[f"in_w_{i}"], dtype, device).requires_grad_()
        signs = recu_weight(weight, tau)
        (grad,) = torch.autograd.grad(signs, weight, tensor_of(arrays[f"in_gout_{i}"], dtype, device))
        values |= {f"out_bw_{i}": signs, f"grad_w_{i}": grad, f"out_w2_{i}": _clamped(weight.detach(), tau)}
    return values


def _clamped(weight: Tensor, tau: float) -> Tensor:
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    scaled = centred / (centred.var((1, 2, 3), keepdim=True) + 1e-5).sqrt() * 2 * 2**0.5
    bound = -scaled.abs().mean() * torch.log(torch.tensor(2 - 2 * tau, dtype=weight.dtype))
    return torch.minimum(torch.maximum(scaled, -bound), bound)


def check_sign(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.approx_sign` and :func:`tersor.binarize_activation`."""
    gradient = tensor_of(arrays["in_gout"], dtype, device)
    x, a = (tensor_of(arrays[n], dtype, device).requires_grad_() for n in ("in_x", "in_a"))
    plain, scaled = approx_sign(x), binarize_activation(a)
    values = {"out_y": plain, "grad_x": torch.autograd.grad(plain, x, gradient)[0]}
    deviation = (a.detach().var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    values |= {"out_a0": a.detach() / deviation, "out_ba": scaled}
    return values | {"grad_a": torch.autograd.grad(scaled, a, gradient)[0]}


def check_convolution(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.recu_conv2d`."""
    values = {}
    for case in meta["cases"]:
        tag = case["tag"]
        names = {"x": "in_x", "weight": "param_weight", "alpha": "param_alpha", "bias": "param_bias"}
        tensors = {
            n: tensor_of(arrays[f"{stored}_{tag}"], dtype, device).requires_grad_()
            for n, stored in names.items()
            if f"{stored}_{tag}" in arrays
        }
        output = recu_conv2d(
            *(tensors[n] for n in ("x", "weight", "alpha")),
            float(case["tau"]),
            tensors.get("bias"),
            case["stride"],
            case["padding"],
            case.get("dilation", 1),
            case.get("groups", 1),
            case["mode"] == "train",
        )
        grads = torch.autograd.grad(output, list(tensors.values()), tensor_of(arrays[f"in_gout_{tag}"], dtype, device))
        values[f"out_y_{tag}"] = output
        values |= {f"grad_{n}_{tag}": grad for n, grad in zip(tensors, grads, strict=True)}
    return values


def check_schedule(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.recu_tau`."""
    return {
        f"out_tau_{case['i']}": torch.tensor(
            [
                recu_tau(epoch, case["epochs"], case["tau_min"], case["tau_max"])
                for epoch in range(len(arrays[f"out_tau_{case['i']}"]))
            ],
            dtype=torch.float64,
        )
        for case in meta["cases"]
    }


class TwoBlocks(nn.Module):
    """Two blocks without a stem or a head, under the names that the file gives them."""

    def __init__(self, arrays: Arrays, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for stride, name in enumerate(names, 1):
            after, before = arrays[f"param_{name}__conv__weight"].shape[:2]
            self.add_module(name, ShiftedBlock(before, after, stride))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def check_network(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """Blocks, mostly with resnet20's stem and head around them, through a step of training and then evaluation."""
    shifts = [n.split("__") for n in arrays if n.startswith("param_") and n.endswith("__move0__bias")]
    shifted = sorted(parts[0].removeprefix("param_") for parts in shifts)
    model = TwoBlocks(arrays, shifted) if shifted else _resnet(arrays, meta)
    for layer in model.modules():
        if hasattr(layer, "set_tau_"):
            layer.set_tau_(meta["tau"])
    return step_of(load_arrays(model, arrays, dtype, device), arrays, dtype, device)


def _resnet(arrays: Arrays, meta: Meta) -> ResNet:
    projected = any("__downsample__" in n for n in arrays)
    one_around_both = not projected and "resnet18" in meta["case"]
    block = BinaryBlock if projected else functools.partial(recu_block, each=not one_around_both)
    width, in_chans = arrays["param_conv1__weight"].shape[:2]
    options = CIFAR | RECU | {"shortcut": "downsample" if projected else "shortcut"}
    return ResNet(block, (1, 1), width, len(arrays["param_linear__bias"]), in_chans, **options)


CHECKS = {
    "in_w_": check_weight,
    "in_a": check_sign,
    "param_weight_": check_convolution,
    "out_tau_": check_schedule,
}
