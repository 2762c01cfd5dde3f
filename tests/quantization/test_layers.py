"""Layers with quantised weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tersor.quantization import (
    BoundedActivation,
    QuantizedConv2d,
    QuantizedLinear,
    WeightFakeQuantize,
    weight_fake_quantize,
)


@pytest.mark.parametrize("mode", ["symmetric", "minmax", "percentile"])
def test_convolution(mode: str) -> None:
    torch.manual_seed(0)
    activation = BoundedActivation(4, 4)
    layer = QuantizedConv2d(4, 6, 3, padding=1, stride=2, groups=2, bits=3, mode=mode, activation=activation)
    x = torch.randn(2, 4, 7, 7)
    weight = weight_fake_quantize(layer.weight, 3, mode)
    expected = F.conv2d(activation(x), weight, layer.bias, stride=2, padding=1, groups=2)
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_linear_and_padding_modes() -> None:
    torch.manual_seed(0)
    layer, x = QuantizedLinear(5, 3, bits=4), torch.randn(2, 5)
    assert torch.equal(layer(x), F.linear(x, weight_fake_quantize(layer.weight, 4), layer.bias))
    plain = nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect")
    quantized = QuantizedConv2d(3, 2, 3, padding=1, padding_mode="reflect", bits=32)
    quantized.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 6, 6)
    assert torch.equal(quantized(image), plain(image))


def test_state_dict_is_torchs_own() -> None:
    assert set(QuantizedConv2d(3, 2, 3).state_dict()) == set(nn.Conv2d(3, 2, 3).state_dict())


def test_parametrization_takes_any_layer() -> None:
    layer = nn.Conv1d(3, 4, 3)
    weight = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", WeightFakeQuantize(2))
    assert torch.equal(layer.weight, weight_fake_quantize(weight, 2))
    layer(torch.randn(1, 3, 5)).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None
    parametrize.remove_parametrizations(layer, "weight")
    assert len(layer.weight.unique()) <= 3


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="mode must be one of symmetric, minmax, percentile, got 'max'"):
        QuantizedLinear(2, 2, mode="max")
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for none, got 9"):
        QuantizedConv2d(2, 2, 1, bits=9)
