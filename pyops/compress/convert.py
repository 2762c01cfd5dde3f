"""From a model that was trained compressed to one that is stored and runs so."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor._folding import norm_affine
from tersor.binary.convert import convert_ as convert_binary_
from tersor.binary.layers import BinaryLayer
from tersor.compress.layers import CompressedConv2d, CompressedLayer, CompressedLinear
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.compress.prepare import Compression, compression_of
from tersor.sparsity.packed_layers import PackedNMConv2d, PackedNMLinear, norm_pairs


class Fold(NamedTuple):
    """What goes into a convolution, by names.

    Attributes:
        norm: its norm.
        relu: the ReLU after that: the name of a module, ``""`` for one in a forward pass that leaves it to the
            convolution, None for none.
        residual: whether the convolution takes a residual in front of a ReLU.
    """

    norm: str
    relu: str | None = None
    residual: bool = False


Folded = dict[str, Fold]  # by the convolution's name


def convert_(model: nn.Module, fold_norms: bool = True) -> nn.Module:
    """Replaces the layers of a prepared and trained model, in place, by packed ones for inference.

    :class:`CompressedConv2d` and :class:`CompressedLinear` become layers that hold packed codes, and of sparse weights
    only the kept ones; with quantised inputs they compute in whole numbers. Layers that are sparse only become
    :class:`tersor.sparsity.PackedNMConv2d` and ``PackedNMLinear``, binary ones what
    :func:`tersor.binary.convert_` makes of them. The output is that of ``model.eval()``, but for rounding: a value that
    this moves across a threshold of a later layer takes the neighbouring level there.

    Args:
        model: prepared, trained, not wrapped (of a wrapped one, ``model.module``).
        fold_norms: multiply each ``BatchNorm2d`` into the convolution before it, which need not be compressed. What
            belongs together is known of neighbours in a ``torch.nn.Sequential``, of modules with a method
            ``norm_pairs()`` (see :func:`tersor.sparsity.convert_`), and of models that ``torch.fx`` can trace. A ReLU
            after that goes in too, and so does what the method ``residual_convs()`` of a module names: convolutions
            whose output, after the norm, gets a residual and a ReLU. The forward pass calls these with the residual,
            as ``conv(x, residual)``, where their attribute ``adds_residual`` is true, and leaves out the rest.

    Returns:
        ``model``, in eval mode; or its replacement, if it is such a layer itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not prepared or is converted already, a sparse layer has more than one combination left
            (:func:`step` was called less than ``steps`` times ``end``), or a layer cannot be packed; the message names
            it, and nothing has been changed.
    """
    compression = compression_of("convert_", model)
    if getattr(model, "compression", None) is not compression:
        raise ValueError(
            f"convert_: model must be the one that prepare_ returned, got {type(model).__name__} around it"
        )
    if compression.converted:
        raise ValueError("convert_: model must not be converted yet, got one that is")
    model.eval()
    pairs = find_norms(model) if fold_norms else {}
    return convert_with(model, compression, pairs)


def convert_with(model: nn.Module, compression: Compression, pairs: Folded) -> nn.Module:
    """:func:`convert_` with these norms to fold."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    packed = {id(module): _packed(name or type(module).__name__, module) for name, module in layers.items()}
    norms = {conv: model.get_submodule(fold.norm) for conv, fold in pairs.items()}
    if any(isinstance(module, BinaryLayer) for module in model.modules()):
        model = convert_binary_(model)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            parent._modules[child] = packed.get(id(module), module)
    model = packed.get(id(model), model)
    for conv, norm in norms.items():
        fold, layer = pairs[conv], model.get_submodule(conv)
        _fold_(layer, norm)
        gone = [fold.norm]
        if isinstance(layer, (PackedCompressedConv2d, PackedNMConv2d)) and fold.relu is not None:
            layer.activation = "relu"
            gone += [fold.relu] if fold.relu else []
        if isinstance(layer, PackedCompressedConv2d) and fold.residual:
            layer.activation, layer.adds_residual = "relu", True
        for name in gone:
            place, _, child = name.rpartition(".")
            setattr(model.get_submodule(place), child, nn.Identity())
    compression.convert(pairs)
    if model._modules.get("compression") is not compression:
        model.add_module("compression", compression)
    return model.eval()


