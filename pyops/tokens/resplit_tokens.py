"""CF-ViT's coarse-to-fine step: the most attended coarse tokens give way to their 2 x 2 finer ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, one_by_one, unfold
from tersor._checks import accumulate_dtype, check_floating, check_share
from tersor._operator import call_function, is_autocast_enabled, operator
from tersor.tokens.gather_tokens import check_index, gather_rows, scatter_rows
from tersor.tokens.rank_tokens import check_scores


def resplit_tokens(
    scores: Tensor | None,
    coarse: Tensor,
    fine_patches: Tensor,
    reuse: Tensor | None,
    position: Tensor | None,
    cls: Tensor,
    alpha: float = 0.5,
    *,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The fine pass's sequence: class token, the finer tokens of the k best coarse ones, the other coarse tokens.

    With N coarse tokens on a square grid of side g, :math:`k = \lceil \alpha N \rceil` and the tokens ranked by score
    (stable, highest first; :func:`rank_tokens`), the token of rank j < k becomes four, at rows
    :math:`1 + j,\ 1 + k + j,\ 1 + 2k + j,\ 1 + 3k + j` for its top left, top right, bottom left and bottom right child:

    .. math:: \mathrm{fine}[f] + \mathrm{reuse}[i] + \mathrm{position}[1 + f],
        \quad f = 4i - 2 (i \bmod g) + 2g\,\delta_r + \delta_c

    Row 0 is ``cls + position[0]``. The coarse tokens that are left follow at :math:`1 + 4k`, in the order of rank.

    Args:
        scores: ``(B, N)``, any floating dtype; N a square number. None if ``order`` is given. It gets no gradient.
        coarse: ``(B, 1 + N, C)``: the embedded coarse tokens after their class token, which is not used.
        fine_patches: ``(B, 4N, C)``: the fine patches' embeddings without position, row by row of a grid of side 2g.
        reuse: ``(B, N, C)``, added to a coarse token's four children, or None.
        position: ``(1, 1 + 4N, C)``, of the fine class token and patches, or None.
        cls: ``(1, 1, C)`` or ``(B, 1, C)``.
        alpha: share of the coarse tokens that are split, above 0, at most 1.
        order: ``(B, N)``, int64: each image's ranking, if it is known. Then ``fine_patches`` is ``(B, 4k, C)`` and
            ``reuse`` ``(B, k, C)``, of the chosen tokens alone and in the sequence's order (:func:`resplit_index`).

    ``coarse``, ``fine_patches``, ``reuse``, ``position`` and ``cls`` have one dtype, float16, bfloat16, float32 or
    float64 (under autocast the widest of theirs is taken) and any strides.

    Returns:
        ``(B, 1 + 4k + N - k, C)`` tokens and the int64 ranking ``(B, N)``. Sums are in float32 (float64 for float64).
        Differentiable once, for the five tensors of tokens.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes or devices do not fit, N is not a square, ``alpha`` is out of range, both or neither of
            ``scores`` and ``order`` are given; or, on the CPU, a score is NaN or ``order`` has an entry out of range.
            On a GPU, which is not waited for, and in compiled graphs NaN scores rank first.

    Source: Chen et al., "CF-ViT: A General Coarse-to-Fine Method for Vision Transformer", arXiv 2203.03821.
    """
    name = "resplit_tokens"
    tokens: dict[str, Any] = {
        "coarse": coarse, "fine_patches": fine_patches, "reuse": reuse, "position": position, "cls": cls,
    }  # fmt: skip
    given = {key: t for key, t in tokens.items() if t is not None or key not in ("reuse", "position")}
    check_floating(name, **given)
    count = _check_shapes(name, given, alpha, order is not None)
    if (scores is None) == (order is None):
        got = "none" if scores is None else "both"
        raise ValueError(f"{name}: one of scores and order must be given, got {got}")
    if scores is not None:
        check_scores(name, scores)
        if scores.shape != (coarse.shape[0], count):
            raise ValueError(
                f"{name}: scores must be ({coarse.shape[0]}, {count}) for this coarse, got shape {tuple(scores.shape)}"
            )
        if scores.device != coarse.device:
            raise ValueError(f"{name}: scores must be on the device of coarse {coarse.device}, got {scores.device}")
        scores = scores.detach() if scores.requires_grad else scores
    if order is not None:
        check_index(name, order, coarse, count)
        if order.shape[1] != count:
            raise ValueError(f"{name}: order must be ({coarse.shape[0]}, {count}), got shape {tuple(order.shape)}")
    cast = dict(zip(given, same_dtype(name, **given), strict=True))
    result, ranked = call_function(
        _ResplitTokens, *(cast.get(key) for key in tokens), scores, order, split_count(count, alpha)
    )
    return result, ranked if order is None else order


