"""From a trained binary model to one that runs in bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

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
        activation: the modules after the norm and the residual, in order, see :class:`PackedBinaryConv2d`; one name
            stands for itself, None for none.
        before: a :class:`ChannelBias` in front of the convolution.
        next: a binary convolution that alone takes the output, where there is no residual; None otherwise.
    """

    conv: str
    norm: str
    relu: bool = False
    activation: str | tuple[str, ...] | None = None
    before: str | None = None
    next: str | None = None

    @property
    def activations(self) -> tuple[str, ...]:
        """``activation`` as a tuple."""
        return (self.activation,) if isinstance(self.activation, str) else self.activation or ()


def binary_step(
    module: nn.Module, step: BinaryStep, input: Tensor | PackedSigns, residual: Tensor | None = None
) -> Any:
    """activation(norm([relu](conv(before(input)))) + residual); in one pass once :func:`convert_` has packed it.

    Args:
        module: which the names of ``step`` are in.
        step: of the module's ``binary_steps()``.
        input: ``(N, C, H, W)``, or the bits that a packed step before this one gives.
        residual: of the output's shape; None for none.

    Returns:
        ``(N, O, H', W')``; or :class:`PackedSigns`, of a packed step with ``next``.
    """
    conv = module.get_submodule(step.conv)
    if isinstance(conv, PackedBinaryConv2d) and conv.fused:
        return conv(input, residual)
    x = conv(input if step.before is None else module.get_submodule(step.before)(input))
    x = module.get_submodule(step.norm)(F.relu(x) if step.relu else x)
    x = x if residual is None else x + residual
    for name in step.activations:
        x = module.get_submodule(name)(x)
    return x


def convert_(model: nn.Module, fuse: bool = True) -> nn.Module:
    """Replaces the binary layers of a trained model, in place, by packed ones for inference.

    These are :class:`BinaryConv2d`, :class:`ReSTEConv2d`, :class:`ReCUConv2d` and :class:`BinaryLinear`. Their weights
    take one bit each. A convolution that does not binarise its input is stored in bits and computes in float.

    Args:
        model: trained.
        fuse: let a convolution compute the norm, the residual and the activation after it as well, and give bits where
            a binary convolution alone takes its output. What belongs together is known of neighbours in a
            ``torch.nn.Sequential`` (convolution, maybe ReLU, ``BatchNorm2d``, maybe ``Hardtanh``), and of modules with
            a method ``binary_steps()`` that yields :class:`BinaryStep` tuples and whose forward pass goes through
            :func:`binary_step`. How exact that is, :class:`PackedBinaryConv2d` says. A layer that the model holds in
            several places keeps its neighbours.

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
    empty: list[tuple[nn.Module, str]] = []
    for fusion in _fusions(model) if fuse else ():
        if id(fusion.layer) not in replacements:
            replacements[id(fusion.layer)] = _packed(*layers[id(fusion.layer)], fusion.options)
            empty += fusion.places
    for name, layer in layers.values():
        if id(layer) not in replacements:
            replacements[id(layer)] = _packed(name, layer, {})
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            parent._modules[child] = replacements.get(id(module), module)
    for parent, child in empty:
        parent._modules[child] = nn.Identity()
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


class _Fusion(NamedTuple):
    """What a convolution takes in."""

    layer: Layer
    options: dict[str, Any]  # of PackedBinaryConv2d
    places: list[tuple[nn.Module, str]]  # parents and names of the modules that it does the work of


def _fusions(model: nn.Module) -> Iterator[_Fusion]:
    modules = list(model.modules())
    held = Counter(id(child) for parent in modules for child in parent._modules.values())
    for module in modules:
        if callable(getattr(module, "binary_steps", None)):
            yield from _announced(module, held)
        if type(module).forward is nn.Sequential.forward:
            yield from _in_sequence(module, held)


def _announced(module: Any, held: Counter[int]) -> Iterator[_Fusion]:
    steps: dict[str, BinaryStep] = {step.conv: step for step in module.binary_steps()}
    fused = {
        name: step
        for name, step in steps.items()
        if _takes_bits(layer := module.get_submodule(name))
        and held[id(layer)] == 1
        and _folds(module.get_submodule(step.norm))
    }
    needed = {name for step in steps.values() if step.conv not in fused for name in _names(step)}
    for name, step in fused.items():
        activations = [module.get_submodule(name) for name in step.activations]
        following = None if step.next is None else module.get_submodule(step.next)
        shifted = step.next in steps and steps[step.next].before is not None
        options = {
            "norm": module.get_submodule(step.norm),
            "relu": step.relu,
            "activation": nn.Sequential(*activations) if activations else None,
            "before": None if step.before is None else module.get_submodule(step.before).bias,
            "signs_for": following.groups if _takes_bits(following) and not shifted else None,
        }
        places = [name.rpartition(".") for name in _names(step) if name not in needed]
        yield _Fusion(
            module.get_submodule(name),
            options,
            [(module.get_submodule(parent), child) for parent, _, child in places],
        )


def _names(step: BinaryStep) -> list[str]:
    """Of the modules that a packed convolution does the work of."""
    return [step.norm, *step.activations, *([] if step.before is None else [step.before])]


def _in_sequence(module: nn.Module, held: Counter[int]) -> Iterator[_Fusion]:
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    for place, (_, layer) in enumerate(children):
        if not _takes_bits(layer) or held[id(layer)] != 1:
            continue
        rest = children[place + 1 :]
        taken = [rest.pop(0)] if rest and isinstance(rest[0][1], nn.ReLU) else []
        relu = bool(taken)
        if not rest or not _folds(norm := rest[0][1]):
            continue
        taken.append(rest.pop(0))
        activation = rest[0][1] if rest and is_hardtanh(rest[0][1]) else None
        if activation is not None:
            taken.append(rest.pop(0))
        following = rest[0][1] if rest else None
        signs_for = following.groups if _takes_bits(following) else None
        options = {"norm": norm, "relu": relu, "activation": activation, "signs_for": signs_for}
        yield _Fusion(layer, options, [(module, name) for name, _ in taken])


def _folds(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _takes_bits(layer: Any) -> TypeGuard[BinaryConv2d | ReCUConv2d]:
    return isinstance(layer, (BinaryConv2d, ReCUConv2d)) and layer.takes_signs
