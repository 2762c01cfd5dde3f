"""Layers that learn which combination of every group to keep (LBC), and the parametrization of SR-STE."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.quantization._quantizer import exact_dtype
from tersor.sparsity.nm_compact import check_states, drop_, expand_scores, resize_
from tersor.sparsity.nm_pattern import check_groups, check_pattern, combination_dtype, nm_combinations
from tersor.sparsity.nm_remove import nm_remove_
from tersor.sparsity.nm_schedule import nm_schedule
from tersor.sparsity.nm_sparsify import nm_sparsify
from tersor.sparsity.srste_sparsify import srste_sparsify


class _Scores:
    """Scores of every way to keep n of m, of which the alive ones say what stays; a part of a module."""

    alpha: nn.Parameter
    combinations: Tensor | None  # of compact scores: which they are

    def _configure_scores(self, weight: Tensor, n: int, m: int) -> None:
        name = type(self).__name__
        self.n, self.m = check_pattern(name, n, m)
        groups, combinations = check_groups(name, weight.shape, self.m), math.comb(self.m, self.n)
        start = 1 / math.comb(self.m - 1, self.n - 1)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.full((groups, combinations), start, dtype=dtype, device=weight.device))
        nn.Module.register_buffer(self, "combinations", None)  # type: ignore[arg-type]
        nn.Module.register_load_state_dict_pre_hook(self, _store_as_saved)  # type: ignore[arg-type]
        self._mask: tuple[Tensor, Tensor, tuple[int, int]] | None = None  # of which scores it is, in which state

    def remove_(self, k: int) -> None:
        """Removes the k lowest scores of each group, see :func:`nm_remove_`; the next forward pass uses its mask.

        Those that compact scores do not store count as the lowest.
        """
        dropped = math.comb(self.m, self.n) - self.alpha.shape[1]
        mask = nm_remove_(self.alpha, max(0, k - dropped), self.n, self.m, self.combinations)
        self._mask = mask, self.alpha, self._state()

    def full_scores(self) -> Tensor:
        """``(groups, binom(m, n))``: all scores, zero for those that are not stored."""
        scores = self.alpha.detach()
        return scores if self.combinations is None else expand_scores(scores, self.combinations, self.n, self.m)

    def store_(self, scores: Tensor, combinations: Tensor | None) -> None:
        """From now on has these scores, compact where ``combinations`` says which they are."""
        resize_(self.alpha, scores)
        self.combinations, self._mask = combinations, None

    def _state(self) -> tuple[int, int]:
        """Differs after a change, and for a copy, which counts its changes from 0 again."""
        return self.alpha._version, self.alpha.data_ptr()

    def _sparsify(self, weight: Tensor) -> Tensor:
        mask = None
        if not torch.compiler.is_compiling() and self._mask is not None:
            mask, scores, state = self._mask
            if scores is not self.alpha or state != self._state() or mask.device != scores.device:
                mask = self._mask = None  # the scores have changed since, or been replaced as by FSDP2
        scores = self.alpha.to(exact_dtype(weight.dtype))  # FSDP2 may give them in half precision
        return nm_sparsify(weight, scores, self.n, self.m, mask, self.combinations)


def _store_as_saved(layer: Any, saved: dict[str, Any], prefix: str, *others: Any) -> None:
    """Before a state dict is loaded: storage of its shape, be it compact or not."""
    errors, numbers = others[-1], saved.get(f"{prefix}combinations")
    groups, count = len(layer.alpha), math.comb(layer.m, layer.n)
    if numbers is None:
        if layer.combinations is not None and f"{prefix}alpha" in saved:
            layer.store_(layer.alpha.new_empty(groups, count), None)
        return
    expected = combination_dtype(layer.n, layer.m)
    if numbers.dtype != expected or numbers.dim() != 2 or len(numbers) != groups or not 1 <= numbers.shape[1] <= count:
        given = f"{numbers.dtype} {tuple(numbers.shape)}"
        errors.append(f"{prefix}combinations must be {expected} of shape ({groups}, 1 to {count}), got {given}")
        return
    wide = numbers.to(torch.int16)
    if not wide.is_meta and not ((wide >= 0) & (wide < count)).all().logical_and((wide.diff(dim=1) > 0).all()):
        errors.append(f"{prefix}combinations must ascend from 0 to at most {count - 1} in each group")
        return
    if layer.combinations is None or layer.combinations.shape != numbers.shape:
        storage = layer.alpha.new_empty(numbers.shape)
        layer.store_(storage.detach(), torch.empty_like(numbers, device=storage.device))


class NMScores(_Scores, nn.Module):
    """:func:`nm_sparsify` with its scores as a parametrization, for ``torch.nn.utils.parametrize``.

    Args:
        weight: for its shape, dtype and device.
        n, m: 1 <= n < m <= 16; m divides the number of weights.

    Source: Zhang et al., arXiv 2206.06662.
    """

    def __init__(self, weight: Tensor, n: int = 2, m: int = 4) -> None:
        super().__init__()
        self._configure_scores(weight, n, m)

    def forward(self, weight: Tensor) -> Tensor:
        return self._sparsify(weight)

    def extra_repr(self) -> str:
        return f"{self.n}:{self.m}"


class _Nm(_Scores):
    """What the layers add to torch's: scores and table, under their published names."""

    weight: Tensor

    def _configure(self, n: int, m: int) -> None:
        self._configure_scores(self.weight, n, m)
        table = nm_combinations(self.n, self.m).to(self.weight.device)
        nn.Module.register_buffer(self, "index_list", table)  # type: ignore[arg-type]

    def sparse_weight(self) -> Tensor:
        """The weight with its removed positions set to zero."""
        return self._sparsify(self.weight)


