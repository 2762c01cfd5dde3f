"""The gradients that stand in for that of the sign, by name."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("ste", "approx", "reste")


class Estimator(NamedTuple):
    r"""A gradient for the sign: the incoming one times d(a) with a the absolute value of the input.

    - ``"ste"`` (straight through): d = 1 for a <= t, else 0.
    - ``"approx"`` (ApproxSign): d = max(0, 2 - 2 a).
    - ``"reste"`` (rectified straight through): with p = 1 / o, d = interval^p / interval for a <= interval,
      p a^(p - 1) up to t, included, and 0 above it. o = 1 is ``"ste"``.

    Attributes:
        name: one of these.
        o: exponent of ``"reste"``, at least 1.
        t: greatest input that has a gradient, for ``"ste"`` and ``"reste"``.
        interval: up to which ``"reste"`` takes the chord of its power function; above 0 and below t.

    Source: arXiv 1602.02830 (ste), arXiv 1808.00278 (approx), arXiv 2308.06689 (reste).
    """

    name: str = "ste"
    o: float = 1.0
    t: float = 1.0
    interval: float = 0.1

    def derivative(self, magnitude: Tensor) -> Tensor:
        """d(a), in plain torch; comparisons are in the dtype of ``magnitude``. NaN gives 0, of ``"approx"`` NaN."""
        if self.name == "approx":
            return torch.where(magnitude >= 1, 0, 2 - 2 * magnitude)
        t = torch.tensor(self.t, dtype=magnitude.dtype, device=magnitude.device)
        inside = (magnitude <= t).to(magnitude.dtype)
        if self.name == "ste":
            return inside
        interval = torch.tensor(self.interval, dtype=magnitude.dtype, device=magnitude.device)
        power = magnitude.clamp(min=interval).pow((1 - self.o) / self.o) / self.o
        return torch.where(magnitude <= interval, self.chord, torch.where(magnitude <= t, power, 0))

    @property
    def chord(self) -> float:
        """d(0) of ``"reste"``."""
        return self.interval ** (1 / self.o) / self.interval


STE = Estimator("ste")
APPROX = Estimator("approx")


def reste(o: float, t: float = 1.5, interval: float = 0.1) -> Estimator:
    """The estimator ``"reste"``."""
    return Estimator("reste", o, t, interval)


def check_estimator(where: str, estimator: Any) -> Estimator:
    """The estimator that is named, or given with its numbers.

    Raises:
        TypeError, ValueError: it is unknown, or its numbers are out of range.
    """
    if isinstance(estimator, str):
        defaults = {"ste": STE, "approx": APPROX, "reste": reste(1.0)}
        if estimator not in defaults:
            raise ValueError(f"{where}: estimator must be one of {', '.join(NAMES)}, got {estimator!r}")
        return defaults[estimator]
    if not isinstance(estimator, Estimator):
        raise TypeError(f"{where}: estimator must be a name or an Estimator, got {type(estimator).__name__}")
    if estimator.name not in NAMES:
        raise ValueError(f"{where}: estimator must be one of {', '.join(NAMES)}, got {estimator.name!r}")
    if estimator.name == "approx":
        return estimator
    for key in ("t",) if estimator.name == "ste" else ("o", "t", "interval"):
        value = getattr(estimator, key)
        if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{where}: {key} must be a number, got {type(value).__name__}")
    if estimator.name == "ste":
        if not estimator.t > 0:
            raise ValueError(f"{where}: t must be above 0, got {estimator.t}")
        return estimator if type(estimator.t) is float else estimator._replace(t=float(estimator.t))
    if not 1 <= estimator.o < math.inf:
        raise ValueError(f"{where}: o must be at least 1 and finite, got {estimator.o}")
    if not estimator.interval > 0:
        raise ValueError(f"{where}: interval must be above 0, got {estimator.interval}")
    if not estimator.t > estimator.interval:
        raise ValueError(f"{where}: t must be above interval {estimator.interval}, got {estimator.t}")
    return Estimator(estimator.name, float(estimator.o), float(estimator.t), float(estimator.interval))
