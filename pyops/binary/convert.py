"""From a trained binary model to one that runs in bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary.layers import BinaryConv2d, BinaryLinear, ReCUConv2d
from tersor.binary.pack_signs import PackedSigns
from tersor.binary.packed_layers import PackedBinaryConv2d, PackedBinaryLinear, PackedWeightConv2d, is_hardtanh

Layer = BinaryConv2d | ReCUConv2d | BinaryLinear


class BinaryStep(NamedTuple):
    """A binary convolution and what follows it, for :func:`binary_step` and :func:`convert_`; by names in the module.

    Attributes:
        conv: the convolution.
        norm: the norm that alone sees its output.
        relu: a ReLU comes between the two.
        activation: a module after the norm and the residual, see :class:`PackedBinaryConv2d`; None for none.
        before: a parameter that is added to the input.
        next: a binary convolution that alone takes the output, where there is no residual; None otherwise.
    """

    conv: str
    norm: str
    relu: bool = False
    activation: str | None = None
    before: str | None = None
    next: str | None = None


def binary_step(
    module: nn.Module, step: BinaryStep, input: Tensor | PackedSigns, residual: Tensor | None = None
) -> Any:
    """activation(norm([relu](conv(input + before))) + residual); in one pass once :func:`convert_` has packed it."""
    conv = module.get_submodule(step.conv)
    if isinstance(conv, PackedBinaryConv2d) and conv.fused:
        return conv(input, residual)
    x = conv(input if step.before is None else input + getattr(module, step.before))
    x = module.get_submodule(step.norm)(F.relu(x) if step.relu else x)
    x = x if residual is None else x + residual
    return x if step.activation is None else module.get_submodule(step.activation)(x)


def convert_(model: nn.Module, fuse: bool = True) -> nn.Module:
    """Replaces the binary layers of a trained model, in place, by packed ones for inference.

    These are :class:`BinaryConv2d`, :class:`ReSTEConv2d`, :class:`ReCUConv2d` and :class:`BinaryLinear`. Their weights
    take one bit each. A layer that does not binarise its input is stored in bits and computes in float.

    Args:
        model: trained.
        fuse: let a convolution compute the norm, the residual and the activation after it as well, and give bits where
            a binary convolution alone takes its output. What belongs together is known of neighbours in a
            ``torch.nn.Sequential`` (convolution, maybe ReLU, ``BatchNorm2d``, maybe ``Hardtanh``), and of modules with
            a method ``binary_steps()`` that yields :class:`BinaryStep` tuples and whose forward pass goes through
            :func:`binary_step`. The output then differs from that of ``model.eval()`` by float32 roundings, except that
            bits are the same; see :class:`PackedBinaryConv2d`.

    Returns:
        ``model``; or its replacement, if it is a binary layer itself. To load a converted model's state dict, convert
        a model of the same architecture in the same way and load it there.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no binary layer, or one cannot be packed; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_: model must be a torch.nn.Module, got {type(model).__name__}")
    layers = {id(m): (name, m) for name, m in model.named_modules() if isinstance(m, Layer)}
    if not layers:
        raise ValueError(f"convert_: model must hold a binary layer, got {type(model).__name__} without one")
    replacements: dict[int, nn.Module] = {}
    for options, gone in list(_steps(model)) if fuse else []:
        layer = options.pop("layer")
        if id(layer) in layers and id(layer) not in replacements and layer.takes_signs:
            replacements[id(layer)] = _packed(layers[id(layer)][0], layer, options)
            replacements |= {id(module): nn.Identity() for module in gone}
    for name, layer in layers.values():
        if id(layer) not in replacements:
            replacements[id(layer)] = _packed(name, layer, {})
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if id(module) in replacements:
                parent._modules[child] = replacements[id(module)]
    return replacements.get(id(model), model)


def _packed(name: str, layer: Layer, options: dict[str, Any]) -> nn.Module:
    try:
        if isinstance(layer, BinaryLinear):
            return PackedBinaryLinear(layer)
        if not layer.takes_signs and isinstance(layer, BinaryConv2d):
            return PackedWeightConv2d(layer)
        return PackedBinaryConv2d(layer, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"convert_: {name or type(layer).__name__}: {error}") from error


def _steps(model: nn.Module) -> Iterator[tuple[dict[str, Any], list[nn.Module]]]:
    """The options of each convolution that takes in what follows, and the modules that this makes superfluous."""
    for module in model.modules():
        if callable(steps := getattr(module, "binary_steps", None)):
            for step in steps():
                yield from _announced(module, step)
        if type(module).forward is nn.Sequential.forward:
            yield from _in_sequence(list(module.children()))


def _announced(module: nn.Module, step: BinaryStep) -> Iterator[tuple[dict[str, Any], list[nn.Module]]]:
    norm = module.get_submodule(step.norm)
    if not _folds(norm):
        return
    activation = None if step.activation is None else module.get_submodule(step.activation)
    following = None if step.next is None else module.get_submodule(step.next)
    options = {
        "layer": module.get_submodule(step.conv),
        "norm": norm,
        "relu": step.relu,
        "activation": activation,
        "before": None if step.before is None else getattr(module, step.before),
        "signs_for": following.groups if _takes_bits(following) else None,
    }
    yield options, [norm] if activation is None else [norm, activation]


def _in_sequence(children: list[nn.Module]) -> Iterator[tuple[dict[str, Any], list[nn.Module]]]:
    for place, layer in enumerate(children):
        if not isinstance(layer, (BinaryConv2d, ReCUConv2d)):
            continue
        rest = children[place + 1 :]
        relu = rest.pop(0) if rest and isinstance(rest[0], nn.ReLU) else None
        if not rest or not _folds(norm := rest.pop(0)):
            continue
        activation = rest.pop(0) if rest and is_hardtanh(rest[0]) else None
        following = rest[0] if rest else None
        options = {
            "layer": layer,
            "norm": norm,
            "relu": relu is not None,
            "activation": activation,
            "signs_for": following.groups if _takes_bits(following) else None,
        }
        yield options, [m for m in (relu, norm, activation) if m is not None]


def _folds(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _takes_bits(layer: Any) -> bool:
    return isinstance(layer, (BinaryConv2d, ReCUConv2d)) and layer.takes_signs
