"""Parity with vector files of the system ``reste``: one check per ``meta["case"]``, sizes all from the file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from binary_network import arrays_error, load_arrays, step_of, tensor_of
from torch import Tensor

from tersor.binary import ReSTEConv2d, estimating_error, gradient_stability, reste_conv2d, reste_o, reste_sign
from tersor.models.binary_resnet import CIFAR, RESTE, BinaryBlock, PaddedShortcut, projected
from tersor.models.resnet import ResNet

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Values = dict[str, Tensor]

OPERATOR = 1e-6  # spec reste.md 6
NETWORK = 5e-6
LAST_BIAS = 1e-5  # of the norm right in front of the head's, whose gradient is 0 but for roundings


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[tuple[str, float, float]]:
    """Runs what the file is of and measures every ``out_``, ``grad_`` and ``state_after_`` array.

    Raises:
        ValueError: the file is of a case that is not known here.
    """
    if "param_conv1__weight" in arrays:
        ours, tolerance = check_network(arrays, meta, dtype, device), NETWORK
    elif any(n.startswith("param_weight_") for n in arrays):
        ours, tolerance = check_convolution(arrays, meta, dtype, device), OPERATOR
    elif any(n.startswith("out_o_") for n in arrays):
        ours, tolerance = check_schedule(arrays, meta, dtype, device), OPERATOR
    elif "in_x" in arrays:
        ours, tolerance = check_sign(arrays, meta, dtype, device), OPERATOR
    else:
        raise ValueError(f"no check for case {meta['case']!r}")
    last = max((n for n in ours if n.startswith("grad_layer") and n.endswith("__bn2__bias")), default=None)
    return [(n, arrays_error(v, arrays[n]), LAST_BIAS if n == last else tolerance) for n, v in ours.items()]


def check_sign(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.reste_sign`; the boundary values of x are the float32 ones, also in float64."""
    gradient, values = tensor_of(arrays["in_gout"], dtype, device), {}
    for case in meta["cases"]:
        x = tensor_of(arrays["in_x"], dtype, device).requires_grad_()
        rule = (float(np.float32(case[n])) if dtype == torch.float64 else case[n] for n in ("t", "interval"))
        output = reste_sign(x, case["o"], *rule)
        (grad,) = torch.autograd.grad(output, x, gradient)
        values |= {f"out_y_{case['i']}": output, f"grad_x_{case['i']}": grad}
    return values


def check_convolution(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.reste_conv2d`."""
    values = {}
    for case in meta["cases"]:
        i = case["i"]
        names = {"x": "in_x", "weight": "param_weight", "bias": "param_bias"}
        tensors = {
            n: tensor_of(arrays[f"{stored}_{i}"], dtype, device).requires_grad_()
            for n, stored in names.items()
            if f"{stored}_{i}" in arrays
        }
        output = reste_conv2d(
            tensors["x"],
            tensors["weight"],
            *(case[n] for n in ("o", "o_a", "t", "t_a")),
            tensors.get("bias"),
            case["stride"],
            case["padding"],
            case.get("dilation", 1),
            case.get("groups", 1),
            case["act_32bit"],
        )
        grads = torch.autograd.grad(output, list(tensors.values()), tensor_of(arrays[f"in_gout_{i}"], dtype, device))
        values[f"out_y_{i}"] = output
        values |= {f"grad_{n}_{i}": grad for n, grad in zip(tensors, grads, strict=True)}
    return values


def check_schedule(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.binary.reste_o` and the two indicators."""
    values = {}
    for case in meta["cases"]:
        name = f"out_o_{case['i']}"
        each = [reste_o(epoch, case["epochs"], case["o_end"]) for epoch in range(len(arrays[name]))]
        values[name] = torch.tensor(each, dtype=torch.float64)
    if "in_w" in arrays:
        weight = tensor_of(arrays["in_w"], dtype, device)
        count = len(arrays["out_estimating_error_o"])
        values["out_estimating_error_o"] = torch.stack([estimating_error([weight], o + 1) for o in range(count)])
    if "in_wgrad" in arrays:
        values["out_stability"] = gradient_stability([tensor_of(arrays["in_wgrad"], dtype, device)]).reshape(1)
    return values


def check_network(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """Stem, two blocks and head, through a step of training and then evaluation."""
    shortcut = next((n for n in ("shortcut", "downsample") if any(f"__{n}__" in name for name in arrays)), None)
    each = "bireal" in meta["case"] or shortcut == "downsample"
    block = functools.partial(
        BinaryBlock, relu=True, each=each, reshape=PaddedShortcut if shortcut is None else projected
    )
    o, t = meta["o"], meta.get("t", 1.5)
    conv = functools.partial(ReSTEConv2d, o=o, o_a=meta.get("o_a", o), t=t, t_a=meta.get("t_a", t))
    width, in_chans = arrays["param_conv1__weight"].shape[:2]
    options = CIFAR | RESTE | {"conv": conv, "shortcut": shortcut or "shortcut"}
    model = ResNet(block, (1, 1), width, len(arrays["param_linear__bias"]), in_chans, **options)
    return step_of(load_arrays(model, arrays, dtype, device), arrays, dtype, device)
