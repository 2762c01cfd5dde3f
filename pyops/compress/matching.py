"""Which layers of a model a recipe changes, and why others stay as they are."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from tersor.compress.attention import SWIN, window_attention_of
from tersor.compress.recipe import Recipe, Rule
from tersor.compress.transforms import Binarize, FakeQuantize, NMSparse, Transform, WindowAttentionByIndex
from tersor.quantization.quantized_conv2d import MOST_TERMS


class Place(NamedTuple):
    """A layer, and what it becomes."""

    name: str
    module: nn.Module
    transforms: tuple[Transform, ...]


class Matches(NamedTuple):
    """What a recipe changes in a model, and why it leaves other layers that its rules match."""

    places: list[Place]
    skipped: dict[str, str]


def match(model: nn.Module, recipe: Recipe) -> Matches:
    """Which layers get what; raises where a rule asks for what cannot be."""
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Conv2d, nn.Linear))]
    ends = {*(layers[:1] if recipe.skip_first else ()), *(layers[-1:] if recipe.skip_last else ())}
    ends = ends if len(layers) > 1 else set()
    replaced = {
        id(module)
        for name, module in modules.items()
        if _is_swin(module) and (rule := _rule_for(recipe, name, module)) and not _refusal(module, rule.transforms)
    }
    hidden = dict(_read_directly(model, replaced))
    places, skipped = [], {}
    for name, module in modules.items():
        rule = _rule_for(recipe, name, module)
        if rule is None:
            continue
        named = rule.names(name)
        if name in ends and not named:
            skipped[name] = "the first or last layer"
            continue
        reason = hidden.get(id(module)) or _refusal(module, rule.transforms)
        if reason and named:
            raise ValueError(f"prepare_: {name}: {reason}")
        if reason:
            skipped[name] = reason
        else:
            places.append(Place(name, module, rule.transforms))
    aliases = {alias: module for alias, module in model.named_modules(remove_duplicate=False) if alias not in modules}
    _check_found(recipe, modules, aliases, places, skipped)
    return Matches(places, skipped)


def _rule_for(recipe: Recipe, name: str, module: nn.Module) -> Rule | None:
    """The last one that is about such modules and matches."""
    candidates = (rule for rule in reversed(recipe.rules) if _is_candidate(module, rule.transforms))
    return next((rule for rule in candidates if rule.matches(name, module)), None)


def is_attention(transforms: tuple[Transform, ...]) -> bool:
    """Whether they replace attention rather than a layer with a weight."""
    return isinstance(transforms[0], WindowAttentionByIndex)


def _is_swin(module: nn.Module) -> bool:
    return type(module).__name__ in SWIN


def _is_candidate(module: nn.Module, transforms: tuple[Transform, ...]) -> bool:
    if is_attention(transforms):
        return _is_swin(module)
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _refusal(module: Any, transforms: tuple[Transform, ...]) -> str:
    """Why the layer cannot take the transforms; empty if it can."""
    if is_attention(transforms):
        return window_attention_of(module)[1]
    kind = nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    if not _computes_as(kind, module):
        return f"{type(module).__name__} computes in its own way"
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module) or weight is None:
        return "its weight is parametrized"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape before the first forward pass"
    if not module.weight.is_floating_point() or not module.weight.numel():
        return f"its weight must be floating point and not empty, it is {module.weight.dtype}"
    for transform in transforms:
        if kind is nn.Conv2d and not _is_even(module):
            return "its padding differs between the sides, which the packed kernels do not do"
        if isinstance(transform, NMSparse):
            inputs = module.weight.shape[1]
            if inputs % transform.m:
                return f"{transform.m} does not divide its {inputs} inputs{' per group' if kind is nn.Conv2d else ''}"
            if len(transforms) == 1 and getattr(module, "padding_mode", "zeros") != "zeros":
                return f"a sparse float convolution pads with zeros, this one has padding_mode {module.padding_mode!r}"
        whole = isinstance(transform, FakeQuantize) and transform.bits_of_input != 32
        if whole and (terms := weight[0].numel()) > MOST_TERMS:
            return f"a sum in whole numbers has at most {MOST_TERMS} terms, its have {terms}"
        if isinstance(transform, Binarize):
            if transform.method == "recu" and kind is nn.Linear:
                return "ReCU is for convolutions"
            if kind is nn.Conv2d and module.padding_mode != "zeros":
                return f"a binary convolution pads with zeros, this one has padding_mode {module.padding_mode!r}"
    return ""


def _computes_as(kind: Any, module: Any) -> bool:
    """Whether its forward pass is that of torch's class, also where a subclass or somebody's patch could differ."""
    methods = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return all(getattr(type(module), each) is getattr(kind, each) and each not in vars(module) for each in methods)


def _is_even(convolution: Any) -> bool:
    """Whether it pads as much on either side."""
    border = convolution._reversed_padding_repeated_twice
    return border[0] == border[1] and border[2] == border[3]


def _read_directly(model: nn.Module, replaced: set[int]) -> Iterator[tuple[int, str]]:
    """Layers whose weight another module, not to be replaced, computes with, so that they are never called."""
    known = {
        nn.MultiheadAttention: ("out_proj",),
        nn.TransformerEncoderLayer: ("linear1", "linear2"),  # in its fast path
    }
    for module in model.modules():
        names = next((names for each, names in known.items() if isinstance(module, each)), ())
        if _is_swin(module) and id(module) not in replaced:
            names = ("qkv", "proj")
        kind: Any = type(module)
        written = () if id(module) in replaced else _read_in_source(kind)
        found = [name for name in written if isinstance(getattr(module, name, None), (nn.Conv2d, nn.Linear))]
        for child in (*names, *found, *getattr(module, "weights_read_directly", ())):
            reason = f"{type(module).__name__} computes with its weight directly"
            yield from ((id(each), reason) for each in module.get_submodule(child).modules())


@functools.cache
def _read_in_source(kind: Any) -> tuple[str, ...]:
    """Children of which the forward pass, as it is written, takes the weight, other than for its dtype and the like."""
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ()
    return tuple(dict.fromkeys(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b)", source)))


def _check_found(
    recipe: Recipe,
    modules: dict[str, nn.Module],
    aliases: dict[str, nn.Module],
    places: list[Place],
    skipped: dict[str, str],
) -> None:
    for rule in recipe.rules:
        for name in rule.exact_names:
            if name in aliases:
                first = next((known for known, module in modules.items() if module is aliases[name]), name)
                raise ValueError(f"prepare_: {name} is one layer with {first}: the recipe must name it so")
            if name not in modules:
                near = difflib.get_close_matches(name, modules, n=3)
                hint = f"; near to it are {', '.join(near)}" if near else ""
                raise ValueError(f"prepare_: recipe must name layers of the model, got {name!r}, which has none{hint}")
            if rule.matches(name, modules[name]) and not _is_candidate(modules[name], rule.transforms):
                kind = type(modules[name]).__name__
                raise ValueError(f"prepare_: {name}: a {kind} cannot take {', '.join(map(str, rule.transforms))}")
    chosen = {id(_rule_for(recipe, name, module)) for name, module in modules.items()}
    for rule in recipe.rules:
        if id(rule) not in chosen:
            _refuse_idle(rule, modules)
    if not places:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"prepare_: recipe must change a layer, got one that changes none ({reasons or 'no match'})")


def _refuse_idle(rule: Rule, modules: dict[str, nn.Module]) -> None:
    """The error for a rule that holds for nothing."""
    layers = rule.layers if callable(rule.layers) else ", ".join(rule.layers)
    candidates = {name: module for name, module in modules.items() if _is_candidate(module, rule.transforms)}
    if any(rule.matches(name, module) for name, module in candidates.items()):
        raise ValueError(f"prepare_: each rule must hold for a layer, but later ones match all that {layers} does")
    kind = "attention to replace is" if is_attention(rule.transforms) else "layers are such as"
    examples = ", ".join([*candidates][:5]) or "not there"
    raise ValueError(f"prepare_: each rule must match a layer, got none for {layers} ({kind} {examples})")
