"""Recipes: which layers get which transforms; as objects, and as TOML."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tersor.compress.transforms import TRANSFORMS, Transform, check_composition

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Predicate = Callable[[str, nn.Module], bool]
Layers = str | Iterable[str] | Predicate


@dataclasses.dataclass(frozen=True, init=False)
class Rule:
    """Transforms for some layers.

    Args:
        *transforms: of :class:`FakeQuantize`, :class:`NMSparse`, :class:`Freeze`, :class:`Binarize` and
            :class:`WindowAttentionByIndex`; what does not go together is refused.
        layers: names of layers as in ``model.named_modules()``, with the wildcards of ``fnmatch`` (``*`` also spans
            dots), one or several; or a predicate that is given the name and the module. A name without wildcards must
            exist and take the transforms; a layer that a wildcard or predicate finds and that cannot take them stays as
            it is, and the report says why. What is a layer's very name stands for it, whatever signs are in it.
        exclude: likewise, layers that the rule leaves alone.
    """

    transforms: tuple[Transform, ...]
    layers: tuple[str, ...] | Predicate
    exclude: tuple[str, ...] | Predicate

    def __init__(self, *transforms: Transform, layers: Layers = "*", exclude: Layers = ()) -> None:
        object.__setattr__(self, "transforms", check_composition("Rule", transforms))
        object.__setattr__(self, "layers", _patterns("layers", layers))
        object.__setattr__(self, "exclude", _patterns("exclude", exclude))
        if self.layers == ():
            raise ValueError("Rule: layers must not be empty")

    def matches(self, name: str, module: nn.Module) -> bool:
        return _matches(self.layers, name, module) and not _matches(self.exclude, name, module)

    @property
    def exact_names(self) -> tuple[str, ...]:
        """The names without wildcards, which have to be a model's."""
        if callable(self.layers):
            return ()
        return tuple(pattern for pattern in self.layers if not any(sign in pattern for sign in "*?["))

    def names(self, name: str) -> bool:
        """Whether it lists that very name, also one that could be taken for a pattern."""
        return not callable(self.layers) and name in self.layers


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """Rules, of which the last one that matches a layer holds for it.

    Rules with :class:`WindowAttentionByIndex` are about attention, all others about convolutions and linear layers;
    neither stands in the way of the other.

    Args:
        *rules: :class:`Rule` objects, or transforms, which together make one rule for all layers.
        skip_first, skip_last: leave the first and the last convolution or linear layer, in the order of
            ``model.modules()``, alone unless a rule names it without wildcards.

    ::

        Recipe(FakeQuantize(4), NMSparse(2, 4))
        Recipe(Rule(FakeQuantize(4)), Rule(FakeQuantize(8), layers=["*.proj", "head"]))

    As TOML (:meth:`from_toml`), with a list of rules::

        skip_last = false

        [[rule]]
        FakeQuantize = { bits = 4, method = "lts" }
        NMSparse = { n = 2, m = 4 }
        Freeze = {}

        [[rule]]
        layers = ["*.proj", "head"]
        FakeQuantize = { bits = 8 }
    """

    rules: tuple[Rule, ...]
    skip_first: bool
    skip_last: bool

    def __init__(self, *rules: Rule | Transform, skip_first: bool = True, skip_last: bool = True) -> None:
        loose = [rule for rule in rules if not isinstance(rule, Rule)]
        if loose and len(loose) < len(rules):
            raise TypeError("Recipe: rules must be Rule objects, or transforms only, got both")
        if not rules:
            raise ValueError("Recipe: rules must not be empty")
        transforms: list[Any] = loose
        made: Any = (Rule(*transforms),) if loose else rules
        object.__setattr__(self, "rules", tuple(made))
        for name, value in (("skip_first", skip_first), ("skip_last", skip_last)):
            if not isinstance(value, bool):
                raise TypeError(f"Recipe: {name} must be a bool, got {type(value).__name__}")
            object.__setattr__(self, name, value)

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Recipe:
        """Reads a file, if ``source`` is a path or a string that ends in ``.toml``, or else the text itself.

        Raises:
            OSError: the file cannot be read.
            ValueError, TypeError: it is not TOML, or not a recipe; the message says which key.
        """
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"Recipe.from_toml: source must be a path or text, got {type(source).__name__}")
        text, where = os.fspath(source), "recipe"
        from_file = isinstance(source, os.PathLike) or text.endswith(".toml")
        try:
            if from_file:
                where = os.fspath(source)
                with open(source, encoding="utf-8") as file:
                    text = file.read()
            return cls.from_dict(tomllib.loads(text))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{where}: not TOML: {error}") from None
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> Recipe:
        """From what :meth:`to_dict` gives."""
        _check_keys("recipe", contents, ("skip_first", "skip_last", "rule"))
        entries = contents.get("rule", [])
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise TypeError("rule must be a list of tables ([[rule]] in TOML)")
        kinds = {kind.__name__: kind for kind in TRANSFORMS}
        rules = []
        for number, entry in enumerate(entries, 1):
            where = f"rule {number}"
            _check_keys(where, entry, ("layers", "exclude", *kinds))
            transforms = [_transform(f"{where}: {key}", kinds[key], entry[key]) for key in entry if key in kinds]
            try:
                rules.append(Rule(*transforms, layers=entry.get("layers", "*"), exclude=entry.get("exclude", ())))
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
        return cls(*rules, **{key: contents[key] for key in ("skip_first", "skip_last") if key in contents})

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON and TOML can hold.

        Raises:
            TypeError: a rule has a predicate, which has no text.
        """
        entries = []
        for rule in self.rules:
            if callable(rule.layers) or callable(rule.exclude):
                raise TypeError("Recipe.to_dict: rules must go by names, got a predicate")
            entry: dict[str, Any] = {"layers": list(rule.layers), "exclude": list(rule.exclude)}
            entry |= {type(each).__name__: dataclasses.asdict(each) for each in rule.transforms}
            entries.append({key: _without_none(value) for key, value in entry.items()})
        contents = {"skip_first": self.skip_first, "skip_last": self.skip_last, "rule": entries}
        return json.loads(json.dumps(contents))  # tuples become lists


def as_recipe(where: str, recipe: Any) -> Recipe:
    """A recipe from one, a rule, a transform or several of these."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (Rule, *TRANSFORMS)):
        rules: list[Any] = [recipe]
    elif isinstance(recipe, Iterable) and not isinstance(recipe, (str, bytes)):
        rules = list(recipe)
    else:
        raise TypeError(f"{where}: recipe must be a Recipe, rules or transforms, got {type(recipe).__name__}")
    return Recipe(*rules)


def _patterns(argument: str, layers: Any) -> tuple[str, ...] | Predicate:
    if callable(layers):
        return layers
    patterns = (layers,) if isinstance(layers, str) or not isinstance(layers, Iterable) else tuple(layers)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"Rule: {argument} must be names, a predicate, or none, got {layers!r}")
    return patterns


def _matches(layers: tuple[str, ...] | Predicate, name: str, module: nn.Module) -> bool:
    if callable(layers):
        return bool(layers(name, module))
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in layers)


def _check_keys(where: str, contents: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    if not isinstance(contents, Mapping):
        raise TypeError(f"{where} must be a table, got {type(contents).__name__}")
    if unknown := [key for key in contents if key not in allowed]:
        raise ValueError(f"{where}: keys must be of {', '.join(allowed)}, got {', '.join(map(str, unknown))}")


def _transform(where: str, kind: type[Any], options: Any) -> Any:
    if not isinstance(options, Mapping):
        raise TypeError(f"{where} must be a table of options, got {options!r}")
    _check_keys(where, options, tuple(field.name for field in dataclasses.fields(kind)))
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _without_none(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value
