"""Parity with vector files of the system ``lts``: one check per ``meta["case"]``, sizes all from the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tersor
from tersor.freezing import (
    FreezeSchedule,
    LtsConv2d,
    LtsLinear,
    authors_state_dict,
    frozen_ratio,
    frozen_weights,
    initialize_,
    load_authors_state_dict,
)
from tersor.models import (
    mobilenet_v1_quant,
    mobilenet_v2_quant,
    resnet18_quant,
    resnet20_quant,
    resnet50_quant,
)
from tersor.models._classification import lts_layers
from tersor.models.resnet import BasicBlock

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Result = tuple[str, float, float]  # name of the array, error, tolerance
Values = dict[str, tuple[Tensor, float]]  # by the array's whole name: ours, tolerance

OPERATORS, NETWORK, EXACT = 4e-6, 2e-6, 0.0
GROWTHS = {"fixing": "fixing", "linear-growth": "linear", "sine-growth": "sine"}
NETWORKS = {
    "resnet20": resnet20_quant,
    "resnet18": resnet18_quant,
    "resnet50": resnet50_quant,
    "mv1": mobilenet_v1_quant,
    "mv2": mobilenet_v2_quant,
}
OURS = {
    "uW": "quantize_weight.upper",
    "lW": "quantize_weight.lower",
    "uA": "quantize_input.upper",
    "lA": "quantize_input.lower",
}


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs what the file is of and measures every ``out_``, ``grad_`` and ``state_`` array.

    The file's values are float32, and so in a float32 run its states of single weights hold bit by bit. In a float64
    run levels, saved weights, masks and counts still do; the distances are held to the operators' tolerance, and all
    others to theirs or to twice the distance from float64 that the file states of itself, if that is more.

    Raises:
        ValueError: the file is of a case that is not known here.
        AssertionError: something other than an array differs, such as the shares of frozen weights in ``meta``.
    """
    if meta["case"] not in CHECKS:
        raise ValueError(f"no check for case {meta['case']!r}, known are {', '.join(CHECKS)}")
    _check_published(meta.get("published_state_dicts", {}))
    ours = CHECKS[meta["case"]](arrays, meta, dtype, device)
    expected = [name for name in arrays if name.startswith(("out_", "grad_", "state_"))]
    assert set(ours) <= set(expected), f"the file lacks {sorted(set(ours) - set(expected))}"
    results = []
    for name in (name for name in expected if name in ours):
        value, tolerance = ours[name]
        if dtype == torch.float64 and tolerance != EXACT:
            stated = meta.get("float64_check", {})
            tolerance = max(tolerance, 2 * stated.get("grad" if name.startswith("grad_") else "out", 0))
        results.append((name, _error(value, arrays[name]), tolerance))
    return results


