"""From any model to one that trains compressed: replacing layers, first bounds, and one step of all schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tersor._checks import as_int
from tersor.binary.layers import BinaryConv2d, BinaryLinear, ReCUConv2d
from tersor.binary.schedules import recu_tau, reste_o
from tersor.compress.attention import window_attention_of
from tersor.compress.layers import CompressedLayer, compressed
from tersor.compress.matching import is_attention, match
from tersor.compress.quantizers import FreezingWeight, InputBounds, LsqWeight
from tersor.compress.recipe import Recipe, as_recipe
from tersor.compress.sharded import assign_, is_sharded, reshard_, rows_of, whole
from tersor.compress.transforms import Binarize, Transform
from tersor.sparsity.nm_remove import nm_remove_
from tersor.sparsity.nm_schedule import nm_schedule

NAME = "compression"  # of the module that prepare_ adds to a model


class Compression(nn.Module):
    """What a prepared model keeps about its compression; :func:`prepare_` adds it under the name ``compression``.

    Args:
        recipe: of the model.
        steps: of the training.
        applied: what was done to which layer.
        skipped: layers that a rule matched and that stay as they are, with the reason.
    """

    step: Tensor

    def __init__(
        self, recipe: Recipe, steps: int, applied: dict[str, tuple[Transform, ...]], skipped: dict[str, str]
    ) -> None:
        super().__init__()
        self.recipe, self.steps, self.applied, self.skipped = recipe, steps, applied, skipped
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.done = 0  # step on the host, so that no call waits for a GPU
        self.converted = False
        self.folded: dict[str, Any] = {}  # convolutions, and what convert_ has put into them
        self.root = ""  # what the model is called where it is a layer itself
        self.register_load_state_dict_post_hook(_read_step)

    def forward(self, input: Any) -> Any:
        """The input itself, since a ``torch.nn.Sequential`` calls all that it holds."""
        return input

    def convert(self, folded: dict[str, Any]) -> None:
        """The model has been converted: there are no steps any more."""
        self.converted, self.folded = True, folded
        del self.step

    def extra_repr(self) -> str:
        state = "converted" if self.converted else f"step {self.done} of {self.steps}"
        return f"{len(self.applied)} layers, {state}"


def _read_step(module: Any, incompatible: Any) -> None:
    module.done = module.done if module.converted else int(module.step)


def _read_progress(model: nn.Module, incompatible: Any) -> None:
    """After loading a state dict: what depends on the step and is no tensor."""
    for compression in model.modules():
        if isinstance(compression, Compression) and not compression.converted:
            _set_binary_progress(model, compression)


def prepare_(model: nn.Module, recipe: Any, steps: int = 1) -> nn.Module:
    """Replaces layers of a model, in place, by ones that train compressed.

    Convolutions (``torch.nn.Conv2d``) and linear layers become :class:`CompressedConv2d` and :class:`CompressedLinear`,
    or with :class:`Binarize` :class:`tersor.ReCUConv2d` and its like. They hold the same parameters, so an optimiser of
    the model stays valid for these, and a checkpoint of the unprepared model still loads with ``strict=False``. The
    hooks of the replaced layers are left behind.

    Then, in this order::

        compress.prepare_(model, recipe, steps=epochs * len(loader))
        compress.calibrate_(model, images)  # where inputs are quantised
        optimizer = torch.optim.SGD(compress.parameter_groups(model, weight_decay=1e-4), lr=0.1)
        for images, labels in loader:
            ...
            optimizer.step()
            compress.step(model)
        compress.convert_(model.eval())

    All that a run needs to resume is in the state dict: prepare a model in the same way and load it there.

    Args:
        model: any; a layer that it holds in several places stays one, known by the first of its names. Before it is
            wrapped for distributed training.
        recipe: a :class:`Recipe`, a :class:`Rule`, a transform, or several rules or transforms.
        steps: calls of :func:`step` in the training, by which the schedules go.

    Returns:
        ``model``; or its replacement, if it is such a layer itself.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: the recipe matches no layer, or a name without wildcards is no layer's or one's that cannot take the
            transforms; or the model is prepared already. Nothing has been changed then.
    """
    name = "prepare_"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module, got {type(model).__name__}")
    recipe = as_recipe(name, recipe)
    if as_int(name, steps=steps) < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps}")
    if any(isinstance(module, Compression) for module in model.modules()):
        raise ValueError(f"{name}: model must not be prepared yet, got one that is")
    if hasattr(model, NAME):
        raise ValueError(f"{name}: model must have no attribute {NAME!r}, got {type(model).__name__} with one")
    found = match(model, recipe)
    root = type(model).__name__
    for attention in (True, False):  # attention first: its projections then are layers like others
        chosen = [place for place in found.places if attention == is_attention(place.transforms)]
        replacements = {id(place.module): _replacement(place.module, place.transforms) for place in chosen}
        for parent in list(model.modules()):
            for child, module in parent._modules.items():
                parent._modules[child] = replacements.get(id(module), module)
        model = replacements.get(id(model), model)
    applied = {place.name: place.transforms for place in found.places}
    compression = Compression(recipe, steps, applied, found.skipped)
    compression.root = root
    model.add_module(NAME, compression)
    model.register_load_state_dict_post_hook(_read_progress)
    for module in model.modules():
        if isinstance(module, CompressedLayer) and module.freezing is not None:
            assert isinstance(module.quantize_weight, FreezingWeight)
            module.quantize_weight.schedule = module.freezing.schedule(steps)
    _set_progress(model, compression)
    return model


def _replacement(module: Any, transforms: tuple[Transform, ...]) -> nn.Module:
    first = transforms[0]
    if is_attention(transforms):
        made = window_attention_of(module)[0]
        assert made is not None
        return made
    if isinstance(first, Binarize):
        return _binary(module, first.method)
    return compressed(module, transforms)


def _binary(layer: Any, method: str) -> nn.Module:
    """A binary layer with the parameters of a plain one."""
    options: dict[str, Any] = {"bias": layer.bias is not None, "dtype": layer.weight.dtype, "device": "meta"}
    made: Any
    if isinstance(layer, nn.Linear):
        made = BinaryLinear(layer.in_features, layer.out_features, estimator=method, scale="channel", **options)
    else:
        window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        sizes = (layer.in_channels, layer.out_channels, *window)
        if method == "recu":
            options["device"] = layer.weight.device
            made = ReCUConv2d(*sizes, **options)
            with torch.no_grad():  # what the weights were scaled by, so that a trained network is a good start
                made.alpha.copy_(layer.weight.abs().mean((1, 2, 3))[:, None, None])
        else:
            made = BinaryConv2d(*sizes, estimator=method, scale="channel", **options)
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def compression_of(where: str, model: nn.Module) -> Compression:
    """The :class:`Compression` in a prepared model, also within a distributed wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    found = next((module for module in model.modules() if isinstance(module, Compression)), None)
    if found is None:
        raise ValueError(f"{where}: model must have been prepared by prepare_, got {type(model).__name__} that is not")
    return found


