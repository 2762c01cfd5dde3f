"""A prepared ``torch.nn.Sequential`` runs: it calls what prepare_ adds to it as well."""

from __future__ import annotations

import torch
from torch import nn

from tersor import compress


def test_a_sequential_model_runs_prepared_and_converted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    images = torch.randn(4, 3, 8, 8)
    compress.prepare_(model, compress.FakeQuantize(4))
    compress.calibrate_(model, images)
    expected = model.eval()(images)
    assert expected.shape == (4, 4)
    compress.convert_(model)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
