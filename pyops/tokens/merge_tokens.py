"""Tokens merged into their weighted mean, with an adjoint that is a gather (Token Merging)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating
from tersor._operator import call_function, operator
from tersor.tokens.gather_tokens import check_index, gather_rows, scatter_rows
from tersor.tokens.rank_tokens import can_read


def merge_tokens(input: Tensor, index: Tensor, length: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The mean of the tokens that go to the same place, weighted by how many patches each stands for.

    With p(i) the ``index`` of token i, the place that it goes to:

    .. math:: S_j = \sum_{p(i) = j} s_i, \qquad y_j = \sum_{p(i) = j} \frac{s_i}{S_j} \, x_i, \qquad
        \frac{\partial}{\partial x_i} = \frac{s_i}{S_{p(i)}} \, \frac{\partial}{\partial y_{p(i)}}

    Sums run in ascending order of i. A token that goes alone keeps its bits; a place that no token goes to is 0, of
    size 0. Where tokens have been merged, attention counts each as often as it stands for patches (the paper's
    proportional attention) if ``sizes.log()`` is added to the logits of its key, as the ``attn_mask`` of
    ``torch.nn.functional.scaled_dot_product_attention``: ``sizes.log()[:, None, None, :].to(query.dtype)``.

    Args:
        input: ``(B, n, C)``, float16, bfloat16, float32 or float64, any strides.
        index: ``(B, n)``, int64, from 0 to ``length`` - 1: the place of each token, as from :func:`match_tokens`.
        length: number of places, at least 0.
        sizes: ``(B, n)``, float32 (float64 for a float64 ``input``), above 0; None for ones. It gets no gradient.

    Returns:
        ``(B, length, C)``, contiguous, in the dtype of ``input``, and the sizes S, ``(B, length)``, float32 (float64
        for float64), in which sums are made too. The first is differentiable once, for ``input``.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes or devices do not fit, or ``length`` is negative; or, on the CPU, an index is out of range or
            a size not above 0. On a GPU, which is not waited for, and in compiled graphs a token whose index is out of
            range goes nowhere and has no gradient.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461.
    """
    name = "merge_tokens"
    check_floating(name, input=input)
    if input.dim() != 3:
        raise ValueError(f"{name}: input must be (B, n, C), got shape {tuple(input.shape)}")
    length = as_int(name, length=length)
    if length < 0:
        raise ValueError(f"{name}: length must be at least 0, got {length}")
    check_index(name, index, input, length)
    if index.shape != input.shape[:2]:
        raise ValueError(f"{name}: index must be {tuple(input.shape[:2])} for this input, got {tuple(index.shape)}")
    if sizes is not None:
        _check_sizes(name, sizes, input)
        sizes = sizes.detach()
    return call_function(_MergeTokens, input, index, sizes, length)


def _check_sizes(name: str, sizes: Tensor, input: Tensor) -> None:
    check_floating(name, sizes=sizes)
    if sizes.shape != input.shape[:2]:
        raise ValueError(f"{name}: sizes must be {tuple(input.shape[:2])} for this input, got {tuple(sizes.shape)}")
    if sizes.dtype != accumulate_dtype(input.dtype):
        raise TypeError(f"{name}: sizes must be {accumulate_dtype(input.dtype)} for this input, got {sizes.dtype}")
    if sizes.device != input.device:
        raise ValueError(f"{name}: sizes must be on the device of input {input.device}, got {sizes.device}")
    if can_read(sizes) and sizes.numel() and not (lowest := sizes.min().item()) > 0:  # the least of NaN is NaN
        raise ValueError(f"{name}: sizes must be above 0, got {lowest}")


def _shares(sizes: Tensor, output_sizes: Tensor, index: Tensor) -> Tensor:
    """Each token's part of the place that it goes to, ``(B, n, 1)``; NaN where there is no such place."""
    return sizes[..., None] / gather_rows(output_sizes[..., None], index)


def _given_or_ones(sizes: Tensor | None, index: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ones(index.shape, dtype=accumulate_dtype(dtype), device=index.device) if sizes is None else sizes


def _reference(input: Tensor, index: Tensor, sizes: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    sizes = _given_or_ones(sizes, index, input.dtype)
    output_sizes = scatter_rows(sizes[..., None], index, length)[..., 0]
    output = scatter_rows(input.to(sizes.dtype) * _shares(sizes, output_sizes, index), index, length)
    return output.to(input.dtype), output_sizes.contiguous()


def _reference_backward(grad_output: Tensor, index: Tensor, sizes: Tensor | None, output_sizes: Tensor) -> Tensor:
    sizes = _given_or_ones(sizes, index, grad_output.dtype)
    grad = gather_rows(grad_output, index).to(sizes.dtype) * _shares(sizes, output_sizes, index)
    nowhere = (index < 0) | (index >= output_sizes.shape[1])
    return grad.masked_fill(nowhere[..., None], 0).to(grad_output.dtype).contiguous()


def _fake(input: Tensor, index: Tensor, sizes: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    batch, _, channels = input.shape
    output_sizes = input.new_empty((batch, length), dtype=accumulate_dtype(input.dtype))
    return input.new_empty((batch, length, channels)), output_sizes


def _fake_backward(grad_output: Tensor, index: Tensor, sizes: Tensor | None, output_sizes: Tensor) -> Tensor:
    return grad_output.new_empty((*index.shape, grad_output.shape[2]))


def _folded(info: Any, in_dims: Any, *tensors: Tensor | None) -> list[Tensor | None]:
    pairs = zip(tensors, in_dims, strict=True)
    return [None if t is None else fold(t, dim, info.batch_size) for t, dim in pairs]


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    results = _MergeTokens.apply(*_folded(info, in_dims[:3], *args[:3]), args[3])
    return tuple(unfold(t, info) for t in results), (0, 0)


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    results = _forward.overload(*_folded(info, in_dims[:3], *args[:3]), args[3])
    return tuple(unfold(t, info) for t in results), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    return unfold(_backward(*_folded(info, in_dims, *args)), info), 0


class _MergeTokens(torch.autograd.Function):
    @staticmethod
    def forward(input, index, sizes, length):
        return _forward(input, index, sizes, length)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # the sizes have none
        ctx.save_for_backward(inputs[1], inputs[2], output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        return None if grad_output is None else _backward(grad_output, *ctx.saved_tensors), None, None, None

    vmap = staticmethod(_vmap)


_forward = operator(
    "merge_tokens_forward(Tensor input, Tensor index, Tensor? sizes, SymInt length)"
    " -> (Tensor output, Tensor output_sizes)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_MergeTokens.apply,
)
_backward = operator(
    "merge_tokens_backward(Tensor grad_output, Tensor index, Tensor? sizes, Tensor output_sizes) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
