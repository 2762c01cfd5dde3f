"""Weight quantisation that freezes what has settled (LTS): output and state in one pass."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor._operator import call_function, operator
from tersor.freezing.freeze_schedule import FreezeSchedule
from tersor.freezing.mask import check_mask, mask_size, pack_mask, unpack_mask
from tersor.quantization._quantizer import check_bits, check_parameters, exact_dtype
from tersor.quantization.fake_quantize_bounds import check_bounds


class LtsState(NamedTuple):
    """What :func:`lts_quantize` keeps of one weight of n elements, and changes in place.

    Attributes:
        distance: the weight's shape, float32 (float64 for a float64 weight): running distance to the level.
        code: the weight's shape, uint8: the last level.
        frozen: uint8 ``(ceil(n / 8),)``: one bit per element, see :func:`pack_mask`.
        counters: int64 ``(2,)``: the step, -1 before the first, and how many elements are frozen.
        saved: the weight's shape and dtype, the effective weight; None where the optimiser leaves frozen weights
            alone (:class:`FrozenSGD`, :class:`FrozenAdamW`).
        frozen_step: the weight's shape, int32: the step at which each element froze, 0 for free; None if not asked for.
    """

    distance: Tensor
    code: Tensor
    frozen: Tensor
    counters: Tensor
    saved: Tensor | None = None
    frozen_step: Tensor | None = None


def lts_state(weight: Tensor, *, saved: bool = True, frozen_step: bool = False) -> LtsState:
    """The state before the first step, for a contiguous weight of that shape, dtype and device."""
    counters = torch.zeros_like(weight.new_empty((2,)), dtype=torch.int64)
    counters[0] -= 1
    return LtsState(
        distance=torch.zeros_like(weight, dtype=exact_dtype(weight.dtype), memory_format=torch.contiguous_format),
        code=torch.zeros_like(weight, dtype=torch.uint8, memory_format=torch.contiguous_format),
        frozen=torch.zeros_like(weight.new_empty((mask_size(weight.shape),)), dtype=torch.uint8),
        counters=counters,
        saved=torch.zeros_like(weight, memory_format=torch.contiguous_format).detach() if saved else None,
        frozen_step=torch.zeros_like(weight, dtype=torch.int32, memory_format=torch.contiguous_format)
        if frozen_step
        else None,
    )


def lts_quantize(
    weight: Tensor, state: LtsState, lower: Tensor, upper: Tensor, bits: int, schedule: FreezeSchedule | None = None
) -> Tensor:
    r"""Quantises a weight to ``2**bits`` levels in [-1, 1] and, in training, freezes what has settled.

    With n = 2^bits - 1, R rounding half to even, and w the weight where it is free and ``state.saved`` where frozen:

        p = (w - lower) / (upper - lower),  y = R(n clamp(p, 0, 1)) / n,  output = 2 (y - 1/2),  saved := w

    With a ``schedule`` this is step t of the training, and the state moves on: ``d' = (1 - m) abs(p - y) + m d``, but
    1 / n where the level changed (in the second step ``abs(p - y)`` everywhere); then all free elements (or blocks, see
    :class:`FreezeSchedule`) with d' within the threshold of step t freeze for good.

    The gradient of the weight is that of ``fake_quantize_bounds(rule="unit", signed=True)``, zero where an element was
    frozen before this call; the bounds get their gradient from all elements.

    Args:
        weight: any shape with at least one dimension; float16, bfloat16, float32 or float64. The first dimension is
            that of the output channels.
        state: from :func:`lts_state`; changed in place.
        lower, upper: one element each.
        bits: 2 to 8; 32 returns the weight and leaves the state alone.
        schedule: None in evaluation and while the bounds are being initialised: only ``saved`` is written then.

    Returns:
        The shape and dtype of ``weight``, contiguous. Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or ``bits`` is not as stated; or, on the CPU, a bound is not finite or ``lower >= upper``.

    Source: Zhong et al., "Exploiting the Partly Scratch-off Lottery Ticket for Quantization-Aware Training", arXiv
    2211.08544.
    """
    name = "lts_quantize"
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a torch.Tensor, got {type(weight).__name__}")
    lower, upper = check_parameters(name, weight, lower=lower, upper=upper)
    for which, bound in (("lower", lower), ("upper", upper)):
        if bound.numel() != 1:
            raise ValueError(f"{name}: {which} must have one element, got shape {tuple(bound.shape)}")
    bits = check_bits(name, bits)
    _check_state(name, weight, state)
    if schedule is not None and not isinstance(schedule, FreezeSchedule):
        raise TypeError(f"{name}: schedule must be a FreezeSchedule or None, got {type(schedule).__name__}")
    if bits == 32:
        return weight
    constants = _INACTIVE if schedule is None else _constants(schedule, weight.shape)
    arguments = (weight, lower, upper, *state, bits, *constants)
    if torch.compiler.is_compiling():
        # Where no gradient is wanted, Dynamo would hand the Function's forward(*args) a context as its first argument.
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (weight, lower, upper))
        return (_LtsQuantize.apply if wanted else _forward.overload)(*arguments)[0]
    try:
        return call_function(_LtsQuantize, *arguments)[0]
    except RuntimeError:
        if weight.device.type == "cpu":  # the C++ kernel refuses such values; here is said which
            check_bounds(lower, upper, name)
        raise


_INACTIVE = False, "fixing", 0.0, 0.0, 0, 1, 1, 1, 1.0


def _constants(schedule: FreezeSchedule, shape: torch.Size) -> tuple[Any, ...]:
    known = _known_constants if not torch.compiler.is_compiling() else _known_constants.__wrapped__
    return known(schedule, shape)


@functools.lru_cache(maxsize=1024)
def _known_constants(schedule: FreezeSchedule, shape: torch.Size) -> tuple[Any, ...]:
    steps = schedule.warmup_steps, schedule.total_steps
    return True, schedule.growth, schedule.rate, schedule.momentum, *steps, *schedule.block(shape), schedule.quantile


def _check_state(where: str, weight: Tensor, state: Any) -> None:
    if not isinstance(state, LtsState):
        raise TypeError(f"{where}: state must be an LtsState, got {type(state).__name__}")
    if weight.dim() == 0:
        raise ValueError(f"{where}: weight must have at least one dimension, got shape ()")
    check_mask(where, state.frozen, weight.shape, weight.device)
    dtypes = {
        "distance": exact_dtype(weight.dtype),
        "code": torch.uint8,
        "saved": weight.dtype,
        "frozen_step": torch.int32,
    }
    for name, dtype in dtypes.items():
        tensor = getattr(state, name)
        if tensor is None and name in ("saved", "frozen_step"):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{where}: state.{name} must be a {dtype} tensor, got {given}")
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"{where}: state.{name} must have the shape of weight {tuple(weight.shape)} on {weight.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
    counters = state.counters
    if not isinstance(counters, Tensor) or counters.dtype != torch.int64 or counters.shape != (2,):
        raise ValueError(f"{where}: state.counters must be an int64 tensor (2,), got {counters!r}")


def _place(weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    exact = weight.to(lower.dtype)
    return (exact - lower.reshape(())) / (upper - lower).reshape(())


def _reference(
    weight: Tensor,
    lower: Tensor,
    upper: Tensor,
    distance: Tensor,
    code: Tensor,
    frozen: Tensor,
    counters: Tensor,
    saved: Tensor | None,
    frozen_step: Tensor | None,
    bits: int,
    update: bool,
    growth: str,
    rate: float,
    momentum: float,
    warmup: int,
    total: int,
    block_rows: int,
    block_columns: int,
    quantile: float,
) -> tuple[Tensor, Tensor]:
    if weight.device.type == "cpu":
        check_bounds(lower, upper, "lts_quantize")
    before = frozen.clone()
    mask = unpack_mask(frozen, weight.shape)
    if saved is not None:
        weight = torch.where(mask, saved, weight)
        keep = contextlib.nullcontext if saved.is_inference() else torch.autograd._unsafe_preserve_version_counter
        with keep(saved):  # see setup_context
            saved.copy_(weight)
    place = _place(weight, lower, upper)
    levels = torch.full_like(lower.reshape(()), 2**bits - 1)
    level = torch.round(place.clamp(0, 1) * levels)
    output = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_((level / levels - 0.5) * 2)
    if update:
        away = (place - level / levels).abs()
        new_code = level.nan_to_num().to(torch.uint8)
        moved = (new_code != code) | level.isnan()
        running = (1 - momentum) * away + momentum * distance
        running = torch.where(moved, 1 / (2**bits - 1), running)
        distance.copy_(torch.where(counters[0] == 0, away, running))
        code.copy_(new_code)
        counters[0] += 1
        threshold = (_rate(counters[0], growth, rate, warmup, total) / (2**bits - 1)).to(distance.dtype)
        within = (distance <= threshold) & (counters[0] > warmup)
        settled = _settled_blocks(within, mask, block_rows, block_columns, quantile) & ~mask
        frozen.copy_(pack_mask(mask | settled))
        counters[1] += settled.sum()
        if frozen_step is not None:
            frozen_step.copy_(torch.where(settled, counters[0].to(torch.int32), frozen_step))
    return output, before


def _rate(step: Tensor, growth: str, rate: float, warmup: int, total: int) -> Tensor:
    if growth == "fixing":
        return torch.full_like(step, rate, dtype=torch.float64)
    part = (step - warmup).double() / (total - warmup)
    return part if growth == "linear" else torch.sin(part * (torch.pi / 2))


def _settled_blocks(within: Tensor, mask: Tensor, rows: int, columns: int, quantile: float) -> Tensor:
    """What freezes: the elements within the threshold, or all of each block in which enough of them are."""
    if rows == 1 and columns == 1:
        return within
    matrix = within.reshape(within.shape[0], -1)
    grid = -(-matrix.shape[0] // rows), -(-matrix.shape[1] // columns)
    fill = grid[0] * rows - matrix.shape[0], grid[1] * columns - matrix.shape[1]

    def count(elements: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(elements.to(torch.int64), (0, fill[1], 0, fill[0]))
        return padded.view(grid[0], rows, grid[1], columns).sum((1, 3))

    settled = count(matrix).double() >= quantile * count(torch.ones_like(matrix)).double()
    whole = settled.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: matrix.shape[0], : matrix.shape[1]].reshape(within.shape)


def _reference_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor | None, lower: Tensor, upper: Tensor, frozen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    mask = unpack_mask(frozen, weight.shape)
    place = _place(weight if saved is None else torch.where(mask, saved, weight), lower, upper)
    inside = (place >= 0) & (place <= 1)
    grad = torch.where(inside, grad_output.to(place.dtype) * 2 / (upper - lower).reshape(()), 0)
    place = place.clamp(0, 1)  # a place far outside would make 0 * inf
    grad_lower, grad_upper = (grad * (place - 1)).sum(), -(grad * place).sum()
    grad_weight = torch.where(mask, 0, grad)
    output = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(grad_weight)
    return output, grad_lower.reshape(lower.shape), grad_upper.reshape(upper.shape)


def _fake(weight: Tensor, lower: Tensor, upper: Tensor, distance: Tensor, code: Tensor, frozen: Tensor, *_: Any) -> Any:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(frozen)


def _fake_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor | None, lower: Tensor, upper: Tensor, frozen: Tensor
) -> Any:
    output = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return output, lower.new_empty(lower.shape), upper.new_empty(upper.shape)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """One by one, each with its own state, which has to be mapped too."""
    if any(isinstance(a, Tensor) and dim is None for a, dim in zip(args[3:9], in_dims[3:9], strict=True)):
        raise ValueError("lts_quantize: under vmap the state must be mapped as well, since every call changes it")
    results = []
    for i in range(info.batch_size):
        each = [a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]
        own = [t.contiguous() if isinstance(t, Tensor) else t for t in each[3:9]]
        results.append(_LtsQuantize.apply(*each[:3], *own, *each[9:]))
        for whole, part in zip(each[3:9], own, strict=True):
            if part is not None and part.data_ptr() != whole.data_ptr():
                whole.copy_(part)
    return (torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    mapped = [[a] * info.batch_size if dim is None else a.unbind(dim) for a, dim in zip(args, in_dims, strict=True)]
    results = [_backward.overload(*each) for each in zip(*mapped, strict=True)]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0, 0)


class _LtsQuantize(torch.autograd.Function):
    @staticmethod
    def forward(*args):
        return _forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, lower, upper, *_ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        # Of `saved` the backward pass reads what was frozen before, which no later call changes.
        ctx.save_for_backward(weight, inputs[7], lower, upper, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:  # the layer's weight gradient was left out
            return (None,) * 19
        return *_backward(grad_output, *ctx.saved_tensors), *[None] * 16

    vmap = staticmethod(_vmap)


_forward = operator(
    "lts_quantize_forward(Tensor weight, Tensor lower, Tensor upper, Tensor(a!) distance, Tensor(b!) code,"
    " Tensor(c!) frozen, Tensor(d!) counters, Tensor(e!)? saved, Tensor(f!)? frozen_step, int bits, bool update,"
    " str growth, float rate, float momentum, int warmup, int total, int block_rows, int block_columns,"
    " float quantile) -> (Tensor output, Tensor frozen_before)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_LtsQuantize.apply,
)
_backward = operator(
    "lts_quantize_backward(Tensor grad_output, Tensor weight, Tensor? saved, Tensor lower, Tensor upper, Tensor frozen)"
    " -> (Tensor grad_weight, Tensor grad_lower, Tensor grad_upper)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
