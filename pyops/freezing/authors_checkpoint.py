"""State dicts with the published code's keys, both ways."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.freezing.layers import LtsConv2d, LtsLinear
from tersor.freezing.mask import pack_mask, unpack_mask

_BOUNDS = {
    "uW": "quantize_weight.upper",
    "lW": "quantize_weight.lower",
    "uA": "quantize_input.upper",
    "lA": "quantize_input.lower",
}
_OWN = (*_BOUNDS, "init", "prev_Qweight", "distance", "unchange_step", "saved_weight")


def authors_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the published keys, in their order.

    What these do not hold is left out: the step. ``unchange_step`` is 1 for a frozen weight where the model does not
    keep the step at which it froze (``frozen_step=True``); a reader of the published code asks only whether it is 0.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (LtsConv2d, LtsLinear))}
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        owner = _owner(key, layers)
        if owner is None:
            result[key] = value
            continue
        name, rest = owner
        if rest not in ("weight", "bias"):
            continue
        result[key] = value
        if rest == "bias" or layers[name].bias is None:
            result.update(_authors_entries(name, layers[name]))
    return result


def load_authors_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Reads a state dict with the published keys, quantiser and freezing state included.

    The step is not part of it: as in the published code, the warm-up is counted anew.

    Raises:
        RuntimeError: keys are missing, unexpected or of another shape.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (LtsConv2d, LtsLinear))}
    wanted = authors_state_dict(model)
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise RuntimeError(f"load_authors_state_dict: missing keys {missing[:5]}, unexpected keys {unexpected[:5]}")
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items() if state[k].shape != v.shape
    ]
    if wrong:
        raise RuntimeError(f"load_authors_state_dict: shapes differ: {'; '.join(wrong[:5])}")
    own = {key: value for key, value in state.items() if _owner(key, layers) is None}
    for name, layer in layers.items():
        own |= _own_entries(f"{name}." if name else "", layer, state)
    model.load_state_dict(own)


def _owner(key: str, layers: Mapping[str, LtsConv2d | LtsLinear]) -> tuple[str, str] | None:
    """The quantised layer that a key belongs to, and the rest of the key."""
    for cut in [i for i, c in enumerate(key) if c == "."][::-1]:
        if key[:cut] in layers:
            return key[:cut], key[cut + 1 :]
    return ("", key) if "" in layers else None


def _authors_entries(name: str, layer: LtsConv2d | LtsLinear) -> dict[str, Tensor]:
    prefix = f"{name}." if name else ""
    weight = layer.quantize_weight
    shape = layer.weight.shape
    unpacked = unpack_mask(weight.frozen, shape)
    step = unpacked if weight.frozen_step is None else weight.frozen_step
    saved = layer.weight.detach() if weight.saved is None else weight.saved
    values = {
        "uW": weight.upper.detach(),
        "lW": weight.lower.detach(),
        "uA": layer.quantize_input.upper.detach(),
        "lA": layer.quantize_input.lower.detach(),
        "init": (~weight.initialized).to(weight.distance.dtype).reshape(1),
        "prev_Qweight": weight.code.to(weight.distance.dtype) / (2**weight.bits - 1),
        "distance": weight.distance,
        "unchange_step": step.to(weight.distance.dtype),
        "saved_weight": saved,
    }
    return {prefix + key: values[key] for key in _OWN}


def _own_entries(prefix: str, layer: LtsConv2d | LtsLinear, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = layer.quantize_weight
    step = state[f"{prefix}unchange_step"]
    frozen = step != 0
    saved = state[f"{prefix}saved_weight"]
    own = {f"{prefix}{ours}": state[prefix + theirs] for theirs, ours in _BOUNDS.items()}
    own[f"{prefix}weight"] = state[f"{prefix}weight"]
    if layer.bias is not None:
        own[f"{prefix}bias"] = state[f"{prefix}bias"]
    own[f"{prefix}quantize_weight.distance"] = state[f"{prefix}distance"]
    codes = state[f"{prefix}prev_Qweight"] * (2**weight.bits - 1)
    own[f"{prefix}quantize_weight.code"] = codes.round().to(torch.uint8)
    own[f"{prefix}quantize_weight.frozen"] = pack_mask(frozen)
    own[f"{prefix}quantize_weight.counters"] = torch.stack([torch.tensor(-1), frozen.sum().cpu()])
    own[f"{prefix}quantize_weight.settings"] = torch.zeros_like(weight.settings)
    for module in ("quantize_weight", "quantize_input"):
        own[f"{prefix}{module}.initialized"] = (state[f"{prefix}init"] == 0).reshape(())
    if weight.saved is None:  # the optimiser keeps them then: the frozen weights' own values
        own[f"{prefix}weight"] = torch.where(frozen, saved, state[f"{prefix}weight"])
    else:
        own[f"{prefix}quantize_weight.saved"] = saved
    if weight.frozen_step is not None:
        own[f"{prefix}quantize_weight.frozen_step"] = step.to(torch.int32)
    return own
