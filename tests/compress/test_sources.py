"""Models by name: where they are from, and that a name from a file runs, reads and fetches nothing else."""

from __future__ import annotations

import sys
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from tersor import models
from tersor.compress import ModelSource, first_tensor
from tersor.compress.sources import PLACES, _makes_model


def test_names_with_and_without_a_place() -> None:
    assert ModelSource.parse("resnet20", width=8) == ModelSource("tersor", "resnet20", {"width": 8})
    assert ModelSource.parse("torchvision:vit_b_16") == ModelSource("torchvision", "vit_b_16", {})
    source = ModelSource.parse("timm:vit_tiny_patch16_224.augreg_in21k", num_classes=3)
    assert source == ModelSource("timm", "vit_tiny_patch16_224.augreg_in21k", {"num_classes": 3})
    assert str(source) == "timm:vit_tiny_patch16_224.augreg_in21k"
    assert ModelSource.from_dict(source.to_dict()) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("os:system", "place of tersor, torchvision, timm, transformers: place must be one of"),
        (":resnet20", "place must be one of"),
        ("timm:hf-hub:somebody/model", "name must be a model's, got 'hf-hub:somebody/model'"),
        ("timm:local-dir:/tmp", "name must be a model's"),
        ("transformers:hub/model", "name must be a model's"),
        ("torchvision:vit_b_16.x", "name must be a model's"),
        ("tersor:__class__", "name must be a model's"),
        ("", "name must be a model's, got ''"),
        ("resnet 20", "name must be a model's"),
    ],
)
def test_what_cannot_be_a_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSource.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"pretrained": True},
        {"pretrained_cfg": {"url": "x"}},
        {"weights": "DEFAULT"},
        {"weights_backbone": "DEFAULT"},
        {"checkpoint_path": "/etc/passwd"},
        {"use_pretrained_backbone": True},
        {"backbone_config": {"pretrained": True}},
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "eager"},
        {"trust_remote_code": True},
        {"cache_dir": "/tmp"},
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_options_that_would_fetch_something_are_refused(place: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="options must be of the architecture only"):
        ModelSource(place, "model", options).build()


def test_every_builder_of_this_package_is_one_and_nothing_else() -> None:
    builders = {name for name in models.__all__ if _makes_model(getattr(models, name))}
    others = set(models.__all__) - builders
    assert {"resnet20", "deit_tiny", "ResNet", "uformer_tiny", "edsr_tiny"} <= builders
    assert all(
        name.endswith("_loss")
        or name.split("_")[0] in {"load", "register", "attention", "draw", "subnetwork", "pad", "model", "token"}
        for name in others
    ), others
    for name in others:
        with pytest.raises(ValueError, match=f"tersor has no model '{name}'"):
            ModelSource("tersor", name, {}).build()
    with pytest.raises(ValueError, match=r"resnet20 with {'wide': 3}: TypeError: .*unexpected keyword argument 'wide'"):
        ModelSource("tersor", "resnet20", {"wide": 3}).build()
    with pytest.raises(ValueError, match=r"resnet20 with {'width': '3'}"):
        ModelSource("tersor", "resnet20", {"width": "3"}).build()
    assert ModelSource("tersor", "resnet20", {"width": 4, "num_classes": 3}).build()(torch.randn(1, 3, 8, 8)).shape == (
        1,
        3,
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_how_the_other_packages_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins, which keep what they are given; the packages themselves are in test_zoo.py."""
    calls: list[Any] = []

    def detector(*, weights: Any = "DEFAULT", weights_backbone: Any = "DEFAULT", **options: Any) -> nn.Module:
        calls.append((weights, weights_backbone, options))
        return nn.Linear(1, 1)

    def fails(**options: Any) -> nn.Module:
        raise ZeroDivisionError("by nought")

    stand_in(monkeypatch, "torchvision")
    stand_in(
        monkeypatch,
        "torchvision.models",
        detector=detector,
        fails=fails,
        hidden=detector,
        text=lambda: "text",
        list_models=lambda: ["detector", "fails", "text"],
    )
    assert isinstance(ModelSource("torchvision", "detector", {"classes": 3}).build(), nn.Linear)
    assert calls.pop() == (None, None, {"classes": 3})
    for name, message in (
        ("hidden", "torchvision has no model 'hidden'"),
        ("fails", "ZeroDivisionError: by nought"),
        ("text", "builds no model, but str"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelSource("torchvision", name, {}).build()

    stand_in(monkeypatch, "timm", create_model=lambda name, **options: calls.append((name, options)) or nn.Linear(1, 1))
    ModelSource("timm", "vit", {"img_size": 32}).build()
    assert calls.pop() == ("vit", {"pretrained": False, "img_size": 32})

    class Config:
        use_pretrained_backbone = True

        def __init__(self, **options: Any) -> None:
            self.options = options

    class Model(nn.Module):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__()
            calls.append(config)

    stand_in(monkeypatch, "transformers", Model=Model, Config=Config, Plain=nn.Linear, pipeline=lambda: None)
    ModelSource("transformers", "Model", {"hidden_size": 8}).build()
    assert calls[0].options == {"hidden_size": 8}
    assert not calls.pop().use_pretrained_backbone
    for name in ("Config", "Plain", "pipeline", "nowhere"):
        with pytest.raises(ValueError, match=f"transformers has no model class '{name}'"):
            ModelSource("transformers", name, {}).build()


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="model timm:vit: timm cannot be imported"):
        ModelSource("timm", "vit", {}).build()


def test_the_logits_of_what_models_return() -> None:
    class Output(NamedTuple):
        loss: None
        logits: torch.Tensor

    x = torch.zeros(2, 3)
    for output in (x, (x, None), [x], Output(None, x), ((x,), 1)):
        assert first_tensor(output) is x
    for output in (None, (), {"a": x}, "x"):
        with pytest.raises(TypeError, match="model must return a tensor, or something with one in it"):
            first_tensor(output)