def split_count(count: int, alpha: float) -> int:
    """How many of ``count`` coarse tokens are split: ``ceil(alpha * count)``, the product in double precision."""
    if not torch.compiler.is_compiling():
        return math.ceil(alpha * count)
    chosen = 0  # counted, since a compiled graph may know count and alpha as symbols only
    while chosen < alpha * count:
        chosen += 1
    return chosen


def resplit_index(order: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """Which patches :func:`resplit_tokens` takes, in the order of its rows.

    Args:
        order: ``(B, N)``, int64, as :func:`rank_tokens` returns it; N a square number.
        alpha: share of the coarse tokens that are split.

    Returns:
        ``(B, 4k)``: fine patches on the grid of twice the side, and ``(B, N - k)``: coarse patches that stay.

    Raises:
        TypeError: ``order`` is not an int64 tensor.
        ValueError: its shape does not fit, or ``alpha`` is out of range.
    """
    name = "resplit_index"
    if not isinstance(order, Tensor) or order.dtype != torch.int64:
        raise TypeError(f"{name}: order must be an int64 tensor, got {getattr(order, 'dtype', type(order).__name__)}")
    if order.dim() != 2:
        raise ValueError(f"{name}: order must be (B, N), got shape {tuple(order.shape)}")
    side = _side(name, order.shape[1])
    check_share(name, above_zero=True, alpha=alpha)
    chosen = split_count(order.shape[1], alpha)
    return _fine_index(order[:, :chosen], side), order[:, chosen:]


def same_dtype(name: str, **tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype: they have it, or autocast is on, whose results of mixed types are the widest."""
    if len({tensor.dtype for tensor in tensors.values()}) == 1:
        return list(tensors.values())
    (first_name, first), *_ = tensors.items()
    if is_autocast_enabled(first.device.type):
        dtype = first.dtype
        for tensor in tensors.values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        return [t.to(dtype) for t in tensors.values()]
    for key, tensor in tensors.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: {key} must have the dtype of {first_name} {first.dtype}, got {tensor.dtype}")
    return list(tensors.values())


def _side(name: str, count: int) -> int:
    side = 1
    while side * side < count:  # math.isqrt does not take the symbolic sizes of compiled graphs
        side += 1
    if side * side != count:
        raise ValueError(f"{name}: the coarse tokens must fill a square grid, got {count} of them")
    return side


def _check_shapes(name: str, given: dict[str, Tensor], alpha: float, selected: bool) -> int:
    """Checks the tokens' shapes and devices; returns the number of coarse tokens."""
    coarse = given["coarse"]
    if coarse.dim() != 3 or coarse.shape[1] < 2:
        raise ValueError(f"{name}: coarse must be (B, 1 + N, C), got shape {tuple(coarse.shape)}")
    batch, count, channels = coarse.shape[0], coarse.shape[1] - 1, coarse.shape[2]
    _side(name, count)
    check_share(name, above_zero=True, alpha=alpha)
    parents = split_count(count, alpha) if selected else count
    first = given["cls"].shape[0] if given["cls"].dim() == 3 and given["cls"].shape[0] == batch else 1
    expected = {
        "coarse": coarse.shape,
        "fine_patches": (batch, 4 * parents, channels),
        "reuse": (batch, parents, channels),
        "position": (1, 1 + 4 * count, channels),
        "cls": (first, 1, channels),
    }
    device = coarse.device
    for key, tensor in given.items():
        if tensor.shape != expected[key]:
            raise ValueError(f"{name}: {key} must be {expected[key]} for this coarse, got shape {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: {key} must be on the device of coarse {device}, got {tensor.device}")
    return count


def _fine_index(chosen: Tensor, side: int) -> Tensor:
    """Four children of each, all of one corner together: ``(B, k)`` to ``(B, 4k)``."""
    first = 4 * chosen - 2 * (chosen % side)
    return torch.cat([first, first + 1, first + 2 * side, first + 2 * side + 1], dim=1)


def _reference(
    coarse: Tensor,
    fine_patches: Tensor,
    reuse: Tensor | None,
    position: Tensor | None,
    cls: Tensor,
    scores: Tensor | None,
    order: Tensor | None,
    chosen: int,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(coarse.dtype)
    selected = scores is None
    ranked = order if scores is None else torch.argsort(scores, dim=1, descending=True, stable=True)
    assert ranked is not None
    batch, side = coarse.shape[0], math.isqrt(coarse.shape[1] - 1)
    fine = _fine_index(ranked[:, :chosen], side)
    rows = (fine_patches if selected else gather_rows(fine_patches, fine)).to(dtype)
    first = cls.to(dtype).expand(batch, -1, -1)
    if reuse is not None:
        parents = (reuse if selected else gather_rows(reuse, ranked[:, :chosen])).to(dtype)
        rows = rows + parents.repeat(1, 4, 1)
    if position is not None:
        places = position.to(dtype).expand(batch, -1, -1)
        rows, first = rows + gather_rows(places[:, 1:], fine), first + places[:, :1]
    left = gather_rows(coarse, 1 + ranked[:, chosen:])
    tokens = torch.cat([first.to(coarse.dtype), rows.to(coarse.dtype), left], dim=1)
    return tokens, coarse.new_empty(0, dtype=torch.int64) if selected else ranked


def _reference_backward(
    grad_tokens: Tensor,
    order: Tensor,
    chosen: int,
    selected: bool,
    need_coarse: bool,
    need_fine: bool,
    need_reuse: bool,
    need_position: bool,
    cls_rows: int,
) -> tuple[Tensor, ...]:
    batch, count = order.shape
    fine = _fine_index(order[:, :chosen], math.isqrt(count))
    rows, left = grad_tokens[:, 1 : 1 + 4 * chosen], grad_tokens[:, 1 + 4 * chosen :]
    empty = grad_tokens.new_empty(0)
    four = rows.unflatten(1, (4, chosen)).to(accumulate_dtype(rows.dtype)).sum(1).to(rows.dtype)
    grad_coarse = scatter_rows(left, 1 + order[:, chosen:], 1 + count) if need_coarse else empty
    grad_fine = rows.clone(memory_format=torch.contiguous_format) if selected else scatter_rows(rows, fine, 4 * count)
    grad_reuse = four if selected else scatter_rows(four, order[:, :chosen], count)
    first = grad_tokens[:, :1].to(accumulate_dtype(rows.dtype))
    grad_cls = (first.clone() if cls_rows == batch else first.sum(0, keepdim=True)).to(rows.dtype)
    grad_position = empty
    if need_position:
        wide = rows.to(accumulate_dtype(rows.dtype))
        places = torch.cat([first.sum(0, keepdim=True), scatter_rows(wide, fine, 4 * count).sum(0, keepdim=True)], 1)
        grad_position = places.to(rows.dtype)
    return (
        grad_coarse,
        grad_fine if need_fine else empty,
        grad_reuse if need_reuse else empty,
        grad_position,
        grad_cls.contiguous() if cls_rows else empty,
    )


def _fake(
    coarse: Tensor, fine_patches: Tensor, reuse: Any, position: Any, cls: Any, scores: Any, order: Any, chosen: int
) -> tuple[Tensor, Tensor]:
    batch, count = coarse.shape[0], coarse.shape[1] - 1
    tokens = coarse.new_empty((batch, 1 + 3 * chosen + count, coarse.shape[2]))
    return tokens, coarse.new_empty((batch, count) if scores is not None else (0,), dtype=torch.int64)


def _fake_backward(
    grad_tokens: Tensor,
    order: Tensor,
    chosen: int,
    selected: bool,
    need_coarse: bool,
    need_fine: bool,
    need_reuse: bool,
    need_position: bool,
    cls_rows: int,
) -> tuple[Tensor, ...]:
    batch, count, channels = *order.shape, grad_tokens.shape[2]
    parents = chosen if selected else count
    shapes: list[Any] = [
        (batch, 1 + count, channels) if need_coarse else 0,
        (batch, 4 * parents, channels) if need_fine else 0,
        (batch, parents, channels) if need_reuse else 0,
        (1, 1 + 4 * count, channels) if need_position else 0,
        (cls_rows, 1, channels) if cls_rows else 0,
    ]
    return tuple(grad_tokens.new_empty(shape) for shape in shapes)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    coarse, fine_patches, reuse, position, cls, scores, order, chosen = args
    if in_dims[3] is not None or in_dims[4] is not None:
        return one_by_one(_ResplitTokens.apply, info, in_dims, args)
    size = info.batch_size
    folded = [
        None if t is None else fold(t, d, size)
        for t, d in zip((coarse, fine_patches, reuse, scores, order), (*in_dims[:3], *in_dims[5:7]), strict=True)
    ]
    if cls.shape[0] != 1:
        cls = fold(cls, None, size)
    tokens, ranked = _ResplitTokens.apply(*folded[:3], position, cls, *folded[3:], chosen)
    if scores is None:
        return (unfold(tokens, info), ranked), (0, None)
    return (unfold(tokens, info), unfold(ranked, info)), (0, 0)


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_forward.overload, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward, info, in_dims, args)


class _ResplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(coarse, fine_patches, reuse, position, cls, scores, order, chosen):
        return _forward(coarse, fine_patches, reuse, position, cls, scores, order, chosen)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, cls, scores, order, ctx.chosen = inputs
        ctx.selected, ctx.cls_rows = scores is None, cls.shape[0]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # the ranking has none
        ctx.save_for_backward(output[1] if order is None else order)

    @staticmethod
    def backward(ctx, grad_tokens, _):
        if grad_tokens is None:
            return (None,) * 8
        needed = ctx.needs_input_grad[:5]
        gradients = _backward(
            grad_tokens, *ctx.saved_tensors, ctx.chosen, ctx.selected, *needed[:4], ctx.cls_rows if needed[4] else 0
        )
        if ctx.cls_rows == 0:  # which stands for "not needed"
            gradients = (*gradients[:4], grad_tokens[:, :1])
        return (*(g if n else None for g, n in zip(gradients, needed, strict=True)), None, None, None)

    vmap = staticmethod(_vmap)


def _derivative(*args: Any) -> tuple[Tensor, Tensor]:
    return _ResplitTokens.apply(*args)


_forward = operator(
    "resplit_tokens_forward(Tensor coarse, Tensor fine_patches, Tensor? reuse, Tensor? position, Tensor cls,"
    " Tensor? scores, Tensor? order, SymInt chosen) -> (Tensor tokens, Tensor order)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_derivative,
)
_backward = operator(
    "resplit_tokens_backward(Tensor grad_tokens, Tensor order, SymInt chosen, bool selected, bool need_coarse,"
    " bool need_fine, bool need_reuse, bool need_position, SymInt cls_rows)"
    " -> (Tensor grad_coarse, Tensor grad_fine_patches, Tensor grad_reuse, Tensor grad_position, Tensor grad_cls)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
