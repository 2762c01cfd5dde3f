"""Fake-quantisation of weights, with bounds taken from the weights themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import call_function, operator
from tersor.quantization._quantizer import check_bits, exact_dtype
from tersor.quantization.fake_quantize_bounds import check_bounds, differentiate_ddtb, quantize_ddtb
from tersor.quantization.percentile_bounds import check_percentile, interpolate_percentiles

MODES = ("symmetric", "minmax", "percentile")


def weight_fake_quantize(weight: Tensor, bits: int, mode: str = "symmetric", percentile: float = 99.0) -> Tensor:
    r"""Rounds all weights of a tensor to ``2**bits`` levels (``"symmetric"``: one less).

    With R rounding half to even:

    - ``mode="symmetric"``: m = max|weight| + 1e-8, q = 2^(bits-1) - 1, output = R(weight q / m) m / q, in this order.
    - ``mode="minmax"``: the ``"ddtb"`` rule of :func:`fake_quantize_bounds` between the least and the greatest weight.
    - ``mode="percentile"``: the same between the ``100 - percentile``-th and the ``percentile``-th percentile
      (:func:`percentile_bounds`).

    The bounds get no gradient. The weight's gradient is the incoming one; for ``"percentile"`` 0 outside the bounds
    and one half on them.

    Args:
        weight: any shape, at least one element; float16, bfloat16, float32 or float64.
        bits: 2 to 8; 32 returns the weight.
        mode: ``"symmetric"``, ``"minmax"`` or ``"percentile"``.
        percentile: from 50 to 100, for that mode.

    Returns:
        The shape, dtype and memory format of ``weight``. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: ``bits``, ``mode`` or ``percentile`` is not as stated, or the weight is empty; or, on the CPU, it
            has a non-finite bound or, but for ``"symmetric"``, equal ones.

    Source: Zhong et al., "Dynamic Dual Trainable Bounds for Ultra-low Precision Super-Resolution Networks", arXiv
    2203.03844.
    """
    return weight_fake_quantize_with_bounds(weight, bits, mode, percentile)[0]


def weight_fake_quantize_with_bounds(
    weight: Tensor, bits: int, mode: str = "symmetric", percentile: float = 99.0
) -> tuple[Tensor, Tensor]:
    """:func:`weight_fake_quantize` and its bounds ``(2,)``: lower and upper, without a gradient."""
    name = "weight_fake_quantize"
    check_floating(name, weight=weight)
    bits, percentile = check_bits(name, bits), check_percentile(name, percentile)
    if mode not in MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not weight.numel():
        raise ValueError(f"{name}: weight must have at least one element, got shape {tuple(weight.shape)}")
    if bits == 32:
        return weight, _bounds(weight, mode, percentile)
    try:
        return call_function(_WeightFakeQuantize, weight, bits, mode, percentile)
    except RuntimeError:
        # The C++ kernel refuses such values; here is said which. Reading them beforehand would cost every call.
        if weight.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_values(weight, mode, percentile)
        raise


def _bounds(weight: Tensor, mode: str, percentile: float) -> Tensor:
    exact = weight.detach().to(exact_dtype(weight.dtype))
    if mode == "symmetric":
        largest = exact.abs().max() + 1e-8
        return torch.stack([-largest, largest])
    if mode == "minmax":
        return torch.stack(exact.aminmax())
    return torch.cat(interpolate_percentiles(exact, percentile))


def _check_values(weight: Tensor, mode: str, percentile: float) -> None:
    bounds = _bounds(weight, mode, percentile)
    if mode != "symmetric" and bounds[0] == bounds[1]:
        raise ValueError(
            f"weight_fake_quantize: weight must have unequal bounds for mode {mode!r}, got {bounds[0].item()} for both"
        )
    check_bounds(bounds[0], bounds[1], "weight_fake_quantize")


def _reference(weight: Tensor, bits: int, mode: str, percentile: float) -> tuple[Tensor, Tensor]:
    bounds = _bounds(weight, mode, percentile)
    if weight.device.type == "cpu":
        _check_values(weight, mode, percentile)
    exact = weight.to(bounds.dtype)
    if mode == "symmetric":
        levels, largest = torch.full_like(bounds[1], 2 ** (bits - 1) - 1), bounds[1]
        output = torch.round(exact * levels / largest) * largest / levels
    else:
        output = quantize_ddtb(exact, bounds[0], bounds[1], bits)[0]
    return torch.empty_like(weight).copy_(output), bounds


def _reference_backward(grad_output: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    grad, exact = grad_output.to(bounds.dtype), weight.to(bounds.dtype)
    return torch.empty_like(weight).copy_(differentiate_ddtb(grad, exact, bounds[0], bounds[1], 2, "half")[0])


def _fake(weight: Tensor, bits: int, mode: str, percentile: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty((2,), dtype=exact_dtype(weight.dtype))


def _fake_backward(grad_output: Tensor, weight: Tensor, bounds: Tensor) -> Tensor:
    return torch.empty_like(weight)


def _vmap(info: Any, in_dims: Any, weight: Tensor, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """One by one: each weight has bounds of its own."""
    results = [_WeightFakeQuantize.apply(w, *args) for w in weight.unbind(in_dims[0])]
    return (torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [[t] * info.batch_size if dim is None else t.unbind(dim) for t, dim in zip(args, in_dims, strict=True)]
    return torch.stack([_backward.overload(*each) for each in zip(*mapped, strict=True)]), 0


class _WeightFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(weight, bits, mode, percentile):
        return _forward(weight, bits, mode, percentile)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, ctx.mode, _ = inputs
        ctx.mark_non_differentiable(output[1])
        if ctx.mode == "percentile":
            ctx.save_for_backward(weight, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        if ctx.mode == "percentile":
            grad_output = _backward(grad_output, *ctx.saved_tensors)
        return grad_output, None, None, None

    vmap = staticmethod(_vmap)


_forward = operator(
    "weight_fake_quantize_forward(Tensor weight, int bits, str mode, float percentile)"
    " -> (Tensor output, Tensor bounds)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_WeightFakeQuantize.apply,
)
_backward = operator(
    "weight_fake_quantize_backward(Tensor grad_output, Tensor weight, Tensor bounds) -> Tensor grad_weight",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
