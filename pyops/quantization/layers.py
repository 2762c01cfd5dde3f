"""Convolution and linear layer with fake-quantised weights, and the parametrization for any other layer."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tersor.quantization._quantizer import check_bits
from tersor.quantization.percentile_bounds import check_percentile
from tersor.quantization.weight_fake_quantize import MODES, weight_fake_quantize


class WeightFakeQuantize(nn.Module):
    """:func:`weight_fake_quantize` as a parametrization.

    ``torch.nn.utils.parametrize.register_parametrization(layer, "weight", WeightFakeQuantize(4))`` quantises the
    weight of any layer.

    Args:
        bits, mode, percentile: see :func:`weight_fake_quantize`.
    """

    def __init__(self, bits: int, mode: str = "symmetric", percentile: float = 99.0) -> None:
        super().__init__()
        self.bits = check_bits("WeightFakeQuantize", bits)
        if mode not in MODES:
            raise ValueError(f"WeightFakeQuantize: mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.mode, self.percentile = mode, check_percentile("WeightFakeQuantize", percentile)

    def forward(self, weight: Tensor) -> Tensor:
        return weight_fake_quantize(weight, self.bits, self.mode, self.percentile)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, mode={self.mode!r}"


class _Quantized:
    """What the quantised layers add to torch's; not a module, so that the state dict stays torch's own."""

    stage: str
    weight: Tensor
    activation: nn.Module | None

    def _configure(self, bits: int, mode: str, percentile: float, activation: nn.Module | None) -> None:
        self.quantize_weight = WeightFakeQuantize(bits, mode, percentile)
        self.activation = activation
        self.stage = "dynamic"  # see BoundedActivation; in "float" and "record" the weight is not quantised

    @property
    def bits(self) -> int:
        return self.quantize_weight.bits

    def quantized_weight(self) -> Tensor:
        """The weight as this stage's forward pass uses it."""
        return self.weight if self.stage in ("float", "record") else self.quantize_weight(self.weight)

    def quantized_input(self, input: Tensor) -> Tensor:
        return input if self.activation is None else self.activation(input)


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """``torch.nn.Conv2d`` with a fake-quantised weight and, if given, a quantiser for its input.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``.
        bits, mode, percentile: see :func:`weight_fake_quantize`.
        activation: applied to the input, such as :class:`BoundedActivation`.
    """

    def __init__(
        self,
        *args: Any,
        bits: int = 8,
        mode: str = "symmetric",
        percentile: float = 99.0,
        activation: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._configure(bits, mode, percentile, activation)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedLinear(_Quantized, nn.Linear):
    """``torch.nn.Linear`` with a fake-quantised weight and, if given, a quantiser for its input.

    Args:
        args, kwargs: as for ``torch.nn.Linear``.
        bits, mode, percentile: see :func:`weight_fake_quantize`.
        activation: applied to the input.
    """

    def __init__(
        self,
        *args: Any,
        bits: int = 8,
        mode: str = "symmetric",
        percentile: float = 99.0,
        activation: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._configure(bits, mode, percentile, activation)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"
