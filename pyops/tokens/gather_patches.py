"""Patches of images by index, so that only those are embedded that are used (CF-ViT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, one_by_one, unfold
from tersor._checks import as_int, check_floating
from tersor._operator import call_function, operator
from tersor.tokens.gather_tokens import check_index, gather_rows, scatter_rows
from tersor.tokens.rank_tokens import can_read


def gather_patches(images: Tensor, index: Tensor, patch_size: int = 16, rows: Tensor | None = None) -> Tensor:
    """The square patches that ``index`` names, as rows that a patch embedding multiplies.

    Patches are numbered row by row. ``F.linear(gather_patches(x, index, p), conv.weight.flatten(1), conv.bias)`` are
    the chosen outputs of a convolution ``conv`` with kernel and stride p.

    Args:
        images: ``(B, C, H, W)``, float16, bfloat16, float32 or float64, any strides; H and W multiples of the patch.
        index: ``(M, m)``, int64, from 0 to the number of patches of an image less 1.
        patch_size: pixels, at least 1.
        rows: ``(M,)``, int64: which image each row of ``index`` is of. None: each of its own, M = B.

    Returns:
        ``(M, m, C * patch_size ** 2)``, contiguous, elements in the order channel, row, column. Differentiable once,
        for ``images``.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes or devices do not fit; or, on the CPU, an index is out of range. On a GPU, which is not
            waited for, and in compiled graphs such a patch is NaN and has no gradient.

    Source: the embedding of Chen et al., "CF-ViT: A General Coarse-to-Fine Method for Vision Transformer",
    arXiv 2203.03821, computed for the selected patches alone.
    """
    name = "gather_patches"
    check_floating(name, images=images)
    patch_size = as_int(name, patch_size=patch_size)
    if patch_size < 1:
        raise ValueError(f"{name}: patch_size must be at least 1, got {patch_size}")
    if images.dim() != 4 or images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(
            f"{name}: images must be (B, C, H, W), H and W multiples of {patch_size}, got shape {tuple(images.shape)}"
        )
    if rows is not None:
        _check_rows(name, rows, images)
    count = images.shape[2] // patch_size * (images.shape[3] // patch_size)
    check_index(name, index, images, count, None if rows is None else rows.shape[0])
    return call_function(_GatherPatches, images, index, rows, patch_size)


def _check_rows(name: str, rows: Any, images: Tensor) -> None:
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name}: rows must be a torch.Tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64:
        raise TypeError(f"{name}: rows must be int64, got {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"{name}: rows must be (M,), got shape {tuple(rows.shape)}")
    if rows.device != images.device:
        raise ValueError(f"{name}: rows must be on the device of images {images.device}, got {rows.device}")
    if can_read(rows) and rows.numel():
        low, high = (t.item() for t in torch.aminmax(rows))
        if low < 0 or high >= images.shape[0]:
            raise ValueError(f"{name}: rows must be from 0 to {images.shape[0] - 1}, got {low} to {high}")


def _as_patches(images: Tensor, patch_size: int) -> Tensor:
    """``(B, patches, C * patch_size ** 2)``."""
    tiles = images.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _places(index: Tensor, rows: Tensor | None, images: int, patches: int) -> Tensor:
    """Places in the list of all patches of all images, ``(1, M * m)``; -1 for what is out of range."""
    own = torch.arange(images, device=index.device) if rows is None else rows
    outside = (index < 0) | (index >= patches) | (own < 0)[:, None] | (own >= images)[:, None]
    return (own[:, None] * patches + index).masked_fill(outside, -1).view(1, -1)


def _reference(images: Tensor, index: Tensor, rows: Tensor | None, patch_size: int) -> Tensor:
    every = _as_patches(images, patch_size)
    places = _places(index, rows, every.shape[0], every.shape[1])
    return gather_rows(every.flatten(0, 1)[None], places)[0].view(*index.shape, every.shape[2])


def _reference_backward(
    grad_output: Tensor, index: Tensor, rows: Tensor | None, patch_size: int, shape: Sequence[int]
) -> Tensor:
    batch, channels, height, width = shape
    high, wide = height // patch_size, width // patch_size
    places = _places(index, rows, batch, high * wide)
    total = scatter_rows(grad_output.reshape(1, -1, grad_output.shape[2]), places, batch * high * wide)
    tiles = total.view(batch, high, wide, channels, patch_size, patch_size)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(list(shape))


def _fake(images: Tensor, index: Tensor, rows: Tensor | None, patch_size: int) -> Tensor:
    return images.new_empty((*index.shape, images.shape[1] * patch_size**2))


def _fake_backward(grad_output: Tensor, index: Tensor, rows: Any, patch_size: int, shape: Sequence[int]) -> Tensor:
    return grad_output.new_empty(list(shape))


def _vmap(info: Any, in_dims: Any, images: Tensor, index: Tensor, rows: Any, patch_size: int) -> tuple[Any, Any]:
    if rows is not None:
        return one_by_one(_GatherPatches.apply, info, in_dims, (images, index, rows, patch_size))
    folded = (fold(a, d, info.batch_size) for a, d in zip((images, index), in_dims, strict=False))
    return unfold(_GatherPatches.apply(*folded, None, patch_size), info), 0


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_forward.overload, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward, info, in_dims, args)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(images, index, rows, patch_size):
        return _forward(images, index, rows, patch_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        images, index, rows, ctx.patch_size = inputs
        ctx.save_for_backward(index, rows)
        ctx.shape = images.shape

    @staticmethod
    def backward(ctx, grad_output):
        return _backward(grad_output, *ctx.saved_tensors, ctx.patch_size, ctx.shape), None, None, None

    vmap = staticmethod(_vmap)


_forward = operator(
    "gather_patches_forward(Tensor images, Tensor index, Tensor? rows, int patch_size) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_GatherPatches.apply,
)
_backward = operator(
    "gather_patches_backward(Tensor grad_output, Tensor index, Tensor? rows, int patch_size, SymInt[] shape) -> Tensor",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
