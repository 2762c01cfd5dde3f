"""SuperViT's and EViT's step inside a block: residual, choice of tokens and layer norm in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._batching import fold, one_by_one, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating
from tersor._operator import call_function, operator
from tersor.tokens.gather_tokens import gather_rows, scatter_rows
from tersor.tokens.rank_tokens import check_scores
from tersor.tokens.resplit_tokens import same_dtype


def prune_tokens(
    scores: Tensor,
    input: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: int,
    scale: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Keeps the class token and the ``count`` best others of a residual sum, and normalises what is kept.

    .. math::
        t_j &= x_{i(j)} + \mathrm{scale} \cdot y_{i(j)}, \quad i(0) = 0, \quad i(j) = 1 + \text{place of rank } j - 1 \\
        z_j &= \mathrm{weight} \cdot (t_j - \mathrm{mean}(t_j)) / \sqrt{\mathrm{var}(t_j) + \varepsilon} + \mathrm{bias}

    Tokens that are dropped are neither read nor normalised. Ranking is stable, highest first (:func:`rank_tokens`).

    Args:
        scores: ``(B, n - 1)``, any floating dtype: of the tokens after the class token. It gets no gradient.
        input: ``(B, n, C)``, the block's residual stream x; n of at least 2.
        branch: ``(B, n, C)``, the attention branch y.
        weight, bias: ``(C)``, of the layer norm.
        count: tokens to keep besides the class token, at least 1; from n - 1 on all are kept, in the order of their
            rank. SuperViT takes ``ceil(rate * n)``, EViT ``ceil(rate * (n - 1))``.
        scale: factor of the branch.
        eps: of the layer norm, above 0.

    ``input``, ``branch``, ``weight`` and ``bias`` have one dtype, float16, bfloat16, float32 or float64 (under autocast
    the widest of theirs is taken) and any strides.

    Returns:
        tokens t and normalised tokens z, both ``(B, 1 + m, C)`` with m the smaller of ``count`` and n - 1, and the
        int64 index i, ``(B, 1 + m)``. Arithmetic is in float32 (float64 for float64), and z is computed from t before
        it is rounded. Differentiable once, for the four tensors.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes or devices do not fit, ``count`` or ``eps`` is out of range; or, on the CPU, a score is NaN.

    Source: Lin et al., "Super Vision Transformer", arXiv 2205.11397.
    """
    name = "prune_tokens"
    tensors = {"input": input, "branch": branch, "weight": weight, "bias": bias}
    check_floating(name, **tensors)
    check_scores(name, scores)
    if input.dim() != 3 or input.shape[1] < 2:
        raise ValueError(f"{name}: input must be (B, n, C) with n of at least 2, got shape {tuple(input.shape)}")
    batch, length, channels = input.shape
    expected = {"branch": (batch, length, channels), "weight": (channels,), "bias": (channels,)}
    for key, tensor in {**tensors, "scores": scores}.items():
        shape = (batch, length - 1) if key == "scores" else expected.get(key, input.shape)
        if tensor.shape != shape:
            raise ValueError(f"{name}: {key} must be {tuple(shape)} for this input, got shape {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: {key} must be on the device of input {input.device}, got {tensor.device}")
    count = as_int(name, count=count)
    if count < 1:
        raise ValueError(f"{name}: count must be at least 1, got {count}")
    if not eps > 0:
        raise ValueError(f"{name}: eps must be above 0, got {eps}")
    cast = same_dtype(name, **tensors)
    return call_function(_PruneTokens, *cast, scores.detach(), min(count, length - 1), float(scale), float(eps))


