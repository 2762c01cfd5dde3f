"""Parity with vector files of the system ``lbc``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.models.deit import DeiT
from tersor.models.resnet import BasicBlock, Bottleneck, ResNet
from tersor.sparsity import (
    NMConv2d,
    NMLinear,
    NMSchedule,
    nm_combinations,
    nm_conv2d,
    nm_linear,
    nm_remove_,
    nm_sparsify,
    pack_semi_structured,
    srste_sparsify,
)

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Values = dict[str, Tensor]

EQUAL = (
    "out_values",
    "out_meta",
    "mask",
    "combos",
    "out_alpha",
    "frozen_per_epoch",
)  # arrays that leave nothing to rounding
TOLERANCE = 1e-5


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[tuple[str, float, float]]:
    """Runs what the file is of and measures every ``out_`` and ``grad_`` array.

    Raises:
        ValueError: the file is of an operation that is not known here.
    """
    for op, function in CHECKS.items():
        if meta["op"].startswith(op):
            ours = function(arrays, meta, dtype, device)
            return [(n, _error(value, arrays[n]), _allowed(n, meta)) for n, value in ours.items()]
    raise ValueError(f"no check for op {meta['op']!r}, known are {', '.join(CHECKS)}")


def _allowed(name: str, meta: Meta) -> float:
    exact = any(part in name for part in EQUAL) and not name.startswith("grad_")
    return 0.0 if exact else 2 * TOLERANCE if "resnet" in meta["op"] else TOLERANCE


def _error(ours: Tensor, expected: np.ndarray) -> float:
    assert tuple(ours.shape) == expected.shape, f"shape {tuple(ours.shape)} instead of {expected.shape}"
    difference = np.abs(ours.detach().cpu().double().numpy() - expected.astype(np.float64))
    return float(difference.max() / max(1.0, np.abs(expected).max())) if expected.size else 0.0


def _tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    return torch.from_numpy(array.copy()).to(device, dtype)


def check_layer(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.nm_linear` or :func:`tersor.nm_conv2d`."""
    names = [n for n in ("in_x", "param_weight", "param_alpha", "param_bias") if n in arrays]
    tensors = {n: _tensor(arrays[n], dtype, device).requires_grad_() for n in names}
    input, weight, scores, bias = (tensors.get(n) for n in ("in_x", "param_weight", "param_alpha", "param_bias"))
    assert input is not None
    assert weight is not None
    assert scores is not None
    n, m = meta["N"], meta["M"]
    if meta["op"] == "lbc_linear":
        output = nm_linear(input, weight, scores, bias, n, m)
    else:
        window = [meta[name] for name in ("stride", "padding", "dilation", "groups")]
        output = nm_conv2d(input, weight, scores, bias, n, m, *window)
    gradients = torch.autograd.grad(output, list(tensors.values()), _tensor(arrays["in_gout"], dtype, device))
    values = {"out": output, "out_combos_const": nm_combinations(n, m)}
    values["out_mask"] = (nm_sparsify(torch.ones_like(weight), scores, n, m) != 0).to(dtype)
    short = {"in_x": "x", "param_weight": "weight", "param_alpha": "alpha", "param_bias": "bias"}
    return values | {f"grad_{short[n]}": g for n, g in zip(tensors, gradients, strict=True)}