def check_quant_ops(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.fake_quantize_bounds` with the unit rule."""
    ours: Values = {}
    for case in meta["cases"]:
        tag, bits, signed = case["tag"], case["bits"], SIGNED[case["kind"]]
        values = arrays[f"in_x_{tag}"], np.float32(case["l"]), np.float32(case["u"])  # the file's bounds are float32
        if dtype == torch.float64:
            values = _on_bounds(*values), *values[1:]
        inputs = [_tensor(value, dtype, device).requires_grad_() for value in values]
        output = tersor.fake_quantize_bounds(*inputs, bits=bits, rule="unit", signed=signed)
        gradients = torch.autograd.grad(output, inputs, _tensor(arrays[f"in_gout_{tag}"], dtype, device))
        if dtype == torch.float64:
            output = _settle_ties(output, arrays[f"out_y_{tag}"], *map(np.float64, values), bits, signed)
        ours[f"out_y_{tag}"] = output, OPERATORS
        ours |= {f"grad_{n}_{tag}": (g, OPERATORS) for n, g in zip("xlu", gradients, strict=True)}
    return ours


def _on_bounds(x: np.ndarray, lower: np.floating, upper: np.floating) -> np.ndarray:
    """In float64, on the bound itself what float32 rounds to a place of 0 or 1; else the same."""
    place = (x - lower) / (upper - lower)
    return np.where(place == 0, np.float64(lower), np.where(place == 1, np.float64(upper), x))


def _settle_ties(
    output: Tensor, expected: np.ndarray, x: np.ndarray, lower: np.ndarray, upper: np.ndarray, bits: int, signed: bool
) -> Tensor:
    """``output`` with the expected level where the rounding of float32 alone decides between two levels.

    There ``output`` has to be one of the two. Four roundings, of 2^-24 each, come before the one to a level.
    """
    levels = 2**bits - 1
    place = np.clip((x - lower) / (upper - lower), 0, 1) * levels
    below = np.floor(place)
    tie = np.abs(place - below - 0.5) <= place * 2.0**-22
    code = output.detach().cpu().numpy() * (levels / 2 if signed else levels) + (levels / 2 if signed else 0)
    away = np.minimum(np.abs(code - below), np.abs(code - below - 1))[tie]
    assert (away <= 1e-6).all(), f"{away.max()} of a level away from both levels beside a tie"
    device = str(output.device)
    return torch.where(torch.from_numpy(tie).to(device), _tensor(expected, output.dtype, device), output)


def check_freeze_evolution(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """A layer's weight quantiser over training steps, with the weight and the bounds of each step given."""
    ours: Values = {}
    for case in meta["cases"]:
        tag = case.get("tag", case["mode"].replace("-", "_"))
        rate = {"rate": case["fixed_rate"]} if "fixed_rate" in case else {}
        epochs = case["batch_num"], case["epochs"], case["warmup_epoch"]
        schedule = FreezeSchedule(*epochs, GROWTHS[case["mode"]], momentum=case["distance_ema"], **rate)
        names = "in_w", "in_gout", "param_uW", "param_lW"
        steps = list(zip(*(_tensor(arrays[f"{name}_{tag}"], dtype, device) for name in names), strict=True))
        assert len(steps) == case.get("steps", len(steps))
        layer = _layer(case.get("layer", "QConv"), steps[0][0].shape, case["bits"], schedule).to(device, dtype)
        results = []
        for weight, gradient, upper, lower in steps:
            results.append(_evolve(layer, weight, gradient, upper, lower))
            if "frozen_fraction" in case:
                assert frozen_ratio(layer) == case["frozen_fraction"][len(results) - 1], f"{tag}: step {len(results)}"
        for name, tolerance in TOLERANCES.items():
            if name == "state_distance" and dtype == torch.float64:
                tolerance = OPERATORS
            ours[f"{name}_{tag}"] = torch.stack([result[name] for result in results]), tolerance
    return ours


def _layer(kind: str, shape: torch.Size, bits: int, schedule: FreezeSchedule) -> nn.Module:
    """The layer whose weight has that shape."""
    options: dict[str, Any] = {"bits": bits, "schedule": schedule, "frozen_step": True}
    if kind == "QConv":
        return LtsConv2d(shape[1], shape[0], tuple(shape[2:]), **options)
    if kind == "QLinear":
        return LtsLinear(shape[1], shape[0], **options)
    raise ValueError(f"no layer for {kind!r}, known are QConv and QLinear")


def _evolve(layer: Any, weight: Tensor, gradient: Tensor, upper: Tensor, lower: Tensor) -> dict[str, Tensor]:
    """What a training step makes of the layer's state, and its gradients."""
    quantizer = layer.quantize_weight
    with torch.no_grad():
        for ours, theirs in ((layer.weight, weight), (quantizer.upper, upper), (quantizer.lower, lower)):
            ours.copy_(theirs)
    layer.zero_grad()
    output = quantizer(layer.weight)
    output.backward(gradient)
    return {
        "out_q": output.detach(),
        "grad_w": layer.weight.grad,
        "grad_uW": quantizer.upper.grad,
        "grad_lW": quantizer.lower.grad,
        "state_distance": quantizer.distance.clone(),
        "state_unchange_step": quantizer.frozen_step.clone(),
        "state_saved_weight": quantizer.saved.clone(),
        "state_prev_q": _level(quantizer.code, quantizer.bits),
    }


def _level(code: Tensor, bits: int) -> Tensor:
    """In [0, 1], as float32 has it."""
    return code.float() / torch.full_like(code, 2**bits - 1, dtype=torch.float32)


def check_block_linear(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """A residual block and a classifier: bounds from a first batch, training steps, evaluation."""
    model = _Network(arrays, meta).to(device, dtype)
    state = authors_state_dict(model)
    given = {_key(n.removeprefix("param_")): v for n, v in arrays.items() if n.startswith("param_")}
    assert set(given) <= set(state), f"the model has no {sorted(set(given) - set(state))}"
    load_authors_state_dict(model, state | {key: _tensor(value, dtype, device) for key, value in given.items()})
    images, targets = _tensor(arrays["in_x"], dtype, device), _tensor(arrays["in_target"], dtype, device)

    ours: Values = {"out_init_forward": (initialize_(model, images[0]), NETWORK)}
    ours |= _states(model, "state_init_", arrays, meta["bits"])
    ours |= _train(model, arrays, meta, images[1:], targets)
    model.eval()
    with torch.no_grad():
        ours["out_eval"] = model(images[0]), NETWORK
    return ours | _states(model, "state_final_", arrays, meta["bits"])


class _Network(nn.Module):
    """The block of ``resnet20``, mean, classifier; sizes from the file."""

    def __init__(self, arrays: Arrays, meta: Meta) -> None:
        super().__init__()
        schedule = FreezeSchedule(
            meta["bn"], meta["ep"], meta["wu"], GROWTHS[meta["mode"]], meta.get("fixed_rate", 0.1), meta["ema"]
        )
        layers = lts_layers(meta["bits"], schedule, saved=True, frozen_step=True)
        after, before, *_ = arrays["param_block__conv1__weight"].shape
        self.block = BasicBlock(before, after, meta["stride"], conv=layers["conv"])
        projects = "param_block__shortcut__0__weight" in arrays
        assert hasattr(self.block, "shortcut") == projects, "a shortcut of its own where the shape changes, only there"
        self.fc = layers["linear"](after, arrays["param_fc__weight"].shape[0])

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(self.block(input).mean((2, 3)))


def _train(model: nn.Module, arrays: Arrays, meta: Meta, images: Tensor, targets: Tensor) -> Values:
    number = r"(\.?\d[\d.]*(?:e-?\d+)?)"
    pattern = rf"SGD\(lr, momentum {number}, wd {number}\) for weights/BN, Adam\({number}\) for bounds, cross-entropy"
    found = re.fullmatch(pattern, meta["optimizer"])
    if not found:
        raise ValueError(f"optimizer is not understood: {meta['optimizer']!r}")
    momentum, decay, rate = map(float, found.groups())
    named = dict(model.named_parameters())
    bounds = [p for name, p in named.items() if name.endswith(tuple(OURS.values()))]
    others = [p for name, p in named.items() if not name.endswith(tuple(OURS.values()))]
    optimizers = [
        torch.optim.SGD(others, meta["lrm"], momentum=momentum, weight_decay=decay),
        torch.optim.Adam(bounds, rate),
    ]
    model.train()
    ours: Values = {}
    logits, losses, counts = [], [], []
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        output = model(image)
        loss = F.cross_entropy(output, target)
        model.zero_grad()
        loss.backward()
        for name in (name for name in arrays if name.startswith(f"grad_s{i}_")):
            place, _, last = _key(name.removeprefix(f"grad_s{i}_")).rpartition(".")
            ours[name] = named[f"{place}.{OURS.get(last, last)}"].grad.clone(), NETWORK
        for optimizer in optimizers:
            optimizer.step()
        logits.append(output.detach())
        losses.append(loss.detach())
        counts.append(torch.stack([transform.counters[1] for _, transform in frozen_weights(model)]))
    ours["out_logits"], ours["out_loss"] = (torch.stack(logits), NETWORK), (torch.stack(losses), NETWORK)
    return ours | {"state_frozen_counts": (torch.stack(counts), EXACT)}


def _states(model: nn.Module, prefix: str, arrays: Arrays, bits: int) -> Values:
    """The arrays of that prefix, under their published keys."""
    state, ours = authors_state_dict(model), {}
    for name in (name for name in arrays if name.startswith(prefix)):
        key = _key(name.removeprefix(prefix))
        value, last = state[key].clone(), key.rpartition(".")[2]
        if last == "prev_Qweight":
            value = _level((value * (2**bits - 1)).round(), bits)
        ours[name] = value, EXACT if last in ("prev_Qweight", "unchange_step") else NETWORK
    return ours


SIGNED = {"act": False, "weight": True}
TOLERANCES = {
    "out_q": OPERATORS,
    "grad_w": OPERATORS,
    "grad_uW": OPERATORS,
    "grad_lW": OPERATORS,
    "state_distance": EXACT,
    "state_unchange_step": EXACT,
    "state_saved_weight": EXACT,
    "state_prev_q": EXACT,
}
CHECKS = {
    "quant_ops": check_quant_ops,
    "freeze_evolution": check_freeze_evolution,
    "block_linear": check_block_linear,
}


def _check_published(published: Mapping[str, Any]) -> None:
    """Keys, their order, shapes and sizes of the authors' networks, where the file lists them."""
    for title, content in published.items():
        with torch.device("meta"):
            model = NETWORKS[title](bits=2)
        ours = [[key, list(value.shape)] for key, value in authors_state_dict(model).items()]
        differ = [pair for pair in zip(ours, content["state_dict"], strict=False) if pair[0] != pair[1]]
        assert not differ, f"{title}: key or shape differs: {differ[0]}"
        assert len(ours) == len(content["state_dict"]), title
        assert sum(p.numel() for p in model.parameters()) == content["params"], title


def _key(name: str) -> str:
    return name.replace("__", ".")


def _error(ours: Tensor, expected: np.ndarray) -> float:
    if tuple(ours.shape) != expected.shape:
        return math.inf
    theirs = torch.from_numpy(expected.astype(np.float64))
    error = (ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    return error.item() if error.isfinite() else math.inf


def _tensor(array: np.ndarray | np.floating, dtype: torch.dtype, device: str) -> Tensor:
    """A copy in the asked dtype; targets (int64) keep theirs."""
    tensor = torch.from_numpy(np.array(array)).to(device)
    return tensor if tensor.dtype == torch.int64 else tensor.to(dtype)
