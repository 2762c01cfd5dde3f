"""Scores of the combinations that are left, in less memory: what a layer and its optimiser store is made smaller."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tersor.sparsity.nm_pattern import combination_dtype
from tersor.sparsity.nm_remove import nm_remove_


def expand_scores(scores: Tensor, combinations: Tensor, n: int, m: int) -> Tensor:
    """``(G, binom(m, n))``: compact scores in their places, with zeros for those that are not stored."""
    full = scores.new_zeros(len(scores), math.comb(m, n))
    return full.scatter(1, combinations.to(torch.int64), scores)


@torch.no_grad()
def drop_(layer: Any, left: int, optimizer: Optimizer, share: float) -> None:
    """Of each group leaves the ``left`` highest scores, ties as in removal; the others stay zero from now on.

    They are no longer stored where at most ``share`` of what is stored is left. Else the optimiser's state of them is
    zero, so that no momentum moves them: what is trained is the same in either case.
    """
    alpha, n, m = layer.alpha, layer.n, layer.m
    scores = alpha.detach().clone()
    nm_remove_(scores, scores.shape[1] - left, n, m, layer.combinations)
    kept, shape = scores != 0, (len(scores), left)
    del scores  # before the rest is made
    if left > share * alpha.shape[1]:
        for state, name in _states(alpha, optimizer):
            state[name].masked_fill_(~kept, 0)
        alpha.masked_fill_(~kept, 0)
        return
    numbers = layer.combinations
    if numbers is None:
        numbers = torch.arange(math.comb(m, n), device=alpha.device, dtype=combination_dtype(n, m)).expand_as(kept)
    for state, name in _states(alpha, optimizer):
        state[name] = state[name][kept].view(shape)
    layer.store_(alpha.detach()[kept].view(shape), numbers[kept].view(shape))


@torch.no_grad()
def expand_(model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
    """All scores again, zero for those that were dropped: as published, and under the published keys.

    Args:
        model: with N:M layers, compact or not; changed in place.
        optimizer: whose state of the scores is expanded too, zero for those that were dropped.

    Returns:
        ``model``.

    Raises:
        ValueError: as for the argument ``compact`` of :class:`NMSchedule`.
    """
    layers: list[Any] = [x for x in model.modules() if getattr(x, "combinations", None) is not None]
    if optimizer is not None:
        check_states("expand_", layers, optimizer)
    for layer in layers:
        numbers = layer.combinations
        if optimizer is not None:
            for state, name in _states(layer.alpha, optimizer):
                state[name] = expand_scores(state[name], numbers, layer.n, layer.m)
        layer.store_(layer.full_scores(), None)
    return model


def check_states(where: str, layers: Iterable[Any], optimizer: Optimizer) -> None:
    """Raises unless the optimiser's state of every layer's scores can be made smaller and larger with them."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{where}: the optimiser must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):  # which keeps all in one vector, with its first parameter
        raise ValueError(f"{where}: the optimiser must keep the state of each parameter apart, got LBFGS")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in layers:
        alpha = layer.alpha
        if id(alpha) not in trained:
            raise ValueError(f"{where}: the optimiser must train the scores of all layers, got one without {layer}'s")
        if hasattr(alpha, "full_tensor"):
            raise ValueError(f"{where}: scores must not be sharded, got a {type(alpha).__name__}")
        for name, value in optimizer.state.get(alpha, {}).items():
            alike = isinstance(value, Tensor) and (value.shape == alpha.shape or value.numel() == 1)
            if not alike and not isinstance(value, (int, float, type(None))):
                raise ValueError(
                    f"{where}: the optimiser's state must be numbers and tensors of the scores' shape "
                    f"{tuple(alpha.shape)}, got {name} {_described(value)} of {type(optimizer).__name__}"
                )


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _states(alpha: Tensor, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the optimiser keeps a tensor of the scores' shape."""
    state = optimizer.state.get(alpha, {})
    for name in list(state):
        if isinstance(state[name], Tensor) and state[name].shape == alpha.shape:
            yield state, name


def resize_(parameter: nn.Parameter, values: Tensor) -> None:
    """Gives the very parameter that optimisers and others refer to other values, of another shape."""
    parameter.grad = None
    # The last loss may still hold the node that adds to the gradient, and with it the former shape. Torch makes that
    # node anew on a change of the dtype only.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values
