"""torch.export of prepared models in evaluation and of converted ones: the operators stay, any batch, same output."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from compressed_models import Several, images, trained

from tersor import compress

BATCH = torch.export.Dim("batch", min=1, max=512)


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """Both models with every transform between them, before and after conversion."""
    cases = [("resnet", "all"), ("resnet", "recu"), ("vit", "lsq-srste"), ("vit", "weight"), ("vit", "reste")]
    model = trained_several(cases)
    return {"prepared": model, "converted": compress.convert_(trained_several(cases))}


def trained_several(cases: list[tuple[str, str]]) -> torch.nn.Module:
    model = Several(cases)
    for _ in range(6):
        compress.step(model)
    return model.eval()


@pytest.mark.parametrize(("stage", "strict"), [("prepared", False), ("converted", False), ("converted", True)])
def test_any_batch(models: dict[str, torch.nn.Module], stage: str, strict: bool) -> None:
    model = models[stage]
    with torch.no_grad():
        program = torch.export.export(model, (images(4),), dynamic_shapes=({0: BATCH},), strict=strict)
        for batch in (1, 7):
            expected, actual = model(images(batch, 1)), program.module()(images(batch, 1))
            assert all(actual[name].equal(output) for name, output in expected.items())
    targets = {str(node.target) for node in program.graph.nodes}
    wanted = "fake_quantize_bounds_forward" if stage == "prepared" else "quantized_conv2d"
    assert f"tersor.{wanted}.default" in targets


def test_a_program_survives_its_file(models: dict[str, torch.nn.Module], tmp_path: Path) -> None:
    model = models["converted"]
    with torch.no_grad():
        program = torch.export.export(model, (images(4),))
        torch.export.save(program, tmp_path / "program.pt2")
        actual, expected = torch.export.load(tmp_path / "program.pt2").module()(images(4, 2)), model(images(4, 2))
    assert all(actual[name].equal(output) for name, output in expected.items())


def test_no_tensor_of_a_converted_model_has_a_gradient(models: dict[str, torch.nn.Module]) -> None:
    assert not [name for name, buffer in models["converted"].named_buffers() if buffer.requires_grad]
    copy.deepcopy(models["converted"])  # which refuses tensors that were computed with one


def test_the_forward_pass_of_training_exports_too() -> None:
    model = trained("resnet", "freeze").train()
    program = torch.export.export(model, (images(4),), strict=False)
    assert any("lts_quantize" in str(node.target) for node in program.graph.nodes)
