"""A weight with its removed positions set to zero, and the gradient of the scores that decide which (LBC)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import call_function, operator
from tersor.freezing.mask import check_mask, pack_mask, unpack_mask
from tersor.quantization._quantizer import exact_dtype
from tersor.sparsity.nm_pattern import (
    _combinations,
    check_groups,
    check_pattern,
    combination_dtype,
    from_groups,
    to_groups,
)


def nm_sparsify(
    weight: Tensor,
    scores: Tensor,
    n: int,
    m: int,
    mask: Tensor | None = None,
    combinations: Tensor | None = None,
) -> Tensor:
    r"""The weight where a combination that keeps the position is alive, else zero; the scores learn.

    In each group of m consecutive elements (in the order output channel, kernel row, kernel column, input channel)
    every one of the C = binom(m, n) ways to keep n of them has a score, alive unless exactly zero. With B the 0/1 table
    of :func:`nm_combinations` and W, g the weight and the incoming gradient in groups:

        mask[p] = any of B[j, p] over alive j,   output = mask W,   grad_weight = mask g,
        grad_scores[j] = sum over p of B[j, p] W[p] g[p] for alive j, else 0.

    Compact scores are those of some combinations of each group only, whose numbers j are in ``combinations``; all
    others are dead, and the results are bit for bit those of all scores with zeros in the others' places.

    Args:
        weight: ``(O, I)`` or ``(O, I, KH, KW)``, elements a multiple of m; float16, bfloat16, float32 or float64.
        scores: ``(elements / m, C)``, or fewer columns if compact; float32 (float64 for a float64 weight).
        n, m: 1 <= n < m <= 16, at most 4096 combinations.
        mask: what :func:`nm_remove_` returned for these scores, which then are not read in the forward pass.
        combinations: of compact scores, whose shape it has: rows of :func:`nm_combinations`, each once in a group and
            ascending; uint8, or int16 where C is above 256. Numbers outside 0 to C - 1 are an error on the CPU, and
            keep nothing on a GPU.

    Returns:
        The shape, dtype and strides of ``weight``. Differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: Zhang et al., "Learning Best Combination for Efficient N:M Sparsity", arXiv 2206.06662.
    """
    name = "nm_sparsify"
    n, m = check_pattern(name, n, m)
    check_floating(name, weight=weight)
    check_scores(name, scores, check_groups(name, weight.shape, m), n, m, weight, combinations)
    if mask is not None:
        check_mask(name, mask, weight.shape, weight.device)
    return call_function(_NmSparsify, weight, scores, mask, n, m, combinations)[0]


def check_scores(
    where: str,
    scores: Any,
    groups: int | None,
    n: int,
    m: int,
    weight: Tensor | None = None,
    combinations: Any = None,
) -> None:
    """Raises unless ``scores`` has a row of n:m's combinations per group, of the dtype and device for ``weight``."""
    check_floating(where, scores=scores)
    count = math.comb(m, n)
    columns_fit = scores.dim() == 2 and (
        scores.shape[1] == count if combinations is None else 1 <= scores.shape[1] <= count
    )
    if not columns_fit or (groups is not None and scores.shape[0] != groups):
        columns = str(count) if combinations is None else f"1 to {count}"
        rows = "G" if groups is None else groups
        raise ValueError(f"{where}: scores must have shape ({rows}, {columns}), got {tuple(scores.shape)}")
    if combinations is not None:
        check_combinations(where, combinations, scores, combination_dtype(n, m))
    if weight is not None:
        if scores.dtype != exact_dtype(weight.dtype):
            raise TypeError(f"{where}: scores must be {exact_dtype(weight.dtype)}, got {scores.dtype}")
        if scores.device != weight.device:
            raise ValueError(f"{where}: scores must be on the device of weight {weight.device}, got {scores.device}")