class NMLinear(_Nm, nn.Linear):
    """``torch.nn.Linear`` of which n in every m consecutive weights are kept, chosen by learned scores.

    Args:
        args, kwargs: as for ``torch.nn.Linear``.
        n, m: 1 <= n < m <= 16; m divides the number of weights.

    Source: Zhang et al., arXiv 2206.06662.
    """

    def __init__(self, *args: Any, n: int = 2, m: int = 4, **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._configure(n, m)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.sparse_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.n}:{self.m}"


class NMConv2d(_Nm, nn.Conv2d):
    """``torch.nn.Conv2d`` of which n in every m consecutive weights are kept; see :class:`NMLinear`.

    The groups run along the input channels of one kernel position; where m does not divide these, on into the next
    position and the next output channel.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``.
        n, m: 1 <= n < m <= 16; m divides the number of weights.

    Source: Zhang et al., arXiv 2206.06662.
    """

    def __init__(self, *args: Any, n: int = 2, m: int = 4, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._configure(n, m)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.sparse_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.n}:{self.m}"


class SrSte(nn.Module):
    """Parametrization of a weight by :func:`srste_sparsify`, for ``torch.nn.utils.parametrize``.

    Args:
        n, m: 1 <= n < m <= 16.
        decay: of the elements that are zero.

    Source: Zhou et al., arXiv 2102.04010.
    """

    def __init__(self, n: int = 2, m: int = 4, decay: float = 2e-4) -> None:
        super().__init__()
        self.n, self.m = check_pattern("SrSte", n, m)
        self.decay = float(decay)

    def forward(self, weight: Tensor) -> Tensor:
        return srste_sparsify(weight, self.n, self.m, self.decay)

    def extra_repr(self) -> str:
        return f"{self.n}:{self.m}, decay={self.decay}"


class NMSchedule:
    r"""Takes the layers of a model to one combination a group over a training run.

    ::

        schedule = NMSchedule(model, final_epoch=60)
        for epoch in range(120):
            schedule.start_epoch(epoch)
            for images, labels in loader:
                schedule.step()  # before the forward pass
                ...
        schedule.finish()

    Args:
        model: with :class:`NMLinear` or :class:`NMConv2d` layers, or parametrizations :class:`NMScores`.
        final_epoch: from which on one combination is left, see :func:`nm_schedule`.
        power: of the schedule; 3 for the published ResNets, 4 for DeiT.
        freeze: from ``final_epoch`` on the scores get no gradient, as in the published ResNets (not in DeiT). Their
            gradients are dropped, so that an optimiser leaves them alone.
        compact: the optimiser that trains the scores. With it, what an epoch has removed up to its end is dropped for
            good; without, a removed combination comes back where a kept one's score falls below its own, which momentum
            may have moved off zero, as published. Dropped scores are not stored, nor the optimiser's state of them;
            every parameter stays the same object. For optimisers like SGD and Adam, which move each element by
            its own state; not under DistributedDataParallel or FSDP, nor with a step captured as a CUDA graph.
        share: of ``compact``: stores less where at most this share of the stored scores is left. Decides on memory
            only; with 0 all stay stored.

    Raises:
        TypeError, ValueError: ``model`` has no such layer, or an option is not as stated.

    Source: Zhang et al., arXiv 2206.06662.
    """

    def __init__(
        self,
        model: nn.Module,
        final_epoch: int,
        power: int = 3,
        freeze: bool = True,
        compact: Optimizer | None = None,
        share: float = 0.5,
    ) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, (NMLinear, NMConv2d, NMScores))]
        if not self.layers:
            raise ValueError(f"NMSchedule: model must hold N:M layers, got {type(model).__name__} without one")
        nm_schedule(0, 2, final_epoch, power)  # which checks both
        self.final_epoch, self.power, self.freeze = final_epoch, power, freeze
        if not 0 <= share <= 1:
            raise ValueError(f"NMSchedule: share must be from 0 to 1, got {share}")
        if compact is not None:
            if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
                raise ValueError("NMSchedule: compact must be None under DistributedDataParallel, got an optimiser")
            check_states("NMSchedule", self.layers, compact)
        self.compact, self.share = compact, share
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Sets how many scores the steps of this epoch remove, and makes them compact if that was asked for."""
        self.removed = self._removed_in(epoch)
        if self.compact is not None and epoch > 0:
            self._drop(self._removed_in(epoch - 1), self.compact)
        if self.freeze and epoch >= self.final_epoch:
            for layer in self.layers:
                layer.alpha.requires_grad_(False)
                layer.alpha.grad = None

    def _removed_in(self, epoch: int) -> list[int]:
        return [nm_schedule(epoch, math.comb(x.m, x.n), self.final_epoch, self.power) for x in self.layers]

    def _drop(self, removed: list[int], optimizer: Optimizer) -> None:
        check_states("NMSchedule", self.layers, optimizer)  # of all before any is changed
        for layer, k in zip(self.layers, removed, strict=True):
            left = math.comb(layer.m, layer.n) - k
            if left < layer.alpha.shape[1]:
                drop_(layer, left, optimizer, self.share)

    def step(self) -> None:
        """Removes; before the forward pass of every training iteration."""
        for layer, k in zip(self.layers, self.removed, strict=True):
            layer.remove_(k)

    def finish(self) -> None:
        """The last removal: one combination a group, which is what is evaluated and packed."""
        for layer in self.layers:
            layer.remove_(math.comb(layer.m, layer.n) - 1)
