"""What the operators' batching rules share: a mapped dimension folded into the batch, or one call per sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension moved to the front and merged into the batch."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def unfold(tensor: Tensor, info: Any) -> Tensor:
    """The inverse of :func:`fold`, with the mapped dimension in front."""
    return tensor.unflatten(0, (info.batch_size, -1))


def one_by_one(function: Callable[..., Any], info: Any, in_dims: Any, args: Sequence[Any]) -> tuple[Any, Any]:
    """One call per sample, where a folded batch would share what the samples do not; results are stacked in front."""
    calls = []
    for i in range(info.batch_size):
        mine = [a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)]
        calls.append(function(*mine))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(torch.stack(t) for t in zip(*calls, strict=True)), (0,) * len(calls[0])
