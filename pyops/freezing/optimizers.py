"""Torch's optimisers, with frozen weights left alone."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tersor.freezing.frozen_adamw_step import frozen_adamw_step
from tersor.freezing.frozen_sgd_step import frozen_sgd_step
from tersor.freezing.layers import LtsWeight
from tersor.freezing.mask import check_mask

Masks = Iterable[tuple[Tensor, "LtsWeight | Tensor"]]


def _may_be_frozen(mask: LtsWeight | Tensor) -> bool:
    """False where surely nothing is: torch's own step is the faster one then. A GPU is not asked."""
    return isinstance(mask, Tensor) or mask.counters.device.type != "cpu" or mask.counters[1].item() > 0


class _Frozen(torch.optim.Optimizer):
    """Torch's optimiser for all parameters without a mask; one pass over the free elements for those with one."""

    def _attach(self, masks: Masks) -> None:
        name = type(self).__name__
        known = {p for group in self.param_groups for p in group["params"]}
        self._masks: dict[Tensor, LtsWeight | Tensor] = {}
        for parameter, mask in masks:
            if parameter not in known:
                raise ValueError(
                    f"{name}: masks must be of parameters that the optimiser has, got one of shape "
                    f"{tuple(parameter.shape)} that is not among params"
                )
            if not isinstance(mask, LtsWeight):
                check_mask(name, mask, parameter.shape, parameter.device)
            self._masks[parameter] = mask

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {p: p.grad for p, mask in self._masks.items() if p.grad is not None and _may_be_frozen(mask)}
        for parameter in gradients:
            parameter.grad = None  # so that torch's step passes over it
        try:
            super().step()
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in gradients:
                    gradient = gradients[parameter]
                    if gradient.is_sparse:
                        raise ValueError(f"{type(self).__name__}: gradients of masked parameters must not be sparse")
                    mask = self._masks[parameter]
                    frozen = mask.frozen if isinstance(mask, LtsWeight) else mask
                    values = parameter.contiguous()  # the mask counts elements in this order
                    self._step_one(group, self.state[parameter], values, gradient.contiguous(), frozen)
                    if values is not parameter:
                        parameter.copy_(values)
                    torch.autograd.graph.increment_version(parameter)
        return loss

    @abc.abstractmethod
    def _step_one(
        self, group: dict[str, Any], state: dict[str, Any], values: Tensor, gradient: Tensor, frozen: Tensor
    ) -> None:
        """Changes ``values`` where ``frozen`` has no bit."""

    @staticmethod
    def _buffer(state: dict[str, Any], name: str) -> Tensor:
        """The named tensor of the state, contiguous."""
        state[name] = state[name].contiguous()
        return state[name]


class FrozenSGD(_Frozen, torch.optim.SGD):
    """``torch.optim.SGD`` that leaves frozen weights, their momentum and their decay alone, and reads neither.

    Args:
        params, lr, options: as for ``torch.optim.SGD``; its ``fused`` or ``foreach`` serve the other parameters.
        masks: pairs of a parameter and the :class:`LtsWeight` (or packed mask) that says which of its elements are
            frozen, as :func:`frozen_weights` lists them. Looked at in every step.

    The state has torch's own layout, so that either optimiser loads the other's.

    Raises:
        ValueError: a mask's parameter is not among ``params``, or a mask does not fit it.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, masks: Masks = (), **options: Any) -> None:
        torch.optim.SGD.__init__(self, params, lr, **options)
        self._attach(masks)

    def _step_one(
        self, group: dict[str, Any], state: dict[str, Any], values: Tensor, gradient: Tensor, frozen: Tensor
    ) -> None:
        momentum, buffer = group["momentum"], None
        first = momentum != 0 and state.get("momentum_buffer") is None
        if first:
            state["momentum_buffer"] = torch.empty_like(values)
        if momentum != 0:
            buffer = self._buffer(state, "momentum_buffer")
        options = group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"], first
        frozen_sgd_step.overload(values, gradient, buffer, frozen, float(group["lr"]), momentum, *options)


class FrozenAdamW(_Frozen, torch.optim.AdamW):
    """``torch.optim.AdamW`` that leaves frozen weights, their moments and their decay alone, and reads none of them.

    Args:
        params, lr, options: as for ``torch.optim.AdamW``, without ``amsgrad``.
        masks: see :class:`FrozenSGD`.

    Raises:
        ValueError: as for :class:`FrozenSGD`, or ``amsgrad`` is asked for.
    """

    def __init__(self, params: Any, lr: float = 1e-3, *, masks: Masks = (), **options: Any) -> None:
        if options.get("amsgrad"):
            raise ValueError("FrozenAdamW: amsgrad must be False")
        torch.optim.AdamW.__init__(self, params, lr, **options)
        self._attach(masks)

    def _step_one(
        self, group: dict[str, Any], state: dict[str, Any], values: Tensor, gradient: Tensor, frozen: Tensor
    ) -> None:
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(values), torch.zeros_like(values)
        state["step"] += 1
        moments = self._buffer(state, "exp_avg"), self._buffer(state, "exp_avg_sq")
        betas = [float(beta) for beta in group["betas"]]
        options = group["eps"], group["weight_decay"], group["maximize"], int(state["step"])
        frozen_adamw_step.overload(values, gradient, *moments, frozen, float(group["lr"]), *betas, *options)
