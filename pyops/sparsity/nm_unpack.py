"""A packed N:M matrix with its zeros again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor._checks import as_int
from tersor._operator import operator
from tersor.sparsity.nm_pack import check_packed, places_of
from tersor.sparsity.nm_pattern import from_groups


def nm_unpack(values: Tensor, index: Tensor, n: int, m: int, kernel_size: Sequence[int] | None = None) -> Tensor:
    """The weight that :func:`nm_pack` packed, with zeros where nothing was kept.

    Args:
        values, index, n, m: as :func:`nm_pack` returned and took them.
        kernel_size: ``(KH, KW)`` of a convolution; None for a linear layer.

    Returns:
        ``(O, I)``, or ``(O, I, KH, KW)`` in channels-last memory format; the dtype of ``values``.

    Raises:
        TypeError, ValueError: the arguments do not belong together.
    """
    name = "nm_unpack"
    n, m = check_packed(name, values, index, n, m)
    outputs, groups = values.shape[:2]
    if kernel_size is None:
        return _nm_unpack.overload(values, index, n, m)
    height, width = (as_int(name, kernel_size=k) for k in kernel_size)
    if min(height, width) < 1 or (groups * m) % (height * width):
        raise ValueError(f"{name}: kernel_size must divide a row of {groups * m} elements, got {(height, width)}")
    return from_groups(
        _nm_unpack.overload(values, index, n, m), (outputs, groups * m // (height * width), height, width)
    )


def unpack_rows(values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    """The reference: ``(O, K)``, for checked arguments."""
    outputs, groups = values.shape[:2]
    # A damaged index may hold places beyond the group; they are dropped.
    wide = values.new_zeros(outputs, groups, 16)
    wide.scatter_(2, places_of(index, groups, n, m), values)
    return wide[..., :m].reshape(outputs, groups * m)


def _fake(values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    return values.new_empty((values.shape[0], values.shape[1] * m))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    mapped = [a.unbind(d) if isinstance(d, int) else [a] * info.batch_size for a, d in zip(args, in_dims, strict=True)]
    return torch.stack([_nm_unpack.overload(*each) for each in zip(*mapped, strict=True)]), 0


_nm_unpack = operator(
    "nm_unpack(Tensor values, Tensor index, int n, int m) -> Tensor",
    reference=unpack_rows,
    fake=_fake,
    vmap=_vmap,
)
