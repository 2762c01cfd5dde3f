"""Tokens by index, with an adjoint that needs no atomic additions (EViT, DynamicViT, SuperViT, CF-ViT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, unfold
from tersor._checks import accumulate_dtype, check_floating
from tersor._operator import call_function, operator
from tersor.tokens.rank_tokens import can_read


def gather_tokens(input: Tensor, index: Tensor) -> Tensor:
    """``output[b, j] = input[b, index[b, j]]``.

    The gradient of a token is the sum of those of its copies, in ascending order of j; where it has none, 0.

    Args:
        input: ``(B, n, C)``, float16, bfloat16, float32 or float64, any strides.
        index: ``(B, m)``, int64, from 0 to n - 1; a token may come several times.

    Returns:
        ``(B, m, C)``, contiguous, in the dtype of ``input``. Differentiable once, for ``input``.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes or devices do not fit; or, on the CPU, an index is out of range. On a GPU, which is not
            waited for, and in compiled graphs such a token is NaN and has no gradient.

    Source: the pruning step of Liang et al., "EViT: Expediting Vision Transformers via Token Reorganizations",
    arXiv 2202.07800.
    """
    name = "gather_tokens"
    check_floating(name, input=input)
    if input.dim() != 3:
        raise ValueError(f"{name}: input must be (B, n, C), got shape {tuple(input.shape)}")
    check_index(name, index, input, input.shape[1])
    return call_function(_GatherTokens, input, index)


def check_index(name: str, index: Any, input: Tensor, count: int, batch: int | None = None) -> None:
    """int64 ``(B, m)`` on the input's device, for its batch, and where it can be seen within ``0 .. count - 1``."""
    batch = input.shape[0] if batch is None else batch
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: index must be a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: index must be int64, got {index.dtype}")
    if index.dim() != 2 or index.shape[0] != batch:
        raise ValueError(f"{name}: index must be (B, m) with B = {batch}, got shape {tuple(index.shape)}")
    if index.device != input.device:
        raise ValueError(f"{name}: index must be on the device of input {input.device}, got {index.device}")
    if can_read(index) and index.numel():
        low, high = (t.item() for t in torch.aminmax(index))
        if low < 0 or high >= count:
            raise ValueError(f"{name}: index must be from 0 to {count - 1}, got {low} to {high}")


def gather_rows(input: Tensor, index: Tensor) -> Tensor:
    """The reference: rows of ``(B, n, C)``, NaN where the index is out of range."""
    outside = (index < 0) | (index >= input.shape[1])
    if input.shape[1] == 0:
        return input.new_full((*index.shape, input.shape[2]), float("nan"))
    places = index.masked_fill(outside, 0)[..., None].expand(-1, -1, input.shape[2])
    return torch.gather(input, 1, places).masked_fill(outside[..., None], float("nan"))


def scatter_rows(rows: Tensor, index: Tensor, length: int) -> Tensor:
    """Its adjoint: rows added up where they came from, in ascending order; those out of range are dropped."""
    outside = (index < 0) | (index >= length)
    places = index.masked_fill(outside, length)[..., None].expand(-1, -1, rows.shape[2])
    wide = rows.to(accumulate_dtype(rows.dtype))
    total = wide.new_zeros(rows.shape[0], length + 1, rows.shape[2]).scatter_add(1, places, wide)
    return total[:, :length].to(rows.dtype).contiguous()


def _fake(input: Tensor, index: Tensor) -> Tensor:
    return input.new_empty((*index.shape, input.shape[2]))


def _fake_backward(grad_output: Tensor, index: Tensor, length: int) -> Tensor:
    return grad_output.new_empty((grad_output.shape[0], length, grad_output.shape[2]))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    folded = (fold(a, d, info.batch_size) for a, d in zip(args, in_dims, strict=True))
    return unfold(_GatherTokens.apply(*folded), info), 0


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    folded = (fold(a, d, info.batch_size) for a, d in zip(args, in_dims, strict=True))
    return unfold(_forward.overload(*folded), info), 0


def _vmap_backward(info: Any, in_dims: Any, grad_output: Tensor, index: Tensor, length: int) -> tuple[Tensor, int]:
    folded = (fold(a, d, info.batch_size) for a, d in zip((grad_output, index), in_dims, strict=False))
    return unfold(_backward(*folded, length), info), 0


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(input, index):
        return _forward(input, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])
        ctx.length = inputs[0].shape[1]

    @staticmethod
    def backward(ctx, grad_output):
        return _backward(grad_output, *ctx.saved_tensors, ctx.length), None

    vmap = staticmethod(_vmap)


_forward = operator(
    "gather_tokens_forward(Tensor input, Tensor index) -> Tensor",
    reference=gather_rows,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_GatherTokens.apply,
)
_backward = operator(
    "gather_tokens_backward(Tensor grad_output, Tensor index, SymInt length) -> Tensor",
    reference=scatter_rows,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
