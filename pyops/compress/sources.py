"""Models by name: of this package, torchvision, timm and transformers, where these are installed."""

from __future__ import annotations

import importlib
import inspect
import json
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
            ValueError: there is no such place.
        """
        place, colon, name = text.partition(":")
        source = cls(place, name, options) if colon else cls("tersor", text, options)
        if source.place not in PLACES or (not source.name.isidentifier() and source.place != "timm"):
            raise ValueError(f"model must be NAME or PLACE:NAME with a place of {', '.join(PLACES)}, got {text!r}")
        return source

    def build(self) -> nn.Module:
        """The model with its initial weights.

        Raises:
            ImportError: the place is not installed.
            ValueError: it has no such model, or the options do not suit it.
        """
        if self.place not in PLACES:
            raise ValueError(f"model: place must be one of {', '.join(PLACES)}, got {self.place!r}")
        folder = {"tersor": ".models", "torchvision": ".models"}.get(self.place, "")
        try:
            module = importlib.import_module(self.place + folder)
        except ImportError as error:
            raise ImportError(f"model {self}: {self.place} cannot be imported: {error}") from error
        try:
            return self._build(module)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"model {self} with {dict(self.options)}: {error}") from error

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"

    def _build(self, module: Any) -> nn.Module:
        if self.place == "timm":
            return module.create_model(self.name, pretrained=False, **self.options)
        build = getattr(module, self.name, None)
        if self.place == "transformers":
            if not (inspect.isclass(build) and issubclass(build, nn.Module) and getattr(build, "config_class", None)):
                raise ValueError(f"model: transformers has no model class {self.name!r}")
            return build(build.config_class(**self.options))  # type: ignore[attr-defined]
        known = module.list_models() if self.place == "torchvision" else module.__all__
        if self.name not in known or not callable(build):
            raise ValueError(f"model: {self.place} has no model {self.name!r}")
        model = build(**({"weights": None} if self.place == "torchvision" else {}), **self.options)
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: {self.place}:{self.name} builds no model, but {type(model).__name__}")
        return model

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON can hold."""
        return json.loads(json.dumps({"place": self.place, "name": self.name, "options": dict(self.options)}))

    @classmethod
    def from_dict(cls, contents: Any) -> ModelSource:
        """From what :meth:`to_dict` gives; raises ValueError for anything else."""
        keys = {"place": str, "name": str, "options": dict}
        if not isinstance(contents, dict) or set(contents) != set(keys):
            raise ValueError(f"model must have {', '.join(keys)}, got {contents!r}")
        if wrong := [key for key, kind in keys.items() if not isinstance(contents[key], kind)]:
            raise ValueError(f"model: {', '.join(wrong)} must be of another type, got {contents!r}")
        return cls(contents["place"], contents["name"], contents["options"])


def first_tensor(output: Any) -> torch.Tensor:
    """The logits of what a model returned: a tensor, a tuple's first, or the ``logits`` of transformers' outputs."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(getattr(output, "logits", None), torch.Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output:
        return first_tensor(output[0])
    raise TypeError(f"model must return a tensor, or something with one in it, got {type(output).__name__}")
