"""Models of torchvision, timm and transformers, small and with random weights, all the way to a file and back.

Where a package is not installed its models are skipped; transformers is among the test requirements.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed import assert_packed, inputs_of
from torch import Tensor, nn

from tersor import compress
from tersor.compress import FakeQuantize, ModelSource, NMSparse, Recipe, Rule, WindowAttentionByIndex, first_tensor
from tersor.compress.layers import CompressedLayer

HIDDEN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HIDDEN |= {"image_size": 32, "patch_size": 8, "num_labels": 4}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 4}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 4, "image_size": 32}
SMALL = {"num_classes": 4}
# Name, options, size of the images; and how many layers at least are compressed.
ZOO: list[tuple[str, dict[str, Any], int, int]] = [
    ("torchvision:resnet18", SMALL, 32, 18),
    ("torchvision:mobilenet_v2", SMALL, 32, 50),
    ("torchvision:mobilenet_v3_small", SMALL, 32, 50),
    ("torchvision:efficientnet_b0", SMALL, 32, 75),
    ("torchvision:regnet_y_400mf", SMALL, 32, 60),
    ("torchvision:convnext_tiny", SMALL, 32, 57),
    ("torchvision:vit_b_16", {"image_size": 32, **SMALL}, 32, 24),
    ("torchvision:swin_t", SMALL, 32, 50),
    ("torchvision:swin_v2_t", SMALL, 32, 25),
    ("timm:vit_tiny_patch16_224", {"img_size": 32, **SMALL}, 32, 48),
    ("timm:beit_base_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, **SMALL}, 32, 6),
    ("timm:resnet18", SMALL, 32, 18),
    ("timm:convnext_atto", SMALL, 32, 30),
    ("timm:swin_tiny_patch4_window7_224", {"img_size": 56, **SMALL}, 56, 50),
    ("timm:mobilenetv3_small_100", SMALL, 32, 40),
    ("transformers:ViTForImageClassification", HIDDEN, 32, 12),
    ("transformers:DeiTForImageClassification", HIDDEN, 32, 12),
    ("transformers:BeitForImageClassification", HIDDEN, 32, 12),
    ("transformers:SwinForImageClassification", {**SWIN, "num_labels": 4}, 32, 18),
    ("transformers:ResNetForImageClassification", RESNET, 32, 4),
    ("transformers:ConvNextForImageClassification", CONVNEXT, 32, 4),
]


def build(name: str, options: dict[str, Any]) -> tuple[ModelSource, nn.Module]:
    source = ModelSource.parse(name, **options)
    if importlib.util.find_spec(source.place) is None:
        pytest.skip(f"{source.place} is not installed")
    torch.manual_seed(0)
    return source, source.build()


def run(model: nn.Module, images: Tensor) -> Tensor:
    return first_tensor(model(images))


def recipe_for(model: nn.Module) -> Recipe:
    """4 bits; 2:4 where the channels allow it; torchvision's window attention by index."""

    def in_fours(name: str, module: Any) -> bool:
        return module.weight.shape[1] % 4 == 0 and name.endswith(("fc1", "0", "1", "dense", "conv2"))

    rules = [Rule(FakeQuantize(4))]
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    names = {id(module): name for name, module in model.named_modules()}
    if any(in_fours(names[id(module)], module) for module in layers[1:-1]):
        rules.append(Rule(FakeQuantize(4), NMSparse(2, 4), layers=in_fours))
    if any(type(module).__name__ == "ShiftedWindowAttention" for module in model.modules()):
        rules.append(Rule(WindowAttentionByIndex()))
    return Recipe(*rules)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "size", "least"), ZOO, ids=[each[0] for each in ZOO])
def test_to_a_file_and_back(name: str, options: dict[str, Any], size: int, least: int, tmp_path: Path) -> None:
    source, model = build(name, options)
    images, labels = torch.randn(4, 3, size, size), torch.arange(4)
    run(model.train(), images)  # so that running statistics are those of such images
    recipe = recipe_for(model)
    compress.prepare_(model, recipe, steps=1)
    compress.calibrate_(model.train(), images)
    optimizer = torch.optim.SGD(compress.parameter_groups(model), lr=1e-3)
    F.cross_entropy(run(model, images), labels).backward()
    trained = [module for module in model.modules() if isinstance(module, CompressedLayer)]
    assert len(trained) >= least
    assert all(module.weight.grad is not None for module in trained)
    optimizer.step()
    compress.step(model)
    model.eval()
    inputs = inputs_of(model, images)
    with torch.no_grad():
        expected = run(model, images)
        packed = compress.convert_(copy.deepcopy(model), fold_norms=False)
        for each, input in inputs.items():
            assert_packed(model.get_submodule(each), packed.get_submodule(each), input)
        compress.convert_(model)
        output = run(model, images)
        # Rounding that crosses a threshold grows through dozens of layers of 4 bits, but stays far below the signal.
        assert (output - expected).norm() < 0.2 * expected.norm()
        compress.save(model, tmp_path / "model", source, {"size": size})
        loaded = compress.load(tmp_path / "model")
        assert torch.equal(run(loaded, images), output)
    stored = sum(value.nbytes for value in model.state_dict().values())
    assert stored < (tmp_path / "model").stat().st_size < stored + 2**18
    norms = [each for each, module in model.named_modules() if type(module) is nn.BatchNorm2d]
    assert len(norms) == (1 if name.startswith("transformers:ResNet") and norms else 0)


def test_torchvisions_multihead_attention_is_left_alone() -> None:
    _, model = build("torchvision:vit_b_16", {"image_size": 32})
    compress.prepare_(model, FakeQuantize(4))
    skipped: Any = model.compression.skipped  # type: ignore[union-attr]
    projections = [name for name in skipped if name.endswith("self_attention.out_proj")]
    assert len(projections) == 12
    assert {skipped[name] for name in projections} == {"MultiheadAttention computes with its weight directly"}


def test_torchvisions_swin_by_index_computes_the_same() -> None:
    _, model = build("torchvision:swin_t", {"num_classes": 4})
    model.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        compress.prepare_(model, WindowAttentionByIndex())
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    _, model = build("torchvision:swin_t", {"num_classes": 4})
    compress.prepare_(model, FakeQuantize(4))  # without it, its projections cannot be reached
    reasons = set(model.compression.skipped.values())  # type: ignore[union-attr]
    assert "ShiftedWindowAttention computes with its weight directly" in reasons
