"""From a model that was trained compressed to one that is stored and runs so."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor._folding import norm_affine
from tersor.binary.convert import convert_ as convert_binary_
from tersor.binary.layers import BinaryLayer
from tersor.compress.layers import CompressedConv2d, CompressedLayer, CompressedLinear
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.compress.prepare import NAME, Compression, compression_of
from tersor.compress.report import evaluating
from tersor.compress.sharded import fully_sharded, is_sharded
from tersor.sparsity.packed_layers import PackedNMConv2d, PackedNMLinear, own_norm_pairs


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
        model: prepared, trained, neither wrapped (of a DistributedDataParallel give ``.module``) nor sharded.
        fold_norms: multiply each ``BatchNorm2d`` into the convolution before it, which need not be compressed. What
            belongs together is known of models and modules of one input that ``torch.fx`` can trace; in what it cannot,
            of neighbours in a ``torch.nn.Sequential`` and of modules with a method ``norm_pairs()`` (see
            :func:`tersor.sparsity.convert_`). A packed convolution also takes the ReLU after that, and where the method
            ``residual_convs()`` of a module names it, a residual and a ReLU: the forward pass calls it as ``conv(x,
            residual)`` where its attribute ``adds_residual`` is true, and leaves out the rest. Layers with hooks or in
            several places keep theirs. Binary layers take their norms in any case.

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
    with evaluating(model):
        pairs = find_norms(model) if fold_norms else {}
        model = convert_with(model, compression, pairs)
    return model.eval()


def convert_with(model: nn.Module, compression: Compression, pairs: Folded) -> nn.Module:
    """:func:`convert_` with these norms to fold."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    packed = {id(module): _packed(name or compression.root, module) for name, module in layers.items()}
    norms = {conv: model.get_submodule(fold.norm) for conv, fold in pairs.items()}
    residuals = _residual_convs(model)
    for conv, fold in pairs.items():
        if not can_fold(model.get_submodule(conv), norms[conv]):
            raise ValueError(f"{fold.norm} is no norm that can go into {conv}")
        if fold.relu and not _is_relu(model.get_submodule(fold.relu)):
            raise ValueError(f"{fold.relu} is no ReLU that can go into {conv}")
        if fold.residual and id(model.get_submodule(conv)) not in residuals:
            raise ValueError(f"{conv} takes no residual")
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
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)  # another layer may hold the old one
    conv.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype), requires_grad=False)


def find_norms(model: nn.Module) -> Folded:
    """Convolutions, compressed or plain, with the norms with running statistics that alone see their output."""
    names = {id(module): name for name, module in model.named_modules()}
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    residuals = _residual_convs(model)
    said = [pair for module in model.modules() for pair in own_norm_pairs(module)]
    left_out = {(id(conv), id(norm)) for conv, norm, relu in said if relu is True}  # by the forward pass
    folded: Folded = {}
    for conv, norm, relu in _pairs(model, True):
        if not can_fold(conv, norm) or places[id(conv)] != 1 or places[id(norm)] != 1:
            continue
        after = names[id(relu)] if _is_relu(relu) and places[id(relu)] == 1 else None
        after = "" if (id(conv), id(norm)) in left_out else after
        folded[names[id(conv)]] = Fold(names[id(norm)], after, id(conv) in residuals)
    return folded


def _residual_convs(model: nn.Module) -> set[int]:
    """The convolutions that a module's ``residual_convs()`` names."""
    return {
        id(module.get_submodule(name))
        for module in model.modules()
        if callable(convs := getattr(module, "residual_convs", None))
        for name in convs()
    }


def _is_relu(module: Any) -> bool:
    return type(module) is nn.ReLU and not module._forward_hooks and not module._forward_pre_hooks


def can_fold(conv: Any, norm: Any) -> bool:
    """Whether the one may go into the other, if it alone sees its output."""
    hooks = any(each._forward_hooks or each._forward_pre_hooks for each in (conv, norm))  # which see what goes between
    plain = type(conv) is nn.Conv2d and "weight" in conv._parameters and "forward" not in vars(conv)
    norms = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm)
    fits = norms and isinstance(norm.running_mean, Tensor) and norm.num_features == getattr(conv, "out_channels", None)
    return (plain or isinstance(conv, CompressedConv2d)) and fits and not hooks


def _pairs(module: nn.Module, is_root: bool) -> Iterator[tuple[nn.Module, nn.Module, Any]]:
    """By the graph of the forward pass where torch.fx can trace it; else what the module says, and of its children."""
    if is_root or _takes_one_input(module):
        traced = _traced_pairs(module)
        if traced is not None:
            yield from traced
            return
    yield from own_norm_pairs(module)
    for child in module.children():
        yield from _pairs(child, False)


def _takes_one_input(module: nn.Module) -> bool:
    """Whether its forward pass cannot depend on anything but one tensor; others may run otherwise than traced."""
    arguments = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(arguments) == 1 and all(each.kind in kinds for each in arguments)


class _Tracer(torch.fx.Tracer):
    """Stops at compressed and binary layers; everything else as torch.fx does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (CompressedLayer, BinaryLayer)) or super().is_leaf_module(m, module_qualified_name)


def _traced_pairs(module: nn.Module) -> list[tuple[nn.Module, nn.Module, Any]] | None:
    """Convolution, norm and maybe a ReLU, by the graph of the forward pass; None where torch.fx cannot trace it."""
    try:
        arguments = inspect.signature(module.forward).parameters.values()
        defaults = {each.name: each.default for each in arguments if each.default is not inspect.Parameter.empty}
        graph = _Tracer().trace(module, concrete_args=defaults or None)
    except Exception:  # whatever the module's own code raises when it is run on proxies: then nothing is known
        return None
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}  # weights by hand

    def only_user(node: Any) -> Any:
        """The one node that takes the output, if it is a module that is called once and for nothing else."""
        if node.op != "call_module" or len(node.users) != 1 or calls[node.target] != 1 or node.target in read:
            return None
        user: Any = next(iter(node.users))
        alone = user.op == "call_module" and calls[user.target] == 1 and user.args == (node,) and not user.kwargs
        return user if alone and user.target not in read else None

    pairs = []
    for node in graph.nodes:
        if (norm := only_user(node)) is not None:
            relu = only_user(norm)
            after = None if relu is None else module.get_submodule(relu.target)
            pairs.append((module.get_submodule(node.target), module.get_submodule(norm.target), after))
    return pairs