def check_remove(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.sparsity.nm_remove_`; the pattern is found from the number of combinations."""
    scores = _tensor(arrays["in_alpha"], dtype, device)
    nm_remove_(scores, meta["k"], *_pattern_of(scores.shape[1]))
    if "out_alpha_sorted_rows" in arrays:
        return {"out_alpha_sorted_rows": scores.sort(dim=1).values}
    return {"out_alpha": scores}


def _pattern_of(combinations: int) -> tuple[int, int]:
    return {6: (2, 4), 4: (1, 4), 70: (4, 8), 28: (2, 8), 16: (1, 16), 2: (1, 2), 3: (1, 3)}[combinations]


def check_srste(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    input, weight = (_tensor(arrays[n], dtype, device).requires_grad_() for n in ("in_x", "param_weight"))
    sparse = srste_sparsify(weight, meta["N"], meta["M"], meta["decay"])
    if weight.dim() == 2:
        output = F.linear(input, sparse)
    else:
        output = F.conv2d(input, sparse, None, meta.get("stride", 1), meta["padding"])
    gradients = torch.autograd.grad(output, (input, weight), _tensor(arrays["in_gout"], dtype, device))
    values = {"out": output, "out_sparse_weight": sparse, "out_mask": (sparse != 0).to(dtype)}
    return values | {"grad_x": gradients[0], "grad_weight": gradients[1]}


class Convolutions(nn.Module):
    """The network of the trajectory with SGD; sizes from the file."""

    def __init__(self, arrays: Arrays, n: int, m: int) -> None:
        super().__init__()
        for i in (1, 2):
            outputs, inputs, kernel, _ = arrays[f"param_conv{i}.weight"].shape
            layer = NMConv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, n=n, m=m)
            self.add_module(f"conv{i}", layer)
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
        self.fc = nn.Linear(*arrays["param_fc.weight"].shape[::-1])

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        return self.fc(self.bn2(self.conv2(x)).mean((2, 3)))


def check_sgd(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    model = _loaded(Convolutions(arrays, meta["N"], meta["M"]), arrays, dtype, device)
    groups = {"bn": [], "alpha": [], "rest": []}  # type: dict[str, list[nn.Parameter]]
    for name, parameter in model.named_parameters():
        groups["bn" if "bn" in name else "alpha" if "alpha" in name else "rest"].append(parameter)
    options = [{"params": p, "weight_decay": 0 if n == "bn" else meta["weight_decay"]} for n, p in groups.items()]
    optimizer = torch.optim.SGD(options, meta["lr_base"], momentum=meta["momentum"])
    targets = torch.from_numpy(arrays["in_y"].copy()).to(device)

    def loss(model: nn.Module, batch: Tensor, place: tuple[int, int]) -> Tensor:
        return F.cross_entropy(model(batch), targets[place], label_smoothing=meta["label_smoothing"])

    return _trajectory(model, optimizer, loss, arrays, meta, dtype, device, freeze=True)


class Perceptron(nn.Module):
    """The network of the trajectory with AdamW."""

    def __init__(self, arrays: Arrays, n: int, m: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = (NMLinear(*arrays[f"param_fc{i}.weight"].shape[::-1], n=n, m=m) for i in (1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def check_adamw(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    model = _loaded(Perceptron(arrays, meta["N"], meta["M"]), arrays, dtype, device)
    plain = [p for p in model.parameters() if p.dim() == 1]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    options = [{"params": plain, "weight_decay": 0}, {"params": decayed, "weight_decay": meta["weight_decay"]}]
    optimizer = torch.optim.AdamW(options, meta["lr"], betas=tuple(meta["betas"]), eps=meta["eps"])
    targets = _tensor(arrays["in_target"], dtype, device)

    def loss(model: nn.Module, batch: Tensor, place: tuple[int, int]) -> Tensor:
        return F.mse_loss(model(batch), targets[place])

    return _trajectory(model, optimizer, loss, arrays, meta, dtype, device, freeze=False)


def check_resnet(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """One step of a ResNet whose stem and classifier are dense."""
    block = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[meta["block"]]
    width, in_chans = arrays["param_conv1.weight"].shape[:2]
    conv = functools.partial(NMConv2d, n=meta["N"], m=meta["M"])
    widths = [w // block.expansion for w in meta["block_cfg"]]
    options = {"conv": conv, "first": nn.Conv2d, "widths": widths}
    model = ResNet(block, meta["num_blocks"], width, meta["num_classes"], in_chans, **options)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == meta["state_dict_keys"]
    return _one_step(_loaded(model, arrays, dtype, device), arrays, dtype, device)


def check_vit(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    model = DeiT(
        meta["img"],
        meta["patch"],
        meta["dim"],
        meta["depth"],
        meta["heads"],
        meta["mlp_ratio"],
        num_classes=arrays["out"].shape[1],
        in_chans=arrays["in_x"].shape[1],
        linear=functools.partial(NMLinear, n=meta["N"], m=meta["M"]),
    )
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == meta["state_dict_keys"]
    return _one_step(_loaded(model, arrays, dtype, device), arrays, dtype, device)


def _one_step(model: nn.Module, arrays: Arrays, dtype: torch.dtype, device: str) -> Values:
    output = model(_tensor(arrays["in_x"], dtype, device))
    output.backward(_tensor(arrays["in_gout"], dtype, device))
    gradients = {f"grad_{name}": p.grad for name, p in model.named_parameters() if f"grad_{name}" in arrays}
    return {"out": output} | {name: g for name, g in gradients.items() if g is not None}


def _loaded(model: nn.Module, arrays: Arrays, dtype: torch.dtype, device: str) -> nn.Module:
    model = model.to(device, dtype).train()
    state = {n.removeprefix("param_"): _tensor(a, dtype, device) for n, a in arrays.items() if n.startswith("param_")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.endswith(("index_list", "running_mean", "running_var", "num_batches_tracked")) for n in missing)
    return model


def _trajectory(
    model: nn.Module,
    optimizer: Any,
    loss: Any,
    arrays: Arrays,
    meta: Meta,
    dtype: torch.dtype,
    device: str,
    freeze: bool,
) -> Values:
    schedule = NMSchedule(model, meta["t_f"], meta["schedule_power"], freeze)
    inputs, values, losses, frozen = _tensor(arrays["in_x"], dtype, device), {}, [], []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (NMLinear, NMConv2d))}
    for epoch in range(inputs.shape[0]):
        schedule.start_epoch(epoch)
        assert schedule.removed == [arrays["in_k_per_epoch"][epoch]] * len(layers)
        frozen.append(float(not next(iter(layers.values())).alpha.requires_grad))
        for i in range(inputs.shape[1]):
            if "in_lr" in arrays:
                for group in optimizer.param_groups:
                    group["lr"] = float(arrays["in_lr"].reshape(-1)[len(losses)])
            schedule.step()
            value = loss(model, inputs[epoch, i], (epoch, i))
            losses.append(value.detach())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        values |= _after_epoch(f"out_epoch{epoch}_", model, layers, arrays)
    schedule.finish()
    for name, layer in layers.items():
        values[f"out_final_mask_{name}"] = _mask(layer)
    values["out_loss"] = torch.stack(losses).reshape(arrays["out_loss"].shape)
    if "out_frozen_per_epoch" in arrays:
        values["out_frozen_per_epoch"] = torch.tensor(frozen)
    return {n: v for n, v in values.items() if n in arrays}


def _after_epoch(prefix: str, model: nn.Module, layers: Mapping[str, Any], arrays: Arrays) -> Values:
    state = model.state_dict()
    values = {n: state[n.removeprefix(prefix)].clone() for n in arrays if n.removeprefix(prefix) in state}
    return values | {f"{prefix}{name}_mask_after_step": _mask(layer) for name, layer in layers.items()}


def _mask(layer: Any) -> Tensor:
    with torch.no_grad():
        return (nm_sparsify(torch.ones_like(layer.weight), layer.alpha, layer.n, layer.m) != 0).float()


def check_pack(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    values, metadata = pack_semi_structured(torch.from_numpy(arrays["in_dense"].copy()).to(device))
    return {"out_values": values, "out_meta": metadata}


CHECKS = {
    "pack 2:4": check_pack,
    "lbc_conv2d": check_layer,
    "lbc_linear": check_layer,
    "lbc_remove": check_remove,
    "srste": check_srste,
    "lbc training trajectory (DeiT": check_adamw,
    "lbc training trajectory": check_sgd,
    "lbc resnet": check_resnet,
    "lbc tiny DeiT": check_vit,
}
