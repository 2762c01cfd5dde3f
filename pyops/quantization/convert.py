"""From a trained, fake-quantised model to one with packed weights and whole-number arithmetic."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from tersor.quantization.bounded_activation import BoundedActivation
from tersor.quantization.layers import QuantizedConv2d, QuantizedLinear
from tersor.quantization.packed_layers import PackedActivation, PackedConv2d, PackedLinear, codes_of

Layer = QuantizedConv2d | QuantizedLinear


def convert_(model: nn.Module) -> nn.Module:
    """Replaces the quantised layers of a trained model, in place, by packed ones for inference.

    A layer is packed together with the :class:`BoundedActivation` in front of it, and then takes the unquantised
    input, where that activation is

    - the layer's own (its ``activation`` argument);
    - announced by a module's method ``quantized_pairs()``, which yields the names, relative to that module, of an
      activation and of the layer that sees nothing else, and whether a ReLU comes before; the module's forward pass
      gives the layer the unquantised input if it has a true attribute ``quantizes_input``, as ``layer(input,
      relu=...)``. Where the forward pass uses the activation besides, it finds one there that quantises as before;
    - the module before the layer in a ``torch.nn.Sequential``.

    Any other quantised layer is stored packed and computes in float. Other modules stay. The output is that of
    ``model.eval()`` within the bounds that :class:`PackedConv2d` and :class:`PackedLinear` state, layer by layer; a
    value that this moves across a rounding threshold of a later layer takes the neighbouring level there.

    To load a converted model's state dict, convert a model of the same architecture and load it there.

    Args:
        model: trained, with its stage past recording.

    Returns:
        ``model``; or its replacement, if it is a quantised layer itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no quantised layer, or one cannot be converted (it does not quantise, its stage is
            ``"float"`` or ``"record"``, its activation is of another kind or claimed twice, its weight is constant,
            its padding unequal); the message names it, and nothing has been changed.

    Warns:
        RuntimeWarning: with 8 bits, a weight or the bounds of an input reach the extra top level of the ``"ddtb"``
            rule, which has no code of 8 bits; these values take the level below.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Layer)}
    if not layers:
        raise ValueError(f"convert_: model must hold a quantised layer, got {type(model).__name__} without one")
    claims, pairs, places = _claims(model, layers)
    packed = {}
    for name, layer in layers.items():  # a comprehension would be a frame of its own to the warnings in some Pythons
        packed[id(layer)] = _pack(name or type(layer).__name__, layer, claims.get(id(layer)))
    replacements: dict[int, nn.Module] = {**packed}
    for activation, its_layer in pairs:
        replacements[id(activation)] = PackedActivation(packed[id(its_layer)])
    for parent, child in places:
        parent._modules[child] = nn.Identity()
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if id(module) in replacements:
                parent._modules[child] = replacements[id(module)]
    return replacements.get(id(model), model)


def _claims(
    model: nn.Module, layers: dict[str, Layer]
) -> tuple[dict[int, nn.Module], list[tuple[nn.Module, nn.Module]], list[tuple[nn.Module, str]]]:
    """The activation of each layer that has one, by the layer's id; those announced in pairs; and the places in a
    Sequential of those that vanish."""
    claims = {id(layer): layer.activation for layer in layers.values() if isinstance(layer.activation, nn.Module)}
    names = {id(layer): name for name, layer in layers.items()}
    pairs = []
    for activation, layer in _announced(model):
        if id(layer) not in names:
            raise ValueError(f"convert_: quantized_pairs must name a quantised layer, got {type(layer).__name__}")
        if claims.setdefault(id(layer), activation) is not activation:
            raise ValueError(f"convert_: {names[id(layer)]} must have one activation, got two")
        pairs.append((activation, layer))
    places: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if type(module).forward is not nn.Sequential.forward:
            continue
        for (place, before), (_, after) in itertools.pairwise(module._modules.items()):
            if isinstance(before, BoundedActivation) and isinstance(after, Layer) and id(after) not in claims:
                claims[id(after)] = before
                places.append((module, place))
    return claims, pairs, places


def _announced(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for module in model.modules():
        pairs = getattr(module, "quantized_pairs", None)
        if callable(pairs):
            for activation, layer, _ in pairs():
                yield module.get_submodule(activation), module.get_submodule(layer)


def _pack(name: str, layer: Layer, activation: nn.Module | None) -> PackedConv2d | PackedLinear:
    where = f"convert_: {name}"
    _check_quantizes(f"{where}:", layer)
    if activation is not None:
        if not isinstance(activation, BoundedActivation):
            raise ValueError(f"{where}: its activation must be a BoundedActivation, got {type(activation).__name__}")
        _check_quantizes(f"{where}: its activation", activation)
    try:
        weight = codes_of(layer)
        packed: PackedConv2d | PackedLinear
        if isinstance(layer, QuantizedConv2d):
            packed = PackedConv2d(layer, activation, weight)
        else:
            packed = PackedLinear(layer, activation, weight)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    below = "is of 2**8 + 1 levels, one more than fit; the top one takes the level below"
    if weight.clamped:
        warnings.warn(f"{where}: the weight {below}", RuntimeWarning, stacklevel=3)
    if packed.quantizes_input and packed.activation is None and _top_code(packed) > 255:
        warnings.warn(f"{where}: its activation {below}", RuntimeWarning, stacklevel=3)
    return packed


def _check_quantizes(what: str, module: Layer | BoundedActivation) -> None:
    if module.bits == 32:
        raise ValueError(f"{what} must quantise to 2 to 8 bits, got bits 32")
    if module.stage not in ("static", "dynamic"):
        raise ValueError(f"{what} must be in stage static or dynamic, got {module.stage!r}")


def _top_code(layer: PackedConv2d | PackedLinear) -> float:
    """The code of the input's upper bound, from 0 on: 2**bits - 1 or one more."""
    scale = torch.full_like(layer.upper, 2**layer.activation_bits - 1) / (layer.upper - layer.lower)
    half = 2 ** (layer.activation_bits - 1)
    zero = torch.round(scale * layer.lower) + half
    return (torch.round(scale * layer.upper - zero) + half).item()
