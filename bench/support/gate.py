"""The correctness gate: no timing for what computes something else than the float64 reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from suite import Case, Implementation, Results, Suite
from torch import Tensor

import tersor

# Unit roundoffs that a half-precision result may be off. The eager way, which rounds scores and weights too, needs
# 2 for outputs and 2.5 for gradients of dilated attention on normal inputs; a wrong tap or border is off by dozens.
_HALF_ROUNDOFFS = {"output": 4, "gradient": 8}


class WrongResultError(Exception):
    """A result that is wrong, with the figure."""


def default_tolerance(dtype: torch.dtype, name: str) -> float:
    """Error allowed, as max |a - b| / max(1, max |b|): 1e-5 for float32, 1e-10 for float64, else in roundoffs."""
    if dtype in (torch.float32, torch.float64):
        return 1e-5 if dtype == torch.float32 else 1e-10
    return _HALF_ROUNDOFFS[name.split()[0]] * torch.finfo(dtype).eps / 2


def difference(result: Tensor, expected: Tensor) -> float:
    """max |a - b| / max(1, max |b|); NaN where either holds one."""
    if result.shape != expected.shape:
        raise WrongResultError(f"has shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    if not expected.numel():
        raise WrongResultError("is empty, so nothing would be compared")
    worst = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(worst)


class Gate:
    """Checks one suite; the expected results and the verdicts on the small size are kept for its other cases."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self._expected: dict[tuple[str, torch.dtype, str], Results] = {}
        self._small: dict[tuple[str, torch.dtype, str], WrongResultError | None] = {}

    def check_small(self, impl: Implementation, case: Case) -> None:
        """Output and gradients on the small size, in every direction that the implementation can run."""
        for direction in impl.directions or self.suite.directions:
            key = (impl.name, case.dtype, direction)
            if key not in self._small:
                try:
                    self._check(impl, Case("small size", "small", self.suite.small, case.dtype, direction))
                    self._small[key] = None
                except WrongResultError as red:
                    self._small[key] = WrongResultError(f"{direction} on the small size: {red}")
            if verdict := self._small[key]:
                raise verdict

    def check(self, impl: Implementation, case: Case, results: Callable[[], Results]) -> float:
        """What is about to be timed, against the reference; the largest error found."""
        return self._compare(impl, case, results())

    def _check(self, impl: Implementation, case: Case) -> None:
        inputs = self.suite.inputs(case.size, case.dtype)
        with self.suite.backend(impl):
            prepared = self.suite.prepare(impl.make(case.size), inputs, case.dtype, case.direction)
            results = prepared.results()
        self._compare(impl, case, results)

    def _compare(self, impl: Implementation, case: Case, results: Results) -> float:
        worst = 0.0
        expected = self._reference(case)
        if missing := expected.keys() - results.keys():
            raise WrongResultError(f"gives no {', '.join(sorted(missing))}")
        crop = impl.crop or (lambda tensor: tensor)
        for name, right in expected.items():
            try:
                error = difference(crop(results[name]), crop(right))
            except WrongResultError as red:
                raise WrongResultError(f"{name} {red}") from None
            allowed = (self.suite.tolerance or default_tolerance)(case.dtype, name)
            if not error <= allowed:  # NaN is red too
                raise WrongResultError(f"{name} is off by {error:.2e}, allowed are {allowed:.2e}")
            worst = max(worst, error)
        return worst

    def _reference(self, case: Case) -> Results:
        key = (case.size_name, case.dtype, case.direction)
        if key not in self._expected:
            inputs = tuple(x.double() if x.is_floating_point() else x for x in self.suite.inputs(case.size, case.dtype))
            with tersor.use_backend("reference"):
                prepared = self.suite.prepare(self.suite.reference(case.size), inputs, case.dtype, case.direction)
                self._expected = {
                    k: v for k, v in self._expected.items() if k[0] == "small"
                }  # large ones: one at a time
                self._expected[key] = prepared.results()
        return self._expected[key]