@torch.no_grad()
def calibrate_(model: nn.Module, *batch: Any, **more: Any) -> Any:
    """Sets the first bounds of all inputs and weights, from one forward pass over a batch of training data.

    The pass runs layer by layer on what the quantised layers before give, without a gradient, in the mode that the
    model is in: for a trained network call ``model.eval()`` before; a new one has to be in training mode, so that norms
    use the batch's statistics (their running ones move). In distributed training every process calls it, before the
    model is wrapped or after, and takes the mean of all processes' bounds.

    Args:
        model: prepared.
        batch, more: as the model takes them.

    Returns:
        The model's output.

    Raises:
        TypeError, ValueError: the model is not prepared, or a layer's forward pass did not run.
    """
    compression_of("calibrate_", model)
    reshard_(model)
    called: set[int] = set()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(id(module)))  # type: ignore[attr-defined]
        for module in layers.values()
    ]
    bounds = [module for module in model.modules() if isinstance(module, InputBounds)]
    try:
        for module in layers.values():
            if isinstance(module.quantize_weight, (LsqWeight, FreezingWeight)):
                module.quantize_weight.initialize_(module.weight)
        for each in bounds:
            each.calibrating = True
        output = model(*batch, **more)
    finally:
        found = {each: each.found for each in bounds if each.found is not None}
        for each in bounds:
            each.calibrating, each.found = False, None
        for hook in hooks:
            hook.remove()
        reshard_(model)
    if idle := [name for name, module in layers.items() if id(module) not in called]:
        raise ValueError(
            f"calibrate_: every compressed layer must run in the forward pass, but {', '.join(idle[:5])} did not: the "
            "batch does not reach it, or another module computes with its weight directly; exclude it in the recipe"
        )
    if found and dist.is_available() and dist.is_initialized():
        stacked = torch.stack(list(found.values()))
        dist.all_reduce(stacked)
        for each, mean in zip(found, stacked / dist.get_world_size(), strict=True):
            each.set_(mean)
    return output


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Moves every schedule of a prepared model on; once after each step of the optimiser.

    Scores are removed, weights freeze, and binary layers' functions come nearer to a sign, each as the transforms say.
    Steps that the optimiser has moved below zero are made positive, and bounds that it has moved across swapped.
    Further calls than ``steps`` of :func:`prepare_` change only what training itself changed. In distributed training
    every process calls it; it comes to the same state everywhere, since the weights are the same. Of a model that
    ``fully_shard`` cut, it puts together the weights that freeze, one layer's after the other's.

    Raises:
        TypeError, ValueError: the model is not prepared.
    """
    compression = compression_of("step", model)
    reshard_(model)
    compression.done += 1
    compression.step.fill_(compression.done)
    for module in model.modules():
        if isinstance(module, (FreezingWeight, InputBounds, LsqWeight)):
            module.keep_valid_()
    _set_progress(model, compression)
    for module in model.modules():
        if isinstance(module, CompressedLayer) and isinstance(module.quantize_weight, FreezingWeight):
            if module.freezing is None:
                continue
            if compression.done <= compression.steps:
                module.quantize_weight.move_on(module.weight)
            if compression.done % module.freezing.every == 0:
                module.refresh_plan()


def _set_progress(model: nn.Module, compression: Any) -> None:
    """What depends on the step's number alone."""
    done, steps = min(compression.done, compression.steps), compression.steps
    for module in model.modules():
        if isinstance(module, CompressedLayer) and module.scores is not None:
            assert module.sparsity is not None
            end = max(1, math.ceil(module.sparsity.end * steps))
            removed = nm_schedule(done, math.comb(module.sparsity.m, module.sparsity.n), end, module.sparsity.power)
            _remove_(module.scores, removed)
    _set_binary_progress(model, compression)


