"""The levels that a fake-quantiser rounds to, and the ONNX type that holds them; for :func:`export_onnx`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tersor.quantization.fake_quantize_affine import _check_values as check_affine
from tersor.quantization.fake_quantize_bounds import check_bounds, quantize_ddtb
from tersor.quantization.fake_quantize_lsq_plus import _check_values as check_lsq_plus
from tersor.quantization.fake_quantize_pact import check_positive


@dataclasses.dataclass(frozen=True)
class Levels:
    """What a quantiser rounds to: ``offset + m step`` for the whole numbers m from ``lowest`` to ``highest``.

    Attributes:
        step, lowest, highest: float32 of one element, or one per index of the input's dimension ``axis``.
        offset: as ``step``; None for none.
        relu: whether the input goes through a ReLU first.
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor
    offset: Tensor | None = None
    relu: bool = False
    axis: int | None = None


def _bounds_levels(lower: Tensor, upper: Tensor, bits: int, relu: bool = False) -> Levels:
    check_bounds(lower, upper)
    lower, upper = torch.broadcast_tensors(lower, upper)
    scale = torch.full_like(upper, 2**bits - 1) / (upper - lower)
    # The operator's own outermost levels: by a bound's tie the top one may be a level higher or lower than planned.
    lowest, highest = (torch.round(quantize_ddtb(bound, lower, upper, bits)[0] * scale) for bound in (lower, upper))
    # A bound on a tie, as both are for lower = -upper, divided by the step must round as the operator does: activations
    # that were clipped before have many elements there. One float less or more does it.
    step, zero = 1 / scale, torch.zeros_like(scale)
    for candidate in (step.nextafter(zero), step.nextafter(2 * step)):
        fits = (torch.round(lower / step) == lowest) & (torch.round(upper / step) == highest)
        step = torch.where(fits, step, candidate)
    return Levels(step, lowest, highest, relu=relu)


def _fake_quantize_bounds(lower: Tensor, upper: Tensor, *, bits: int, rule: str, relu: bool, **_: Any) -> Levels:
    if rule != "ddtb":
        raise ValueError(f"rule {rule!r} does not scale its levels back to the input's units; only 'ddtb' does")
    return _bounds_levels(lower, upper, bits, relu)


def _fake_quantize_add(
    lower: Tensor, upper: Tensor, other_lower: Tensor, other_upper: Tensor, *, bits: int, **_: Any
) -> tuple[Levels, Levels]:
    return _bounds_levels(lower, upper, bits), _bounds_levels(other_lower, other_upper, bits)


def _fake_quantize_pact(alpha: Tensor, *, bits: int) -> Levels:
    check_positive("fake_quantize_pact", alpha=alpha)
    if bits == 32:
        raise ValueError("bits=32 clips without quantising; use torch.clamp")
    levels = 2**bits - 1
    return _from_zero(alpha / levels, levels)


def _fake_quantize_lsq(scale: Tensor, *, quant_min: int, quant_max: int, **_: Any) -> Levels:
    check_positive("fake_quantize_lsq", scale=scale)
    return Levels(scale, torch.full_like(scale, quant_min), torch.full_like(scale, quant_max))


def _fake_quantize_lsq_plus(scale: Tensor, offset: Tensor, *, levels: int, **_: Any) -> Levels:
    check_lsq_plus(scale, offset)
    scale, offset = torch.broadcast_tensors(scale, offset)
    return dataclasses.replace(_from_zero(scale, levels), offset=offset)


def _fake_quantize_affine(scale: Tensor, zero_point: Tensor, *, quant_min: int, quant_max: int, **_: Any) -> Levels:
    check_affine(scale, zero_point)
    scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    zero = torch.round(zero_point).clamp(quant_min, quant_max)
    return Levels(scale, quant_min - zero, quant_max - zero)


def _weight_fake_quantize(lower: Tensor, upper: Tensor, *, bits: int, mode: str, **_: Any) -> Levels:
    if mode != "symmetric":
        return _bounds_levels(lower, upper, bits)
    levels = torch.full_like(upper, 2 ** (bits - 1) - 1)
    return Levels(upper / levels, -levels, levels)


def _lts_quantize(lower: Tensor, upper: Tensor, *, bits: int, **_: Any) -> Levels:
    """Of the output times half the bounds' distance: odd multiples of the step."""
    check_bounds(lower, upper)
    levels = torch.full_like(upper, 2**bits - 1)
    return Levels((upper - lower) / 2 / levels, -levels, levels)


def _binary_sign(**_: Any) -> Levels:
    return scaled_signs(torch.ones(1))


def scaled_signs(values: Tensor) -> Levels:
    """Of a binary weight, of which every output channel may be multiplied by a number."""
    magnitudes = values.abs()
    step = magnitudes.flatten(1).amax(1) if values.dim() > 1 else magnitudes
    alike = bool((step == step[0]).all())
    step = step[0] if alike else step.view(-1, *(1,) * (values.dim() - 1))
    step = torch.where(step > 0, step, 1)
    return Levels(step, -torch.ones_like(step), torch.ones_like(step), axis=None if alike else 0)


def _from_zero(step: Tensor, levels: int) -> Levels:
    return Levels(step, torch.zeros_like(step), torch.full_like(step, levels))


LEVELS: dict[str, Callable[..., Levels | tuple[Levels, ...]]] = {
    f"{function.__name__[1:]}_forward": function
    for function in (
        _binary_sign,
        _fake_quantize_add,
        _fake_quantize_affine,
        _fake_quantize_bounds,
        _fake_quantize_lsq,
        _fake_quantize_lsq_plus,
        _fake_quantize_pact,
        _lts_quantize,
        _weight_fake_quantize,
    )
}


# From levels to an integer type.


@dataclasses.dataclass(frozen=True)
class IntegerType:
    """An ONNX type and zero point that hold all levels; ``below`` and ``above`` if they would hold others beyond."""

    name: str
    zero_point: Tensor
    below: bool
    above: bool


def integer_type(levels: Levels, widths: Sequence[int], signed: bool) -> IntegerType:
    """The narrowest allowed; the zero point is 0 if it can be, or unsigned codes start at 0. ValueError if none."""
    preferred = torch.zeros_like(levels.lowest) if signed else -levels.lowest
    for width in widths:
        least, greatest = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
        first, last = (least - levels.lowest).clamp(min=least), (greatest - levels.highest).clamp(max=greatest)
        if (first <= last).all():
            zero_point = torch.minimum(torch.maximum(preferred, first), last)
            below, above = levels.lowest + zero_point > least, levels.highest + zero_point < greatest
            return IntegerType(f"{'' if signed else 'u'}int{width}", zero_point, bool(below.any()), bool(above.any()))
    worst = (levels.lowest.abs() + levels.highest.abs()).argmax()
    first, last = (int(level.flatten()[worst]) for level in (levels.lowest, levels.highest))
    raise ValueError(
        f"its {last - first + 1} levels, {first} to {last} steps from 0, fit no zero point and type of "
        f"{' or '.join(str(width) for width in widths)} bits; "
        + ("move a bound by a little off the tie" if last - first == 256 else "move the bounds towards 0")
        + ("" if 16 in widths else ", or allow int16=True")
    )
