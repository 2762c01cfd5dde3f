"""Linear layers and convolutions with an N:M sparse weight, for training."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tersor.sparsity.nm_sparsify import nm_sparsify
from tersor.sparsity.srste_sparsify import srste_sparsify


def nm_linear(
    input: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    mask: Tensor | None = None,
    combinations: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` with :func:`nm_sparsify` of the weight, whose arguments these are."""
    return F.linear(input, nm_sparsify(weight, scores, n, m, mask, combinations), bias)


def nm_conv2d(
    input: Tensor,
    weight: Tensor,
    scores: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    mask: Tensor | None = None,
    combinations: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with :func:`nm_sparsify` of the weight, whose arguments these are."""
    sparse = nm_sparsify(weight, scores, n, m, mask, combinations)
    return F.conv2d(input, sparse, bias, stride, padding, dilation, groups)


def srste_linear(input: Tensor, weight: Tensor, bias: Tensor | None, n: int, m: int, decay: float = 2e-4) -> Tensor:
    """``torch.nn.functional.linear`` with :func:`srste_sparsify` of the weight, whose arguments these are."""
    return F.linear(input, srste_sparsify(weight, n, m, decay), bias)


def srste_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    decay: float = 2e-4,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with :func:`srste_sparsify` of the weight, whose arguments these are."""
    return F.conv2d(input, srste_sparsify(weight, n, m, decay), bias, stride, padding, dilation, groups)
