"""Parity with vector files of the system ``ddtb``: one check per ``meta["case"]``, sizes all from the file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tersor
from tersor.models._super_resolution import attention_transfer
from tersor.models.edsr import EDSR
from tersor.models.rdn import RDN
from tersor.models.srresnet import SRResNet

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Result = tuple[str, float, float]  # name of the array, error, tolerance

WEIGHT_MODES = {"sym": "symmetric", "minmax": "minmax", "pct": "percentile"}


class Values(dict[str, "Tensor | None"]):
    """Our tensors by the array's whole name; ``condition`` is how much an array enlarges its inputs' relative error."""

    def __init__(self) -> None:
        super().__init__()
        self.condition: dict[str, float] = {}


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs what the file is of and measures every ``out_``, ``grad_`` and ``state_`` array.

    The file's values are float32. A float64 run is held to the same tolerance (for a variance, times what that makes of
    the rounding of its inputs), or to twice the distance from float64 that the file states of itself, if that is more.

    Raises:
        ValueError: the file is of a case that is not known here.
        AssertionError: something other than an array differs, such as which layers are dynamic.
    """
    for case, (function, tolerance) in CHECKS.items():
        if meta["case"].startswith(case):
            ours = function(arrays, meta, dtype, device)
            expected = [name for name in arrays if name.startswith(("out_", "grad_", "state_"))]
            assert set(ours) <= set(expected), f"the file lacks {sorted(set(ours) - set(expected))}"
            allowed = dict.fromkeys(expected, tolerance)
            if dtype == torch.float64:
                stated = [2 * error for error in meta.get("seed_checked_against_float64", {}).values()]
                allowed = {n: max([tolerance * ours.condition.get(n, 1), *stated]) for n in expected}
            return [(n, _error(ours[n], arrays[n]), allowed[n]) for n in expected if n in ours]
    raise ValueError(f"no check for case {meta['case']!r}, known are {', '.join(CHECKS)}")