def _packed(name: str, layer: Any) -> nn.Module:
    try:
        if layer.quantization is None:
            return _packed_sparse(layer)
        if layer.scores is not None:
            _check_removed(layer)
        return PackedCompressedConv2d(layer) if isinstance(layer, CompressedConv2d) else PackedCompressedLinear(layer)
    except ValueError as error:
        raise ValueError(f"convert_: {name}: {error}") from error


def _check_removed(layer: CompressedLayer) -> None:
    assert layer.scores is not None
    alive = int((layer.scores.alpha != 0).sum(1).max())
    if alive > 1:
        raise ValueError(
            f"one combination of each group must be left, got {alive}: call tersor.compress.step once per step of the "
            "training, as many times as prepare_ was told"
        )


@torch.no_grad()
def _packed_sparse(layer: Any) -> nn.Module:
    """Of a layer that is sparse only."""
    if layer.scores is not None:
        _check_removed(layer)
    n, m = layer.sparsity.n, layer.sparsity.m
    raw = layer._parameters["weight"]
    layer._parameters["weight"] = nn.Parameter(layer.compressed_weight(), requires_grad=False)
    try:
        return PackedNMLinear(layer, n, m) if isinstance(layer, CompressedLinear) else PackedNMConv2d(layer, n, m)
    finally:
        layer._parameters["weight"] = raw


@torch.no_grad()
def _fold_(conv: Any, norm: Any) -> None:
    """The norm goes into a packed or plain convolution before it."""
    if isinstance(conv, PackedNMConv2d):
        conv.fold_(norm)
        return
    scale, shift = norm_affine(norm)
    if isinstance(conv, PackedCompressedConv2d):
        conv.fold_(scale, shift)
        return
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = 0 if conv.bias is None else conv.bias.double()
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype), requires_grad=False)


def find_norms(model: nn.Module) -> Folded:
    """Convolutions, compressed or plain, with the norms with running statistics that alone see their output."""
    names = {id(module): name for name, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    once = {names[key] for key, count in places.items() if count == 1}
    residuals = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(convs := getattr(module, "residual_convs", None))
        for name in convs()
    }
    found: list[tuple[str, Fold]] = []
    for conv, norm, relu in norm_pairs(model):
        after = names[id(relu)] if isinstance(relu, nn.Module) else "" if relu else None
        conv_name = names[id(conv)]
        found.append((conv_name, Fold(names[id(norm)], after, conv_name in residuals)))
    folds = {}
    for conv_name, fold in found or _traced(model):
        layer, norm = model.get_submodule(conv_name), model.get_submodule(fold.norm)
        plain = type(layer) is nn.Conv2d or isinstance(layer, CompressedConv2d)
        fits = type(norm) is nn.BatchNorm2d and isinstance(norm.running_mean, Tensor)
        if plain and fits and {conv_name, fold.norm} <= once:
            folds[conv_name] = fold if not fold.relu or fold.relu in once else fold._replace(relu=None)
    return folds


class _Tracer(torch.fx.Tracer):
    """Stops at compressed layers; everything else as torch.fx does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CompressedLayer) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> list[tuple[str, Fold]]:
    """What the graph of the forward pass shows, where torch.fx can trace it; else nothing."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the model's own code raises when it is run on proxies: then nothing is known
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def only_user(node: Any, kind: type[nn.Module]) -> Any:
        """The one node that takes the output, if it is a module of that kind that is called once."""
        if len(node.users) != 1:
            return None
        user: Any = next(iter(node.users))
        alone = user.op == "call_module" and calls[user.target] == 1 and user.args == (node,)
        return user if alone and isinstance(model.get_submodule(user.target), kind) else None

    found = []
    for node in graph.nodes:
        if node.op != "call_module" or calls[node.target] != 1:
            continue
        norm: Any = only_user(node, nn.BatchNorm2d)
        if norm is not None:
            relu: Any = only_user(norm, nn.ReLU)
            found.append((node.target, Fold(norm.target, None if relu is None else relu.target)))
    return found
