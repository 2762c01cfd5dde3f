"""Parity with vector files of the system ``uformer``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parity_pslt import Arrays, Meta, Result, as_row, as_windows, compare, on_tokens, tensor, tolerance
from torch import Tensor, nn

import tersor
from tersor.models.uformer import LeWinAttention, LeWinBlock, Uformer

Check = tuple[nn.Module, Callable[..., Tensor]]  # a module, and how it is run on the file's input


def check(arrays: Arrays, meta: Meta, dtype: torch.dtype, device: str) -> list[Result]:
    """Runs the file's layer, block or model forward and backward and measures every ``out_`` and ``grad_`` array.

    Raises:
        ValueError: the file is of an operator that is not known here.
        AssertionError: a gradient that the file states by its sum and norm has others.
    """
    if meta["op"] not in CHECKS:
        raise ValueError(f"no check for op {meta['op']!r}, known are {', '.join(CHECKS)}")
    module, run = CHECKS[meta["op"]](meta["hyper"], None if "in_mask" not in arrays else _mask(arrays, device))
    module.to(device, dtype)
    names = [name for name in arrays if name.startswith("param_")]
    module.load_state_dict({name.removeprefix("param_"): tensor(arrays[name], dtype, device) for name in names})
    x = tensor(arrays["in_x"], dtype, device).requires_grad_()
    output = run(module, x)
    output.backward(tensor(arrays["in_gout"], dtype, device))
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
    ours = {"out_y": output} | {f"grad_{name}": gradient for name, gradient in gradients.items()}
    check_sums(arrays, meta, dtype, ours)
    return compare(arrays, meta, dtype, ours)


def check_sums(arrays: Arrays, meta: Meta, dtype: torch.dtype, ours: dict[str, Any]) -> None:
    """Gradients that are too large to be stored, by their sum and their L2 norm."""
    for name, stated in meta.get("grad_sum_and_l2norm_of_large_tensors_not_stored", {}).items():
        assert name not in arrays
        gradient = ours[name].double()
        for value, exact in zip((gradient.sum().item(), gradient.norm().item()), stated, strict=True):
            allowed = max(tolerance(name, None, meta, dtype), 1e-6)
            assert abs(value - exact) / max(1, abs(exact)) <= allowed, f"{name}: {value} is not {exact}"


def _mask(arrays: Arrays, device: str) -> Tensor:
    return torch.from_numpy(arrays["in_mask"]).to(device)


def window_attention(hyper: Meta, mask: Tensor | None) -> Check:
    """The windows of an image side by side are a map of one row of windows, which needs no shift."""
    window, pairs = hyper["window"], None if mask is None else mask[None]
    attention = LeWinAttention(hyper["dim"], hyper["num_heads"], window, 0, hyper["qkv_bias"])
    return attention, lambda module, x: as_windows(module(as_row(x, hyper["nW"], window), pairs), window)


def leff(hyper: Meta, mask: Tensor | None) -> Check:
    return tersor.LeFF(hyper["dim"], hyper["hidden"]), on_tokens((hyper["H"], hyper["W"]))


def lewin_block(hyper: Meta, mask: Tensor | None) -> Check:
    block = LeWinBlock(
        hyper["dim"],
        hyper["num_heads"],
        hyper["built_for"],
        hyper["win_size_arg"],
        hyper["shift_arg"],
        hyper["mlp_ratio"],
        drop_path=hyper["drop_path"],
        modulator=hyper["modulator"],
    )
    assert block.attn.window_size == [hyper["effective_window"]] * 2
    assert block.attn.shift_size == [hyper["effective_shift"]] * 2
    grid = (hyper["run_at"],) * 2
    return block, lambda module, x: module(x.unflatten(1, grid), mask).flatten(1, 2)


def model(hyper: Meta, mask: Tensor | None) -> Check:
    options = dict(hyper)
    fixed = {"token_projection": "linear", "token_mlp": "leff"}
    given = {name: options.pop(name) for name in fixed}
    assert given == fixed, f"not described in the spec: {given}"
    for described in ("in_chans", "run_at"):  # the arrays show them
        options.pop(described)
    options |= {"drop_path": options.pop("drop_path_rate"), "shift": options.pop("shift_flag")}
    return Uformer(**options), lambda module, x: module(x, mask)


CHECKS: dict[str, Callable[[Meta, Tensor | None], Check]] = {
    "window_attention": window_attention,
    "leff": leff,
    "lewin_block": lewin_block,
    "uformer_model": model,
}
