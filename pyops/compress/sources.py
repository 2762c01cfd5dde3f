"""Models by name: of this package, torchvision, timm and transformers, where these are installed."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

PLACES = ("tersor", "torchvision", "timm", "transformers")


class ModelSource(NamedTuple):
    """A model that can be built again: where it is from, its name there, and options.

    Attributes:
        place: ``"tersor"`` (:mod:`tersor.models`), ``"torchvision"``, ``"timm"``, or ``"transformers"`` (the name of a
            model class; the options are those of its configuration).
        name: such as ``"resnet20"``, ``"vit_b_16"``, ``"vit_small_patch16_224"``, ``"ViTForImageClassification"``.
        options: what the builder takes, of what JSON can hold.
    """

    place: str
    name: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, **options: Any) -> ModelSource:
        """From ``"place:name"``, or ``"name"`` for this package's.

        Raises:
            ValueError: there is no such place, or the name cannot be one.
        """
        place, colon, name = text.partition(":")
        source = cls(place, name, options) if colon else cls("tersor", text, options)
        if problem := source._problem():
            raise ValueError(f"model must be NAME or PLACE:NAME with a place of {', '.join(PLACES)}: {problem}")
        return source

    def build(self) -> nn.Module:
        """The model with its initial weights. Nothing is downloaded or read from files.

        Raises:
            ImportError: the place is not installed.
            ValueError: it has no such model, or the options do not suit it or ask for trained weights.
        """
        if problem := self._problem():
            raise ValueError(f"model: {problem}")
        folder = {"tersor": ".models", "torchvision": ".models"}.get(self.place, "")
        try:
            module = importlib.import_module(self.place + folder)
        except ImportError as error:
            raise ImportError(f"model {self}: {self.place} cannot be imported: {error}") from error
        try:
            model = self._build(module)
        except Exception as error:  # options come from files: a builder may raise anything for those that are wrong
            raise ValueError(f"model {self} with {dict(self.options)}: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: {self} builds no model, but {type(model).__name__}")
        return model

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"

    def _problem(self) -> str:
        """Why it cannot be built anywhere; empty if it can."""
        if self.place not in PLACES:
            return f"place must be one of {', '.join(PLACES)}, got {self.place!r}"
        if not re.fullmatch(r"[A-Za-z_][\w.]*" if self.place == "timm" else r"[A-Za-z]\w*", self.name):
            return f"name must be a model's, got {self.name!r}"
        return _options_problem(self.options)

    def _build(self, module: Any) -> Any:
        if self.place == "timm":
            return module.create_model(self.name, pretrained=False, **self.options)
        build = getattr(module, self.name, None)
        if self.place == "transformers":
            if not (inspect.isclass(build) and issubclass(build, nn.Module) and getattr(build, "config_class", None)):
                raise ValueError(f"model: transformers has no model class {self.name!r}")
            config = build.config_class(**self.options)  # type: ignore[attr-defined]
            if getattr(config, "use_pretrained_backbone", False):
                config.use_pretrained_backbone = False
            return build(config)
        if self.place == "torchvision":
            known = self.name in module.list_models()
            given = [name for name in ("weights", "weights_backbone") if name in _arguments(build)] if known else []
            options = dict.fromkeys(given)
        else:
            known, options = self.name in module.__all__ and _makes_model(build), {}
        if not known or not callable(build):
            raise ValueError(f"model: {self.place} has no model {self.name!r}")
        return build(**options, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON can hold."""
        try:
            return json.loads(json.dumps({"place": self.place, "name": self.name, "options": dict(self.options)}))
        except (TypeError, ValueError) as error:
            raise TypeError(f"model: options must be of what JSON can hold: {error}") from None

    @classmethod
    def from_dict(cls, contents: Any) -> ModelSource:
        """From what :meth:`to_dict` gives; raises ValueError for anything else."""
        keys = {"place": str, "name": str, "options": dict}
        if not isinstance(contents, dict) or set(contents) != set(keys):
            raise ValueError(f"model must have {', '.join(keys)}, got {contents!r}")
        if wrong := [key for key, kind in keys.items() if not isinstance(contents[key], kind)]:
            raise ValueError(f"model: {', '.join(wrong)} must be of another type, got {contents!r}")
        return cls(contents["place"], contents["name"], contents["options"])


def _options_problem(options: Any) -> str:
    """Options that would fetch weights, files or code are none of a model's architecture."""
    if not isinstance(options, Mapping):
        return ""
    for name, value in options.items():
        attention = name == "attn_implementation" and value not in ("eager", "sdpa")
        fetches = any(part in str(name) for part in ("pretrained", "weights", "checkpoint", "cache_dir", "remote"))
        if attention or fetches or str(name).startswith("_"):
            return f"options must be of the architecture only, got {name!r}"
        if problem := _options_problem(value):
            return problem
    return ""


def _arguments(build: Any) -> Any:
    return inspect.signature(build).parameters


def _makes_model(build: Any) -> bool:
    """Whether it is a class of models, or a function that says that it returns one."""
    made = build if inspect.isclass(build) else typing.get_type_hints(build).get("return")
    return inspect.isclass(made) and issubclass(made, nn.Module)


def first_tensor(output: Any) -> torch.Tensor:
    """The logits of what a model returned: a tensor, a tuple's first, or the ``logits`` of transformers' outputs."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0])
    raise TypeError(f"model must return a tensor, or something with one in it, got {type(output).__name__}")
