"""How ReCU's tau and ReSTE's o grow over a training run, and the indicators that ReSTE is tuned by."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tersor._checks import as_int, check_floating
from tersor.binary.layers import BinaryConv2d, BinaryLinear, ReCUConv2d


def recu_tau(epoch: int, epochs: int, tau_min: float = 0.85, tau_max: float = 0.99) -> float:
    r"""ReCU's quantile: exponential from ``tau_min`` towards ``tau_max``, which it does not reach.

    .. math:: \tau = \tau_{min} + (\tau_{max} - \tau_{min}) \frac{e^{epoch / epochs} - 1}{e - 1}

    Args:
        epoch: from 0 to ``epochs - 1``.
        epochs: of the run.
        tau_min, tau_max: 0.5 < tau_min <= tau_max <= 1.

    Returns:
        tau of that epoch, the same for all layers.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2103.12369.
    """
    epoch, epochs = _check_epoch("recu_tau", epoch, epochs)
    _check_number("recu_tau", tau_min=tau_min)
    _check_number("recu_tau", tau_max=tau_max)
    if not 0.5 < tau_min <= 1:
        raise ValueError(f"recu_tau: tau_min must be above 0.5 and at most 1, got {tau_min}")
    if not tau_min <= tau_max <= 1:
        raise ValueError(f"recu_tau: tau_max must be from tau_min {tau_min} to 1, got {tau_max}")
    return tau_min + (tau_max - tau_min) * (math.exp(epoch / epochs) - 1) / (math.e - 1)


def reste_o(epoch: int, epochs: int, o_end: float = 3.0) -> float:
    r"""ReSTE's exponent: from 1 to ``o_end``, slowly first.

    .. math:: o = 1 + (1 - \cos(\tfrac{\pi}{2} epoch / epochs)) (o_{end} - 1)

    Args:
        epoch: from 0 to ``epochs - 1``.
        epochs: of the run.
        o_end: at least 1, finite.

    Returns:
        o of that epoch, the same for all layers, for weights and inputs.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2308.06689.
    """
    epoch, epochs = _check_epoch("reste_o", epoch, epochs)
    _check_o("reste_o", o_end)
    return 1 + (1 - math.cos(math.pi / 2 * epoch / epochs)) * (o_end - 1)


def _check_epoch(where: str, epoch: Any, epochs: Any) -> tuple[int, int]:
    epoch, epochs = as_int(where, epoch=epoch), as_int(where, epochs=epochs)
    if epochs < 1 or not 0 <= epoch < epochs:
        raise ValueError(f"{where}: epoch must be from 0 to epochs - 1, got epoch {epoch} of {epochs}")
    return epoch, epochs


def _check_number(where: str, **argument: Any) -> None:
    ((name, value),) = argument.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")


def _check_o(where: str, o_end: Any) -> None:
    _check_number(where, o_end=o_end)
    if not (o_end >= 1 and math.isfinite(o_end)):
        raise ValueError(f"{where}: o_end must be at least 1 and finite, got {o_end}")


class BinarySchedule:
    """Sets tau of all :class:`ReCUConv2d` and o of all ReSTE layers of a model, once an epoch.

    ::

        schedule = BinarySchedule(model, epochs=120)
        for epoch in range(120):
            schedule.start_epoch(epoch)

    Args:
        model: with such layers.
        epochs: of the run.
        tau_min, tau_max: see :func:`recu_tau`.
        o_end: see :func:`reste_o`.

    Raises:
        TypeError: ``model`` is not a module, or an option is not of its type.
        ValueError: ``model`` has no binary layer, or an option is not as stated.

    Source: arXiv 2103.12369 (tau), arXiv 2308.06689 (o).
    """

    def __init__(
        self, model: nn.Module, epochs: int, tau_min: float = 0.85, tau_max: float = 0.99, o_end: float = 3.0
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"BinarySchedule: model must be a torch.nn.Module, got {type(model).__name__}")
        self.layers = [m for m in model.modules() if isinstance(m, (BinaryConv2d, BinaryLinear, ReCUConv2d))]
        if not self.layers:
            raise ValueError(f"BinarySchedule: model must hold binary layers, got {type(model).__name__} without one")
        recu_tau(0, epochs, tau_min, tau_max), reste_o(0, epochs, o_end)  # which check
        self.epochs, self.tau_min, self.tau_max, self.o_end = epochs, tau_min, tau_max, o_end
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Before the epoch's first step; raises ValueError unless ``epoch`` is from 0 to ``epochs - 1``."""
        tau, o = recu_tau(epoch, self.epochs, self.tau_min, self.tau_max), reste_o(epoch, self.epochs, self.o_end)
        for layer in self.layers:
            if isinstance(layer, ReCUConv2d):
                layer.set_tau_(tau)
            else:
                layer.set_o_(o)


def estimating_error(weights: Iterable[Tensor], o_end: float = 3.0) -> Tensor:
    r"""How far the power function that ReSTE ends at is from the sign: the sum over layers of
    ``|| sign(w) |w|^(1 / o_end) - sign(w) ||_2``.

    Args:
        weights: of the binary layers, floating point, any shapes.
        o_end: at least 1, finite.

    Returns:
        A tensor without dimensions.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2308.06689.
    """
    _check_o("estimating_error", o_end)
    weights = _tensors("estimating_error", "weights", weights)
    errors = [torch.linalg.vector_norm(torch.sign(w) * (w.abs() ** (1 / o_end) - 1)) for w in weights]
    return torch.stack(errors).sum()


def gradient_stability(gradients: Iterable[Tensor]) -> Tensor:
    """The sum over layers of the unbiased variance of the absolute gradient.

    Args:
        gradients: of the binary layers' weights, floating point, at least 2 elements each.

    Returns:
        A tensor without dimensions.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2308.06689.
    """
    gradients = _tensors("gradient_stability", "gradients", gradients)
    if min(g.numel() for g in gradients) < 2:
        raise ValueError("gradient_stability: gradients must have at least 2 elements each, got fewer")
    return torch.stack([g.abs().var() for g in gradients]).sum()


def _tensors(where: str, name: str, given: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(given, Tensor):
        raise TypeError(f"{where}: {name} must be an iterable of tensors, got one tensor")
    tensors = [t.detach() if isinstance(t, Tensor) else t for t in given]
    for tensor in tensors:
        check_floating(where, **{name: tensor})
    if not tensors:
        raise ValueError(f"{where}: {name} must not be empty")
    return tensors
