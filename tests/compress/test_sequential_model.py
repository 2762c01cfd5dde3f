"""A ``torch.nn.Sequential`` runs every module in it, also the one that keeps its compression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tersor import compress


def test_a_sequential_model_is_prepared_and_converted() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    images = torch.randn(2, 4, 6, 6)
    expected = plain(images)
    sparse = compress.NMSparse(2, 4, "srste")
    model = compress.prepare_(plain, compress.Recipe(compress.Rule(sparse, layers="0")))
    with torch.no_grad():
        assert not torch.equal(model(images), expected)
        trained = model(images)
        torch.testing.assert_close(compress.convert_(model)(images), trained, rtol=1e-5, atol=1e-5)


def test_a_sequential_model_is_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()

    input = torch.randn(3, 8)
    model = compress.prepare_(build(), compress.Recipe(compress.FakeQuantize(4), skip_first=False))
    compress.calibrate_(model, input)
    model = compress.convert_(model)
    compress.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(compress.load(tmp_path / "model.safetensors", build())(input), model(input))
