"""The plain quantiser that :mod:`tersor.models.train_sr` compares DDTB with: symmetric around 0, one learned range."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.models.edsr import EDSR, EDSRBlock
from tersor.quantization import QuantizedConv2d, WeightFakeQuantize, fake_quantize_lsq


class SymmetricActivation(nn.Module):
    r"""Fake-quantises an activation between -range and range, which is learned, to 2^bits - 1 levels around 0.

    output = R(clamp(input, -range, range) q / range) range / q with q = 2^(bits-1) - 1, the levels that
    :func:`weight_fake_quantize` gives to weights in its mode "symmetric". The first training batch sets the range to
    the 99th percentile of abs(input), which is what DDTB's bounds begin with but for the symmetry; from then on it
    learns, with the straight-through gradient: the sign of what is clipped, the rounding error of the rest.
    """

    calibrated: Tensor

    def __init__(self, bits: int, percentile: float = 99.0) -> None:
        super().__init__()
        self.bits, self.percentile = bits, percentile
        self.range = nn.Parameter(torch.ones(1))
        self.register_buffer("calibrated", torch.zeros(1))

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        input = torch.relu(input) if relu else input
        if self.training and not self.calibrated:
            self._calibrate(input)
        step = self.range / (2 ** (self.bits - 1) - 1)
        # LSQ's codes begin one lower, at -2^(bits-1): the maximum takes that level away.
        input = torch.maximum(input, -self.range)
        return fake_quantize_lsq(input, step, self.bits, signed=True, grad_factor=1.0)

    @torch.no_grad()
    def _calibrate(self, input: Tensor) -> None:
        # not torch.quantile: it refuses more than 2^24 elements
        values = input.abs().flatten().sort().values
        self.range.copy_(values[round((len(values) - 1) * self.percentile / 100)])
        self.calibrated.fill_(1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def make_symmetric_(model: EDSR, bits: int) -> EDSR:
    """Replaces all quantisers of a quantised EDSR, in place: weights symmetric up to their largest magnitude."""
    for block in model.body:
        if not isinstance(block, EDSRBlock):
            continue
        for name in ("quant_act1", "quant_act2", "quant_act3"):
            setattr(block, name, SymmetricActivation(bits))
        block.body[2] = block.quant_act2
        block.pairs = ()
    for layer in model.modules():
        if isinstance(layer, QuantizedConv2d):
            layer.quantize_weight = WeightFakeQuantize(bits, "symmetric")
    return model
