"""The published way to quantise with trainable bounds, in eager torch: the baseline of the benchmarks.

About seven passes over an activation and a test for NaN that waits for the result; each weight goes to the host to be
sorted twice in every forward pass.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tersor.quantization import BoundedActivation, QuantizedConv2d, QuantizedLinear


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def fake_quantize_bounds_chain(
    input: Tensor, lower: Tensor, upper: Tensor, bits: int, relu: bool = False, check: bool = True
) -> Tensor:
    """What :func:`tersor.fake_quantize_bounds` computes, operation by operation.

    Args:
        input, lower, upper, bits, relu: as there; they are not checked here.
        check: stop at NaN, as published. What is compiled goes without, since it cannot branch on data.

    Raises:
        ValueError: the output has a NaN.
    """
    x = torch.relu(input) if relu else input
    scale = (2**bits - 1) / (upper - lower)
    zero = _Round.apply(scale * lower) + 2 ** (bits - 1)
    clipped = torch.max(torch.min(x.to(upper.dtype), upper), lower)
    output = (_Round.apply(scale * clipped - zero) + zero) / scale
    if check and torch.isnan(output).any():
        raise ValueError("fake_quantize_bounds_chain: the output has a NaN")
    return output.to(input.dtype)


def weight_fake_quantize_chain(weight: Tensor, bits: int, percentile: float = 99.0) -> Tensor:
    """What :func:`tersor.weight_fake_quantize` computes with ``mode="percentile"``, sorted on the host."""
    on_host = weight.detach().cpu().numpy()
    lower, upper = (
        torch.tensor([np.percentile(on_host, p)], dtype=torch.float32, device=weight.device)
        for p in (100 - percentile, percentile)
    )
    return fake_quantize_bounds_chain(weight, lower, upper, bits)


class EagerBoundedActivation(nn.Module):
    """A :class:`tersor.BoundedActivation` computed by :func:`fake_quantize_bounds_chain`; shares its parameters."""

    def __init__(self, activation: BoundedActivation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        input = torch.relu(input) if relu else input
        lower, upper = self.activation.bounds(input)
        return fake_quantize_bounds_chain(input, lower, upper, self.activation.bits)


class EagerWeightFakeQuantize(nn.Module):
    """:func:`weight_fake_quantize_chain` in place of a layer's own quantiser."""

    def __init__(self, bits: int, percentile: float) -> None:
        super().__init__()
        self.bits, self.percentile = bits, percentile

    def forward(self, weight: Tensor) -> Tensor:
        return weight_fake_quantize_chain(weight, self.bits, self.percentile)


def make_eager_(model: nn.Module) -> nn.Module:
    """Replaces every quantiser of activations and of percentile weights by the published chain, in place."""
    wrapped: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BoundedActivation):
            model.set_submodule(name, wrapped.setdefault(id(module), EagerBoundedActivation(module)))
        elif isinstance(module, (QuantizedConv2d, QuantizedLinear)) and module.quantize_weight.mode == "percentile":
            chain = EagerWeightFakeQuantize(module.bits, module.quantize_weight.percentile)
            module.quantize_weight = chain  # type: ignore[assignment]
    return model