def _set_binary_progress(model: nn.Module, compression: Any) -> None:
    done, steps = min(compression.done, compression.steps - 1), compression.steps
    for module in model.modules():
        if isinstance(module, ReCUConv2d):
            module.set_tau_(recu_tau(done, steps))
        elif isinstance(module, (BinaryConv2d, BinaryLinear)):
            module.set_o_(reste_o(done, steps))


def _remove_(scores: Any, k: int) -> None:
    if not is_sharded(scores.alpha):
        scores.remove_(k)
    elif (rows := rows_of(scores.alpha)) is not None:  # each row is one group
        nm_remove_(rows, k, scores.n, scores.m)
    else:
        rows = whole(scores.alpha).contiguous()
        nm_remove_(rows, k, scores.n, scores.m)
        assign_(scores.alpha, rows)


def parameter_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The parameters in two groups for an optimiser: matrices and kernels, and all that should not decay.

    Bounds, steps, scores, biases and norms do not decay.

    Args:
        model: prepared or not; before it is wrapped or after.
        weight_decay: of the first group.
    """
    reshard_(model)
    free = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, CompressedLayer)
        for part in (module.quantize_input, module.quantize_weight, module.scores)
        if part is not None
        for parameter in part.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [p for p in trained if p.dim() > 1 and id(p) not in free]
    chosen = {id(p) for p in decaying}
    others = [p for p in trained if id(p) not in chosen]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