def check_combinations(where: str, combinations: Any, scores: Tensor, dtype: torch.dtype) -> None:
    """Raises unless ``combinations`` are the numbers of compact ``scores``, which are not looked at."""
    if not isinstance(combinations, Tensor):
        raise TypeError(f"{where}: combinations must be a tensor, got {type(combinations).__name__}")
    if combinations.dtype != dtype:
        raise TypeError(f"{where}: combinations must be {dtype}, got {combinations.dtype}")
    if combinations.shape != scores.shape or combinations.device != scores.device:
        raise ValueError(
            f"{where}: combinations must have the shape and device of scores, {tuple(scores.shape)} on "
            f"{scores.device}, got {tuple(combinations.shape)} on {combinations.device}"
        )


def nm_mask(scores: Tensor, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    """The packed mask of the positions that an alive combination keeps, as :func:`nm_remove_` returns it.

    Args:
        scores, n, m, combinations: as for :func:`nm_sparsify`.

    Returns:
        uint8, one bit per weight, in the order of the groups: bit ``i % 8`` of byte ``i // 8``.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    n, m = check_pattern("nm_mask", n, m)
    check_scores("nm_mask", scores, None, n, m, combinations=combinations)
    return pack_mask(alive_mask(scores.detach(), n, m, combinations))


def alive_mask(scores: Tensor, n: int, m: int, combinations: Tensor | None = None) -> Tensor:
    """``(G, m)`` bool: which positions an alive combination keeps."""
    alive = (scores != 0).to(torch.float32)
    if combinations is not None:
        alive = alive.new_zeros(len(alive), math.comb(m, n)).scatter(1, combinations.to(torch.int64), alive)
    return alive @ _combinations(n, m).to(scores.device) > 0


def _reference(
    weight: Tensor, scores: Tensor, mask: Tensor | None, n: int, m: int, combinations: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    groups = to_groups(weight, m)
    kept = alive_mask(scores, n, m, combinations) if mask is None else unpack_mask(mask, groups.shape)
    output = torch.empty_like(weight).copy_(from_groups(torch.where(kept, groups, 0), weight.shape))
    return output, pack_mask(kept)


def _reference_backward(
    grad_output: Tensor,
    weight: Tensor,
    scores: Tensor,
    mask: Tensor,
    n: int,
    m: int,
    combinations: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad, groups = to_groups(grad_output, m), to_groups(weight, m)
    kept = unpack_mask(mask, groups.shape)
    grad_weight = torch.empty_like(weight).copy_(from_groups(torch.where(kept, grad, 0), weight.shape))
    products = grad.to(scores.dtype) * groups.to(scores.dtype)
    sums = products @ _combinations(n, m).to(scores).t()
    if combinations is not None:
        sums = sums.gather(1, combinations.to(torch.int64))
    return grad_weight, torch.where(scores != 0, sums, 0)


def _fake(weight: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), weight.new_empty(((weight.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_backward(grad_output: Tensor, weight: Tensor, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), scores.new_empty(scores.shape)


def _unbound(info: Any, in_dims: Any, args: Any) -> Any:
    mapped = [[a] * info.batch_size if d is None else a.unbind(d) for a, d in zip(args, in_dims, strict=True)]
    return zip(*mapped, strict=True)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    results = [_NmSparsify.apply(*each) for each in _unbound(info, in_dims, args)]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    results = [_backward.overload(*each) for each in _unbound(info, in_dims, args)]
    return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0)


class _NmSparsify(torch.autograd.Function):
    @staticmethod
    def forward(weight, scores, mask, n, m, combinations=None):
        return _forward(weight, scores, mask, n, m, combinations)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, scores, _, *ctx.pattern, combinations = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(weight, scores, output[1], combinations)

    @staticmethod
    def backward(ctx, grad_output, _):
        *tensors, combinations = ctx.saved_tensors
        return *_backward(grad_output, *tensors, *ctx.pattern, combinations), None, None, None, None

    vmap = staticmethod(_vmap)


_forward = operator(
    "nm_sparsify_forward(Tensor weight, Tensor scores, Tensor? mask, int n, int m, Tensor? combinations=None)"
    " -> (Tensor output, Tensor mask)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_NmSparsify.apply,
)
_backward = operator(
    "nm_sparsify_backward(Tensor grad_output, Tensor weight, Tensor scores, Tensor mask, int n, int m,"
    " Tensor? combinations=None)"
    " -> (Tensor grad_weight, Tensor grad_scores)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
