"""N:M sparsity in the plain-torch way that the package replaces: the peer in benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.sparsity import nm_combinations


class _Binarize(torch.autograd.Function):
    """1 where not zero; the gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return (x != 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output


def nm_sparsify_chain(weight: Tensor, scores: Tensor, n: int, m: int) -> Tensor:
    """What :func:`tersor.nm_sparsify` computes: a matrix product with the table, kept for the backward pass."""
    alive = (scores != 0).to(scores.dtype)
    raw = (scores * alive) @ nm_combinations(n, m).to(scores)
    mask = _Binarize.apply(raw)
    if weight.dim() == 4:
        outputs, inputs, height, width = weight.shape
        mask = mask.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)
    else:
        mask = mask.reshape(weight.shape)
    return mask * weight


@torch.no_grad()
def nm_remove_chain(scores: Tensor, k: int) -> None:
    """What :func:`tersor.sparsity.nm_remove_` does, but for ties."""
    scores[scores == 0] = -1000
    if k:
        lowest = torch.topk(scores, k, dim=1, largest=False).indices
        scores.scatter_(1, lowest, 0.0)