def check_act_static(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.fake_quantize_bounds` with one pair of bounds."""
    ours = Values()
    for case in meta["cases"]:
        tag = case["name"]
        names = (f"in_x_{tag}", f"param_lower_{tag}", f"param_upper_{tag}")
        inputs = [_tensor(arrays[name], dtype, device).requires_grad_() for name in names]
        ours[f"out_y_{tag}"] = output = tersor.fake_quantize_bounds(*inputs, bits=case["bits"])
        gradients = torch.autograd.grad(output, inputs, _tensor(arrays[f"in_gout_{tag}"], dtype, device))
        ours |= {f"grad_{n}_{tag}": g for n, g in zip(("x", "lower", "upper"), gradients, strict=True)}
    return ours


def check_act_dynamic(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:class:`tersor.BoundedActivation` in its dynamic stage, with the published keys."""
    ours = Values()
    for case in meta["cases"]:
        tag = case["tag"]
        x = _tensor(arrays[f"in_x_{tag}"], dtype, device).requires_grad_()
        activation = tersor.BoundedActivation(x.shape[1], case["bits"]).to(device, dtype)
        activation.load_state_dict(_state(arrays, dtype, device, suffix=f"_{tag}"))
        activation.train(case["mode"] == "train")
        output = activation(x)
        output.backward(_tensor(arrays[f"in_gout_{tag}"], dtype, device))
        parameters, norm = dict(activation.named_parameters()), activation.atten_c[1]
        without = [name for name, parameter in parameters.items() if parameter.grad is None]
        assert sorted(without) == sorted(case["params_without_grad"]), f"{tag}: no gradient for {without}"
        scale = 2 * torch.sigmoid(activation.logits)
        values = {
            "out_y": output,
            "out_scale_upper": scale[:, 0],
            "out_scale_lower": scale[:, 1],
            "grad_x": x.grad,
            "grad_alpha_upper": parameters["alpha_upper"].grad,
            "grad_alpha_lower": parameters["alpha_lower"].grad,
            "grad_gate_conv2_w": parameters["atten_c.5.weight"].grad,
            "state_bn_mean_after": norm.running_mean,
            "state_bn_var_after": norm.running_var,
        }
        ours |= {f"{name}_{tag}": value for name, value in values.items()}
    return ours


def check_weight_quant(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """:func:`tersor.weight_fake_quantize`, in every mode and for every width that the file has."""
    ours = Values()
    for name in arrays:
        found = re.fullmatch(r"out_((sym|minmax|pct)(\d*)_b(\d+)_(\d+))", name)
        if found:
            rest, mode, percentile, bits, index = found.groups()
            values = arrays[f"in_w_{index}"]
            weight = _tensor(_same_bound(values) if mode == "sym" else values, dtype, device).requires_grad_()
            output = tersor.weight_fake_quantize(weight, int(bits), WEIGHT_MODES[mode], float(percentile or 99))
            (gradient,) = torch.autograd.grad(output, weight, _tensor(arrays[f"in_gout_{index}"], dtype, device))
            ours |= {name: output, f"grad_{rest}": gradient}
    return ours


def _same_bound(weight: np.ndarray) -> np.ndarray:
    """In float64, with the largest weights so that max|w| + 1e-8 is again the float32 bound; in float32 the same.

    Beside 1.0 float32 has no room for the 1e-8; with it, no value of the file would be a tie in float64.
    """
    exact, largest = weight.astype(np.float64), np.abs(weight).max()
    bound = np.float64(largest + np.float32(1e-8))
    return np.where(np.abs(weight) == largest, np.copysign(bound - 1e-8, exact), exact)


def check_grad_rules(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """The other rules; their parameters are numbers of ``meta``, their gradients scalars or of one element."""
    ours = Values()
    gradient = _tensor(arrays["in_gout"], dtype, device)

    def run(function: Any, name: str, tag: str, parameters: Mapping[str, float], *constants: Any) -> None:
        values = [arrays["in_x"], *(np.float64(number) for number in parameters.values())]
        inputs = [_tensor(value, dtype, device).requires_grad_() for value in values]
        ours[f"out_{name}_{tag}"] = output = function(*inputs, *constants)
        gradients = torch.autograd.grad(output, inputs, gradient)
        ours[f"grad_{name}_x_{tag}"] = gradients[0]
        for parameter, of_parameter in zip(parameters, gradients[1:], strict=True):
            key = f"grad_{name}_{parameter}_{tag}"
            ours[key] = of_parameter.reshape(arrays[key].shape)

    for case in meta["cases"]:
        bits = case["bits"]
        tag, top = f"b{bits}", 2**bits - 1
        run(tersor.fake_quantize_pact, "pact", tag, {"alpha": case["pact_alpha"]}, bits)
        run(tersor.fake_quantize_lsq, "lsq_u", tag, {"s": case["lsq_u_s"]}, bits, False)
        run(tersor.fake_quantize_lsq, "lsq_s", tag, {"s": case["lsq_s_s"]}, bits, True)
        parameters = {"s": case["lsqplus_s"], "beta": case["lsqplus_beta"]}
        run(tersor.fake_quantize_lsq_plus, "lsqplus", tag, parameters, bits)
        for index, zero in enumerate(case["torch_z"]):
            for kind, factor in (("1", 1.0), ("n", (arrays["in_x"].size * top) ** -0.5)):
                parameters = {"s": case["torch_s"], "z": zero}
                run(tersor.fake_quantize_affine, "torch", f"{tag}_z{index}_g{kind}", parameters, 0, top, factor)
    return ours


def check_edsr(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Values:
    """A whole training of a small :class:`EDSR`: extremes, choice, steps in both stages, evaluation."""
    _check_published(meta.get("published_state_dicts", {}))
    plan = _Plan(meta)
    model = EDSR(
        meta["scale"], meta["n_resblocks"], meta["n_feats"], meta["bits"], res_scale=meta.get("res_scale", 1.0)
    )
    model.to(device, dtype)
    state = _state(arrays, dtype, device)
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    model.load_state_dict(counters | state)
    schedule = tersor.BoundsSchedule(model, meta["dynamic_ratio"], plan.dynamic_epoch)
    activations = [model.get_submodule(name) for name in meta["act_names"]]
    assert schedule.activations == activations, "act_names are the activations, in order"
    ours = Values()

    schedule.start_epoch(1)
    extremes = []
    for i in range(plan.batches):
        with torch.no_grad():
            ours[f"out_fp_sr_{i}"] = model(_tensor(arrays[f"in_lr_{i}"], dtype, device))[0]
        schedule.record()
        extremes.append(torch.stack([torch.cat([a.max_val, a.min_val]) for a in activations]))
    ours["out_variance"] = schedule.intensity
    ours.condition["out_variance"] = _variance_condition(torch.stack(extremes))
    schedule.start_epoch(plan.epochs[0])
    chosen = [name for name, a in zip(meta["act_names"], activations, strict=True) if a.dynamic]
    assert sorted(chosen) == sorted(meta["selected_dynamic"]), f"dynamic are {chosen}"
    ours |= _train(model, schedule, activations, plan, arrays, dtype, device)

    model.eval()
    with torch.no_grad():
        ours["out_sr_eval"] = model(_tensor(arrays["in_lr_0"], dtype, device))[0]
    final = model.state_dict()
    names = [name for name in arrays if name.startswith("state_final_")]
    ours |= {name: final[_key(name.removeprefix("state_final_"))] for name in names}
    return ours


def _variance_condition(extremes: Tensor) -> float:
    """The sum of |d variance / d x| |x|, as :func:`_error` scales it: far above 1 where batches are much alike."""
    distance = (extremes - extremes.mean(0)).abs()
    derivatives = (2 * distance * extremes.abs()).mean(0).sum(1)
    variance = distance.square().mean(0).sum(1)
    return (derivatives.max() / variance.max().clamp_min(1)).clamp_min(1).item()


CHECKS = {
    "act_static": (check_act_static, 2e-6),
    "act_dynamic": (check_act_dynamic, 2e-6),
    "weight_quant": (check_weight_quant, 2e-6),
    "grad_rules": (check_grad_rules, 2e-6),
    "edsr": (check_edsr, 6e-7),
}


class _Plan:
    """The training that the file's texts state; one that reads otherwise is an error, not passed over."""

    def __init__(self, meta: Meta) -> None:
        number = r"([\d.]+(?:e-?\d+)?)"
        (batches,) = self._find(rf"FP calibration \({number} batches\)", meta["op"])
        self.batches = int(batches)
        parts = re.findall(r"(\d+) steps? at epoch (\d+)", meta["op"])
        self.epochs = [int(epoch) for steps, epoch in parts for _ in range(int(steps))]
        pattern = rf"betas {number}/{number} eps {number}; lr {number}, bounds lr {number}; "
        pattern += rf"loss = L1 \+ {number}\*at_loss \+ reg\(epoch<(\d+)\)"
        first, second, self.eps, self.lr, self.bounds_lr, self.weight, last = self._find(pattern, meta["optimizer"])
        self.betas, self.dynamic_epoch = (first, second), int(last)
        if not self.epochs:
            raise ValueError(f"the file does not state its steps: {meta['op']!r}")

    @staticmethod
    def _find(pattern: str, text: str) -> list[float]:
        found = re.search(pattern, text)
        if not found:
            raise ValueError(f"not understood: {text!r}")
        return [float(value) for value in found.groups()]


def _train(
    model: EDSR,
    schedule: tersor.BoundsSchedule,
    activations: list[tersor.BoundedActivation],
    plan: _Plan,
    arrays: Arrays,
    dtype: torch.dtype,
    device: str,
) -> dict[str, Tensor]:
    bounds = [p for name, p in model.named_parameters() if ".alpha_" in name]
    others = [p for name, p in model.named_parameters() if ".alpha_" not in name and p.requires_grad]
    groups = [{"params": others, "lr": plan.lr}, {"params": bounds, "lr": plan.bounds_lr}]
    optimizer = torch.optim.Adam(groups, betas=plan.betas, eps=plan.eps)
    ours: dict[str, Tensor] = {}
    losses, alphas = [], []
    for i, epoch in enumerate(plan.epochs):
        if schedule.epoch != epoch:
            schedule.start_epoch(epoch)
        image, target, teacher = (_tensor(arrays[f"in_{n}_{i}"], dtype, device) for n in ("lr", "hr", "teacher_feat"))
        sr, feature = model(image)
        terms = [F.l1_loss(sr, target), plan.weight * attention_transfer(feature, teacher), schedule.regularization()]
        optimizer.zero_grad()
        sum(terms).backward()
        ours[f"out_sr_{i}"] = sr
        if any(name.startswith(f"grad_step{i}__") for name in arrays):
            learned = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            ours |= {f"grad_step{i}__{n.replace('.', '__')}": g for n, g in learned.items()}
        optimizer.step()
        losses.append(torch.stack(terms).detach())
        alphas.append(torch.stack([torch.cat([a.alpha_upper, a.alpha_lower]) for a in activations]).detach())
    return ours | {"out_losses_l1_at_reg": torch.stack(losses), "state_alphas_after_step": torch.stack(alphas)}


def _check_published(published: Mapping[str, Any]) -> None:
    """Sizes, keys and shapes of the authors' networks, where the file lists them."""
    networks = {"EDSR": EDSR, "RDN": RDN, "SRResNet": SRResNet}
    for title, content in published.items():
        found = re.match(r"(\w+)(?:-(\w))? x(\d)", title)  # as "RDN-B x4 @48x48"
        if not found or found[1] not in networks:
            raise ValueError(f"published_state_dicts: no network for {title!r}")
        config = {"config": found[2]} if found[2] else {}
        with torch.device("meta"):
            model = networks[found[1]](int(found[3]), **config)
        ours = {name: list(value.shape) for name, value in model.state_dict().items()}
        theirs = dict(content["state_dict"])
        differ = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        assert not differ, f"{title}: keys or shapes differ: {differ[:8]}"
        assert sum(p.numel() for p in model.parameters()) == content["params"], title


def _state(arrays: Arrays, dtype: torch.dtype, device: str, suffix: str = "") -> dict[str, Tensor]:
    """The ``param_`` arrays as a state dict."""
    names = [name for name in arrays if name.startswith("param_") and name.endswith(suffix)]
    keys = [_key(name.removeprefix("param_").removesuffix(suffix)) for name in names]
    return {key: _tensor(arrays[name], dtype, device) for key, name in zip(keys, names, strict=True)}


def _key(name: str) -> str:
    return name.replace("__", ".")


def _error(ours: Tensor | None, expected: np.ndarray) -> float:
    if ours is None or tuple(ours.shape) != expected.shape:
        return math.inf
    theirs = torch.from_numpy(expected.astype(np.float64))
    error = (ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    return error.item() if error.isfinite() else math.inf


def _tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    """A copy in the asked dtype, of images (uint8) too; counters (``num_batches_tracked``) keep theirs."""
    tensor = torch.from_numpy(np.array(array)).to(device)
    return tensor if tensor.dtype == torch.int64 else tensor.to(dtype)
