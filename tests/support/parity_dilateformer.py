"""Parity with vector files of the system ``dilateformer``: one check per ``meta["op"]``, sizes all from the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tersor
from tersor.models import DilateFormer
from tersor.models.layers import AttentionBlock

Result = tuple[str, float, float]  # name of the array, error, tolerance

# Options that only describe the file: the model takes any size of image, and the arrays show the heads' size.
_DESCRIPTIVE = {"img_size", "head_dim"}
_ZERO_RATES = ("attn_drop", "proj_drop", "drop", "drop_rate", "attn_drop_rate")


def check(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str) -> list[Result]:
    """Runs the file's operator, module or model forward and backward and measures every ``out_`` and ``grad_`` array.

    Raises:
        ValueError: the file is of an operator or has an option that is not known here.
    """
    if meta["op"] not in CHECKS:
        raise ValueError(f"no check for op {meta['op']!r}, known are {', '.join(CHECKS)}")
    return CHECKS[meta["op"]](arrays, meta, dtype, device)


def check_msda_core(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Result]:
    """Query, key and value ``(B, C, H, W)``, output ``(B, H, W, C)``."""
    options = _Options(meta)
    kernel_size, dilation = options.take("kernel_size", 3), options.take("dilation", [1, 2, 3])
    scale, heads = options.take("scale", None), options.take("num_heads")
    options.finish()
    inputs = {name: _tensor(arrays[f"in_{name}"], dtype, device).requires_grad_() for name in "qkv"}
    views = [x.permute(0, 2, 3, 1).unflatten(3, (heads, -1)) for x in inputs.values()]
    output = tersor.dilated_attention(*views, kernel_size, dilation, scale).flatten(3)
    gradients = torch.autograd.grad(output, list(inputs.values()), _tensor(arrays["in_gout"], dtype, device))
    return _compare(arrays, meta, dtype, {"y": output}, dict(zip(inputs, gradients, strict=True)))


def check_msda_module(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Result]:
    options = _Options(meta)
    attention = _dilated(options, options.take("dim"))
    options.finish()
    return _check_module(attention, arrays, meta, dtype, device)


def check_dilate_block(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Result]:
    options = _Options(meta)
    dim = options.take("dim")
    block = AttentionBlock(
        dim,
        _dilated(options, dim),
        mlp_ratio=options.take("mlp_ratio", 4),
        drop_path=options.take("drop_path", 0.0),
        position=options.take("cpe", True),
        eps=options.take("ln_eps", 1e-6),
    )
    options.finish()
    return _check_module(block, arrays, meta, dtype, device)


def check_dilateformer_model(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Result]:
    options = _Options(meta)
    renamed = {"cpe_per_satge": "cpe_per_stage", "scale": "qk_scale", "drop_path_rate": "drop_path"}
    model = DilateFormer(**{renamed.get(name, name): value for name, value in options.left.items()})
    return _check_module(model, arrays, meta, dtype, device)


CHECKS = {
    "msda_core": check_msda_core,
    "msda_module": check_msda_module,
    "dilate_block": check_dilate_block,
    "dilateformer_model": check_dilateformer_model,
}


class _Options:
    """The file's hyper-parameters; one that nobody asked for is an error, so that none is passed over in silence."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.op = meta["op"]
        self.left = {k: v for k, v in meta["hyper"].items() if k not in _DESCRIPTIVE}
        for name in _ZERO_RATES:
            if self.left.pop(name, 0):
                raise ValueError(f"{self.op}: {name} must be 0 in a vector, got {meta['hyper'][name]}")

    def take(self, name: str, *default: Any) -> Any:
        if name not in self.left and not default:
            raise ValueError(f"{self.op}: the file does not state {name}")
        return self.left.pop(name, *default)

    def finish(self) -> None:
        if self.left:
            raise ValueError(f"{self.op}: options not known here: {self.left}")


def _dilated(options: _Options, dim: int) -> nn.Module:
    scale = options.take("scale", None)
    return tersor.DilatedAttention(
        dim,
        options.take("num_heads"),
        qkv_bias=options.take("qkv_bias", True),
        qk_scale=options.take("qk_scale", scale),
        kernel_size=options.take("kernel_size", 3),
        dilation=options.take("dilation", [1, 2, 3]),
    )


def _check_module(
    module: nn.Module, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], dtype: torch.dtype, device: str
) -> list[Result]:
    """A training-mode pass with gradients, the buffers after it, and a pass in eval mode with the stored buffers."""
    state = {
        name.removeprefix("param_"): _tensor(a, dtype, device)
        for name, a in arrays.items()
        if name.startswith("param_")
    }
    module.to(device, dtype).load_state_dict(state, strict=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = _tensor(arrays["in_x"], dtype, device).requires_grad_()
    output = module.train()(x)
    output.backward(_tensor(arrays["in_gout"], dtype, device))
    outputs = {"y": output} | {f"buf_{name}": value.clone() for name, value in module.named_buffers()}
    module.load_state_dict(before)
    with torch.no_grad():
        outputs["y_eval"] = module.eval()(x)
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
    return _compare(arrays, meta, dtype, outputs, gradients)


def _compare(
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    dtype: torch.dtype,
    outputs: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
) -> list[Result]:
    """Every expected array against ours by the file's measure; one that we do not have has an infinite error."""
    results = []
    for name, expected in arrays.items():
        for prefix, ours, rerun in (("out_", outputs, "out_y"), ("grad_", gradients, "worst_grad")):
            if name.startswith(prefix):
                error = _error(ours.get(name.removeprefix(prefix)), expected)
                results.append((name, error, _tolerance(meta, dtype, rerun)))
    if not results:
        raise ValueError(f"{meta['op']}: the file has no out_ or grad_ array")
    return results


def _tolerance(meta: Mapping[str, Any], dtype: torch.dtype, rerun: str) -> float:
    if dtype == torch.float64:
        return 1e-6
    if dtype == torch.float32:
        return max(1e-5, 10 * meta["float32_rerun_error"][rerun])
    raise ValueError(f"parity is stated for float32 and float64, not for {dtype}")


def _error(ours: Tensor | None, expected: np.ndarray) -> float:
    if ours is None or tuple(ours.shape) != expected.shape:
        return math.inf
    theirs = torch.from_numpy(expected.astype(np.float64))
    error = (ours.detach().double().cpu() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
    return error.item() if error.isfinite() else math.inf


def _tensor(array: np.ndarray, dtype: torch.dtype, device: str) -> Tensor:
    """A copy in the asked dtype; counters (``num_batches_tracked``) keep theirs."""
    tensor = torch.from_numpy(np.array(array)).to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
