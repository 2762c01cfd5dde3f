"""Parity with vector files of the system ``pslt``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tersor
from tersor.models.pslt import PSLT, Mv2Se

Arrays = Mapping[str, np.ndarray]
Meta = Mapping[str, Any]
Result = tuple[str, float, float]  # name of the array, error, tolerance

# What a constant added before a batch norm or to all keys does: nothing. Their noise is that of the sums they end.
_ZERO_GRADIENTS = ("mlp.conv.5.bias", "mlp.conv.6.bias", "conv.5.bias", "conv.6.bias")
_NOISE = 2e-4  # spec: 1e-5 to 1e-4 in float32


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs the file's layer, block or model forward and backward and measures every ``out_`` and ``grad_`` array.

    Raises:
        ValueError: the file is of an operator that is not known here.
    """
    if meta["op"] not in CHECKS:
        raise ValueError(f"no check for op {meta['op']!r}, known are {', '.join(CHECKS)}")
    module, run = CHECKS[meta["op"]](arrays, meta, dtype, device)
    return check_module(module, run, arrays, meta, dtype, device)


Check = tuple[nn.Module, Callable[..., Tensor]]  # a module, and how it is run on the file's inputs


def attention_with_values(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Check:
    """The windows of an image side by side are a map of one row of windows, which needs no shift."""
    hyper = meta["hyper"]
    attention = tersor.LadderAttention(hyper["dim"], hyper["num_heads"], hyper["window"], given_values=True)
    mask = torch.from_numpy(arrays["in_mask"]).to(device)

    def run(module: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        output = module(
            as_row(x, mask.shape[0], hyper["window"]), as_row(v, mask.shape[0], hyper["window"]), mask[None]
        )
        return as_windows(output, hyper["window"])

    return attention, run


def as_row(windows: Tensor, count: int, window: list[int]) -> Tensor:
    """``(B * count, h * w, C)`` to ``(B, h, count * w, C)``."""
    tiles = windows.unflatten(1, tuple(window)).unflatten(0, (-1, count))
    return tiles.transpose(1, 2).flatten(2, 3)


def as_windows(row: Tensor, window: list[int]) -> Tensor:
    return row.unflatten(2, (-1, window[1])).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def ladder_block(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Check:
    hyper = meta["hyper"]
    grid = (hyper["H"], hyper["W"])
    block = tersor.LadderBlock(
        hyper["dim"],
        hyper["num_heads"],
        grid,
        hyper["window"],
        hyper["branches"],
        hyper["mlp_ratio"],
        hyper["reduce_scale"],
    )
    directions = [1 if d else -1 for d in hyper["directions"]]
    expected = [[s * d, s * d] for s, d in zip(hyper["shifts"], directions, strict=True)]
    assert [branch.attn.shift_size for branch in block.blocks] == expected
    return block, on_tokens(grid)


def mlp_light(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Check:
    hyper = meta["hyper"]
    return tersor.MlpLight(hyper["dim"], hyper["hidden"]), on_tokens((hyper["H"], hyper["W"]))


def on_tokens(grid: tuple[int, int]) -> Callable[..., Tensor]:
    return lambda module, x: module(x.unflatten(1, grid)).flatten(1, 2)


def mv2_se(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Check:
    hyper = meta["hyper"]
    block = Mv2Se(hyper["inp"], hyper["oup"], hyper["stride"], hyper["expansion"])
    return block, lambda module, x: module(x)


def model(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> Check:
    hyper = dict(meta["hyper"])
    fixed = {"patch_norm": False, "pointwise": True, "multi_shift": True, "has_se": True, "input_v": True}
    given = {name: hyper.pop(name) for name in fixed}
    assert given == fixed, f"not described in the spec: {given}"
    assert len(hyper.pop("window_size")) == 3, "the list only sets the number of branches"
    return PSLT(drop_path=hyper.pop("drop_path_rate"), **hyper), lambda module, x: module(x)


CHECKS: dict[str, Callable[..., Check]] = {
    "ladder_window_attention_v": attention_with_values,
    "ladder_block": ladder_block,
    "mlp_light": mlp_light,
    "mv2_se": mv2_se,
    "pslt_model": model,
}


def check_module(
    module: nn.Module, run: Callable[..., Tensor], arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str
) -> list[Result]:
    """A training-mode pass with gradients, the buffers after it, and a pass in eval mode with the stored buffers."""
    module.to(device, dtype)
    state = {n.removeprefix("param_"): tensor(a, dtype, device) for n, a in arrays.items() if n.startswith("param_")}
    counters = {n: v for n, v in module.state_dict().items() if n.endswith("num_batches_tracked")}
    module.load_state_dict(counters | state)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    inputs = {name: tensor(arrays[f"in_{name}"], dtype, device) for name in ("x", "v") if f"in_{name}" in arrays}
    output = run(module.train(), *(value.requires_grad_() for value in inputs.values()))
    output.backward(tensor(arrays["in_gout"], dtype, device))
    ours = {"out_y": output} | {f"out_buf_{name}": value.clone() for name, value in module.named_buffers()}
    module.load_state_dict(before)
    with torch.no_grad():
        ours["out_y_eval"] = run(module.eval(), *inputs.values())
    ours |= {f"grad_{name}": value.grad for name, value in inputs.items()}
    ours |= {f"grad_{name}": parameter.grad for name, parameter in module.named_parameters()}
    return compare(arrays, meta, dtype, ours)


def compare(arrays: Arrays, meta: Meta, dtype: torch.dtype, ours: Mapping[str, Tensor | None]) -> list[Result]:
    """Every expected array against ours by the file's measure; one that we do not have has an infinite error."""
    results = []
    for name, expected in arrays.items():
        if name.startswith(("out_", "grad_")):
            results.append((name, error(ours.get(name), expected), tolerance(name, expected, meta, dtype)))
    return results


def tolerance(name: str, expected: np.ndarray | None, meta: Meta, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 1e-6
    if dtype != torch.float32:
        raise ValueError(f"parity is stated for float32 and float64, not for {dtype}")
    rerun = meta["float32_rerun_error"]
    if name.startswith("out_"):
        return max(1e-5, 10 * rerun["out_y"])
    if name.endswith(_ZERO_GRADIENTS) and expected is not None and np.abs(expected).max() < 1e-8:
        return _NOISE
    if rerun["worst_grad_name"].endswith(_ZERO_GRADIENTS):  # then its figure is noise and says nothing of the others
        return 5e-5
    return max(1e-5, 10 * rerun["worst_grad"])


def error(ours: Tensor | None, expected: np.ndarray) -> float:
    if ours is None or tuple(ours.shape) != expected.shape:
        return math.inf
    theirs = torch.from_numpy(expected.astype(np.float64))
    distance = (ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    return distance.item() if distance.isfinite() else math.inf


def tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    """A copy in the asked dtype; counters (``num_batches_tracked``) keep theirs."""
    copied = torch.from_numpy(np.array(array)).to(device)
    return copied.to(dtype) if copied.is_floating_point() else copied
