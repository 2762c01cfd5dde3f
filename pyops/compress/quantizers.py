"""The quantisers inside compressed layers: bounds of the input, steps and levels of the weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tersor.compress.sharded import assign_, whole
from tersor.freezing.layers import LtsWeight
from tersor.freezing.lts_quantize import lts_quantize
from tersor.quantization._quantizer import exact_dtype
from tersor.quantization.fake_quantize_bounds import fake_quantize_bounds
from tersor.quantization.fake_quantize_lsq import fake_quantize_lsq, quant_range
from tersor.quantization.percentile_bounds import percentile_bounds
from tersor.quantization.weight_fake_quantize import weight_fake_quantize

LEAST_STEP = torch.finfo(torch.float32).tiny ** 0.5  # so that a channel of zeros has a positive one


class InputBounds(nn.Module):
    """Rounds an input to ``2**bits`` levels between two learned bounds, see :func:`tersor.fake_quantize_bounds`.

    The bounds' gradients are divided by sqrt(n features) with n = 2^bits - 1, as LSQ does with its step's (arXiv
    1902.08153), so that one learning rate serves weights and bounds.

    Args:
        bits: 2 to 8.
        percentile: the first bounds are this percentile of a batch and its opposite.
    """

    calibrated: Tensor

    def __init__(self, bits: int, percentile: float) -> None:
        super().__init__()
        self.bits, self.percentile = bits, percentile
        # One element each, not none: FSDP2 takes no parameter without dimensions.
        self.lower, self.upper = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        self.calibrating = False
        self.found: Tensor | None = None  # while calibrating

    def forward(self, input: Tensor) -> Tensor:
        if self.calibrating:
            self._calibrate(input)
        factor = (max(math.prod(input.shape[1:]), 1) * (2**self.bits - 1)) ** -0.5 if self.training else 1.0
        try:
            return fake_quantize_bounds(input, self.lower, self.upper, self.bits, grad_scale=factor)
        except ValueError as error:
            if torch.compiler.is_compiling() or self.calibrated:
                raise
            raise ValueError(
                f"bounds are not set: run tersor.compress.calibrate_(model, batch) before training ({error})"
            ) from None

    @torch.no_grad()
    def _calibrate(self, input: Tensor) -> None:
        lower, upper = percentile_bounds(input.float(), self.percentile)
        if not upper > lower:  # as for an input with a few numbers that are not zero
            lower, upper = (bound.reshape_as(lower) for bound in input.float().aminmax())
        if not upper > lower:  # a constant input: any interval that holds it and 0
            lower, upper = lower.clamp(max=0), upper.clamp(min=0) + (lower == 0) * 1e-3
        self.found = torch.cat([lower.reshape(1), upper.reshape(1)])
        self.set_(self.found)

    @torch.no_grad()
    def set_(self, bounds: Tensor) -> None:
        """Sets lower and upper bound, ``(2,)``."""
        assign_(self.lower, bounds[:1])
        assign_(self.upper, bounds[1:])
        self.calibrated.fill_(True)

    @torch.no_grad()
    def keep_valid_(self) -> None:
        """Swaps bounds that training has moved across each other."""
        _order_(self.lower, self.upper)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class LsqWeight(nn.Module):
    """Rounds a weight to whole multiples of learned steps, one for each output channel; see :func:`fake_quantize_lsq`.

    Args:
        weight: for shape, dtype and device, and the first steps 2 mean\\|w\\| / sqrt(Qp) with Qp = 2^(bits-1) - 1.
        bits: 2 to 8.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        shape = (weight.shape[0], *(1,) * (weight.dim() - 1))
        # Exact also for a weight in half precision, whose steps could be too small for it.
        self.scale = nn.Parameter(weight.new_empty(shape, dtype=exact_dtype(weight.dtype)).detach())
        self.initialize_(weight)

    @torch.no_grad()
    def initialize_(self, weight: Tensor) -> None:
        weight = whole(weight).to(self.scale.dtype)
        mean = weight.abs().mean(dim=tuple(range(1, weight.dim())), keepdim=True)
        assign_(self.scale, 2 * mean / quant_range(self.bits, True)[1] ** 0.5)
        self.keep_valid_()

    @torch.no_grad()
    def keep_valid_(self) -> None:
        """Makes steps positive that training has moved below zero, which a large learning rate does."""
        self.scale.abs_().clamp_(min=LEAST_STEP)

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize_lsq(weight, self.scale, self.bits, signed=True)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class PercentileWeight(nn.Module):
    """Rounds a weight between its 99th percentile and its opposite, see :func:`tersor.weight_fake_quantize`."""

    percentile = 99.0

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return weight_fake_quantize(weight, self.bits, "percentile", self.percentile)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class FreezingWeight(LtsWeight):
    """Rounds a weight to 2^bits levels between two learned bounds, multiplied back by half their distance.

    Unlike in :class:`tersor.freezing.LtsWeight` the forward pass leaves the freezing state alone, so that it may run
    any number of times (activation checkpointing, gradient accumulation); :meth:`move_on` is one step of it.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__(weight, bits)
        self.lower = nn.Parameter(self.lower.detach().reshape(1))
        self.upper = nn.Parameter(self.upper.detach().reshape(1))
        self.initialize_(weight)

    @torch.no_grad()
    def initialize_(self, weight: Tensor) -> None:
        spread = (3 * whole(weight).std(unbiased=False)).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        self._initialize(-spread, spread)

    @torch.no_grad()
    def _initialize(self, lower: Tensor, upper: Tensor) -> None:
        assign_(self.lower, lower)
        assign_(self.upper, upper)
        self.initialized.fill_(True)

    @torch.no_grad()
    def keep_valid_(self) -> None:
        """As of :class:`InputBounds`."""
        _order_(self.lower, self.upper)

    @property
    def half_range(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def forward(self, weight: Tensor) -> Tensor:
        dtype, exact = weight.dtype, self.distance.dtype  # FSDP2 may give everything in half precision
        lower, upper = _as(exact, self.lower), _as(exact, self.upper)
        if self.training:  # like LSQ's step, so that one learning rate serves weights and bounds
            factor = (weight.numel() * (2**self.bits - 1)) ** -0.5
            lower, upper = _ScaledGradient.apply(lower, factor), _ScaledGradient.apply(upper, factor)
        assert self.saved is not None
        levels = lts_quantize(_as(self.saved.dtype, weight), self.state, lower, upper, self.bits)
        return _as(dtype, levels) * _as(dtype, (upper - lower) / 2)

    @torch.no_grad()
    def move_on(self, weight: Tensor) -> None:
        """A step of the schedule: distances move, and what has settled freezes."""
        if self.schedule is not None:
            weight, lower, upper = (whole(tensor.detach()) for tensor in (weight, self.lower, self.upper))
            lts_quantize(weight, self.state, lower, upper, self.bits, self.schedule)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """In that dtype; without a node in an exported graph where it is so already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _order_(lower: Tensor, upper: Tensor) -> None:
    """The lesser first; without waiting for a device."""
    least = torch.minimum(lower, upper)
    upper.copy_(torch.maximum(lower, upper))
    lower.copy_(least)


class _ScaledGradient(torch.autograd.Function):
    """The input itself; its gradient times a factor."""

    @staticmethod
    def forward(input: Tensor, factor: float) -> Tensor:
        return input.view_as(input)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None
