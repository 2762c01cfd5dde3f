"""From a model that was trained compressed to one that is stored and runs so."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from tersor._folding import norm_affine
from tersor.binary.convert import convert_ as convert_binary_
from tersor.binary.layers import BinaryLayer
from tersor.compress.layers import CompressedConv2d, CompressedLayer, CompressedLinear
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.compress.prepare import NAME, Compression, compression_of
from tersor.compress.sharded import fully_sharded, is_sharded
from tersor.sparsity.packed_layers import PackedNMConv2d, PackedNMLinear, norm_pairs

Folded = dict[str, str]  # names of convolutions, and of the norms that went into them


def convert_(model: nn.Module, fold_norms: bool = True) -> nn.Module:
    """Replaces the layers of a prepared and trained model, in place, by packed ones for inference.

    :class:`CompressedConv2d` and :class:`CompressedLinear` become layers that hold packed codes, and of sparse weights
    only the kept ones; with quantised inputs they compute in whole numbers. Layers that are sparse only become
    :class:`tersor.sparsity.PackedNMConv2d` and ``PackedNMLinear``, binary ones what
    :func:`tersor.binary.convert_` makes of them. The output is that of ``model.eval()``, but for rounding: a value that
    this moves across a threshold of a later layer takes the neighbouring level there.

    Args:
        model: prepared, trained, neither wrapped (of a DistributedDataParallel give ``.module``) nor sharded.
        fold_norms: multiply each ``BatchNorm2d`` into the convolution before it, which need not be compressed. What
            belongs together is known of neighbours in a ``torch.nn.Sequential``, of modules with a method
            ``norm_pairs()``, and of models that ``torch.fx`` can trace.

    Returns:
        ``model``, in eval mode; or its replacement, if it is such a layer itself.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is wrapped, not prepared or converted already, a sparse layer has more than one combination left
            (:func:`step` was called less than ``steps`` times ``end``), or a layer cannot be packed; the message names
            it, and nothing has been changed.
    """
    compression = compression_of("convert_", model)
    if model._modules.get(NAME) is not compression:
        inner = {"DistributedDataParallel": "; give its .module", "OptimizedModule": "; give its ._orig_mod"}
        raise ValueError(
            f"convert_: model must be the one that prepare_ returned, got {type(model).__name__} around it"
            f"{inner.get(type(model).__name__, '')}"
        )
    if fully_sharded(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            "convert_: model must not be sharded, got one that is: gather "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True, cpu_offload=True)), load it into a model prepared in the same way, and convert that"
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
    norms = {conv: model.get_submodule(norm) for conv, norm in pairs.items()}
    if any(isinstance(module, BinaryLayer) for module in model.modules()):
        model = convert_binary_(model)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            parent._modules[child] = packed.get(id(module), module)
    model = packed.get(id(model), model)
    for conv, norm in norms.items():
        _fold_(model.get_submodule(conv), norm)
        place, _, child = pairs[conv].rpartition(".")
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
    """Convolutions, compressed or plain, and the norms with running statistics that alone see their output."""
    names = {id(module): name for name, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    found = [(names[id(conv)], names[id(norm)]) for conv, norm, _ in norm_pairs(model)] or _traced_pairs(model)
    pairs = {}
    for conv_name, norm_name in found:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        plain = type(conv) is nn.Conv2d or isinstance(conv, CompressedConv2d)
        folds = type(norm) is nn.BatchNorm2d and isinstance(norm.running_mean, Tensor)
        if plain and folds and places[id(conv)] == places[id(norm)] == 1:
            pairs[conv_name] = norm_name
    return pairs


class _Tracer(torch.fx.Tracer):
    """Stops at compressed layers; everything else as torch.fx does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, CompressedLayer) or super().is_leaf_module(m, module_qualified_name)


def _traced_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """What the graph of the forward pass shows, where torch.fx can trace it; else nothing."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever the model's own code raises when it is run on proxies: then nothing is known
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or len(node.users) != 1 or calls[node.target] != 1:
            continue
        user = next(iter(node.users))
        alone = user.op == "call_module" and calls[user.target] == 1 and user.args == (node,)
        if alone and isinstance(model.get_submodule(user.target), nn.BatchNorm2d):
            pairs.append((node.target, user.target))
    return pairs