def _normalize(tokens: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Standardised rows and the reciprocal of their deviation."""
    centred = tokens - tokens.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _reference(
    input: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scores: Tensor, count: int, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(input.dtype)
    kept = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :count]
    index = F.pad(1 + kept, (1, 0))
    tokens = gather_rows(input, index).to(dtype) + scale * gather_rows(branch, index).to(dtype)
    normalized = _normalize(tokens, eps)[0] * weight.to(dtype) + bias.to(dtype)
    return tokens.to(input.dtype), normalized.to(input.dtype), index


def _reference_backward(
    grad_tokens: Tensor,
    grad_normalized: Tensor,
    tokens: Tensor,
    weight: Tensor,
    index: Tensor,
    length: int,
    scale: float,
    eps: float,
    need_branch: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(tokens.dtype)
    g, t = grad_normalized.to(dtype).contiguous(), tokens.to(dtype)
    standard, rstd = _normalize(t, eps)
    scaled = g * weight.to(dtype)
    inner = scaled - scaled.mean(2, keepdim=True) - standard * (scaled * standard).mean(2, keepdim=True)
    total = grad_tokens.to(dtype) + inner * rstd
    grad_input = scatter_rows(total.to(tokens.dtype), index, length)
    empty = tokens.new_empty(0)
    grad_branch = scatter_rows((total * scale).to(tokens.dtype), index, length) if need_branch else empty
    if not need_parameters:
        return grad_input, grad_branch, empty, empty
    grad_weight = (g * standard).sum((0, 1)).to(tokens.dtype)
    return grad_input, grad_branch, grad_weight, g.sum((0, 1)).to(tokens.dtype)


def _fake(
    input: Tensor, branch: Any, weight: Any, bias: Any, scores: Any, count: int, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (input.shape[0], 1 + count, input.shape[2])
    return input.new_empty(shape), input.new_empty(shape), input.new_empty(shape[:2], dtype=torch.int64)


def _fake_backward(
    grad_tokens: Tensor, grad_normalized: Any, tokens: Tensor, weight: Any, index: Any, length: int, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, need_branch, need_parameters = args
    shape = (tokens.shape[0], length, tokens.shape[2])
    channels = tokens.shape[2] if need_parameters else 0
    return (
        tokens.new_empty(shape),
        tokens.new_empty(shape if need_branch else 0),
        tokens.new_empty(channels),
        tokens.new_empty(channels),
    )


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    input, branch, weight, bias, scores, *options = args
    if in_dims[2] is not None or in_dims[3] is not None:
        return one_by_one(_PruneTokens.apply, info, in_dims, args)
    mapped = zip((input, branch, scores), (*in_dims[:2], in_dims[4]), strict=True)
    input, branch, scores = (fold(t, d, info.batch_size) for t, d in mapped)
    results = _PruneTokens.apply(input, branch, weight, bias, scores, *options)
    return tuple(unfold(t, info) for t in results), (0, 0, 0)


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_forward.overload, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward, info, in_dims, args)


class _PruneTokens(torch.autograd.Function):
    @staticmethod
    def forward(input, branch, weight, bias, scores, count, scale, eps):
        return _forward(input, branch, weight, bias, scores, count, scale, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, weight, _, _, _, ctx.scale, ctx.eps = inputs
        tokens, _, index = output
        ctx.length = input.shape[1]
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(tokens, weight, index)

    @staticmethod
    def backward(ctx, grad_tokens, grad_normalized, _):
        needed = ctx.needs_input_grad
        gradients = _backward(
            grad_tokens, grad_normalized, *ctx.saved_tensors, ctx.length, ctx.scale, ctx.eps, needed[1],
            needed[2] or needed[3],
        )  # fmt: skip
        return (*(g if n else None for g, n in zip(gradients, needed[:4], strict=True)), None, None, None, None)

    vmap = staticmethod(_vmap)


_forward = operator(
    "prune_tokens_forward(Tensor input, Tensor branch, Tensor weight, Tensor bias, Tensor scores, SymInt count,"
    " float scale, float eps) -> (Tensor tokens, Tensor normalized, Tensor index)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_PruneTokens.apply,
)
_backward = operator(
    "prune_tokens_backward(Tensor grad_tokens, Tensor grad_normalized, Tensor tokens, Tensor weight, Tensor index,"
    " SymInt length, float scale, float eps, bool need_branch, bool need_parameters)"
    " -> (Tensor grad_input, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
