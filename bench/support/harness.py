"""Turns a suite into pytest-benchmark's benchmarks: gate, interleaved timing, figures."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import gate
import machine
import memory
import pytest
import settings
import timing
import torch
from suite import Case, Implementation, Prepared, Suite, dtype_name


class Outcome(NamedTuple):
    """What became of one implementation in one group: seconds and figures, or why there are none.

    ``kind`` is ``timed``, ``wrong`` (a red check: the run fails), ``fails`` (a peer that raises: a finding),
    ``unavailable`` (cannot run on this machine) or ``unneeded`` (what it stands in for works).
    """

    kind: str
    reason: str = ""
    seconds: tuple[float, ...] = ()
    figures: dict[str, Any] | None = None


class Run:
    """Everything that one pytest session has measured."""

    def __init__(self) -> None:
        self.suites: list[Suite] = []
        self.outcomes: dict[str, dict[str, Outcome]] = {}
        self.groups: dict[str, dict[str, Any]] = {}
        self._gates: dict[str, gate.Gate] = {}
        self._limits: dict[str, Any] | None = None

    def measure(self, suite: Suite, case: Case, implementations: list[Implementation]) -> dict[str, Outcome]:
        """Checks all implementations of a group, then times those that are right, interleaved with a copy."""
        if case.group in self.outcomes:
            return self.outcomes[case.group]
        if self._limits is None:
            self._limits = machine.limits(settings.device())
        torch._dynamo.reset()  # past 8 compilations of one function torch silently stops compiling it
        inputs = suite.inputs(case.size, case.dtype)
        outcomes: dict[str, Outcome] = {}
        prepared: dict[str, tuple[Implementation, Prepared, float | None]] = {}
        for impl in implementations:
            if impl.stands_in_for in prepared:
                outcomes[impl.name] = Outcome("unneeded", f"{impl.stands_in_for} works")
                continue
            try:
                prepared[impl.name] = self._admit(suite, case, impl, inputs)
            except _NotTimedError as refusal:
                outcomes[impl.name] = refusal.outcome
        self.outcomes[case.group] = outcomes | self._time(suite, case, prepared, inputs)
        return self.outcomes[case.group]

    def summary(self) -> dict[str, Any]:
        """What goes into the raw JSON next to pytest-benchmark's own records."""
        not_timed = [
            {"group": group, "impl": name, "kind": outcome.kind, "reason": outcome.reason}
            for group, outcomes in self.outcomes.items()
            for name, outcome in outcomes.items()
            if outcome.kind not in ("timed", "unneeded")
        ]
        targets = [target.__dict__ for suite in self.suites for target in suite.targets]
        return {
            "machine": machine.facts(settings.device()),
            "limits": self._limits or {},
            "groups": self.groups,
            "not_timed": not_timed,
            "targets": targets,
        }

    def _admit(
        self, suite: Suite, case: Case, impl: Implementation, inputs: Any
    ) -> tuple[Implementation, Prepared, float | None]:
        if time.time() > settings.DEADLINE:
            raise _NotTimedError("unavailable", "the time limit of the run was reached")
        if reason := suite.why_not(impl):
            raise _NotTimedError("unavailable", reason)
        verdicts = self._gates.setdefault(suite.operator, gate.Gate(suite))
        try:
            if impl.compared:
                verdicts.check_small(impl, case)
            with suite.backend(impl):
                prepared = suite.prepare(impl.make(case.size), inputs, case.dtype, case.direction)
                prepared.call()
                error = verdicts.check(impl, case, prepared.results) if impl.compared else None
        except gate.WrongResultError as red:
            raise _NotTimedError("wrong", str(red)) from None
        except Exception as error:  # a compiler or a peer may raise anything, and that is a finding
            raise _NotTimedError("wrong" if impl.ours else "fails", _one_line(error)) from error
        return impl, prepared, error

    def _time(self, suite: Suite, case: Case, prepared: dict[str, Any], inputs: Any) -> dict[str, Outcome]:
        if not prepared:
            return {}
        element = torch.empty(0, dtype=case.dtype).element_size()
        traffic, flops = suite.traffic(case.size, element, case.direction) if suite.traffic else (None, None)
        contenders = {
            name: timing.Contender(p.call, functools.partial(suite.backend, impl))
            for name, (impl, p, _) in prepared.items()
        }
        if traffic:
            contenders["copy"] = machine.copy_contender(traffic, suite.device)
        timed = timing.measure(contenders, suite.device)
        group: dict[str, Any] = {"operator": suite.operator, "size": case.size_name, "dtype": dtype_name(case.dtype)}
        group |= {"direction": case.direction, "bytes": traffic, "flops": flops}
        if traffic:
            group["copy_bytes_per_second"] = traffic / _quantile(timed.pop("copy").seconds, 0.5)
        self.groups[case.group] = group
        outcomes = {}
        for name, (impl, calls, error) in prepared.items():
            figures = _figures(timed[name], group)
            with suite.backend(impl):
                figures |= _memory(calls, inputs, suite.device)
            figures |= {"error": error, "runs": suite.runs(impl), "note": impl.note, "ours": impl.ours}
            outcomes[name] = Outcome("timed", "", tuple(timed[name].seconds), figures)
        return outcomes


class _NotTimedError(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.outcome = Outcome(kind, reason)


RUN = Run()
_REPLAY = timing.Replay()


def benchmark(suite: Suite) -> Callable[..., None]:
    """The pytest function of a suite: one benchmark per group and implementation."""
    RUN.suites.append(suite)
    cases = {case.group: case for case in suite.cases()}
    pairs = [(group, impl.name) for group, case in cases.items() for impl in suite.offered(case)]

    @pytest.mark.benchmark(timer=_REPLAY.read)
    @pytest.mark.parametrize(("group", "impl"), pairs, ids=["-".join(pair) for pair in pairs])
    def bench(group: str, impl: str, benchmark: Any, request: pytest.FixtureRequest) -> None:
        mates: list[Any] = [item for item in request.session.items if getattr(item, "obj", None) is request.function]
        selected = {item.callspec.params["impl"] for item in mates if item.callspec.params["group"] == group}
        chosen = [i for i in suite.offered(cases[group]) if i.name in selected]
        outcome = RUN.measure(suite, cases[group], chosen)[impl]
        if outcome.kind == "wrong":
            pytest.fail(f"{group} {impl}: not timed, {outcome.reason}", pytrace=False)
        if outcome.kind != "timed":
            pytest.skip(f"{impl} {outcome.kind}: {outcome.reason}")
        benchmark.group = group
        benchmark.extra_info.update(outcome.figures)
        _REPLAY(benchmark, list(outcome.seconds))

    return bench


def _figures(timed: timing.Timed, group: dict[str, Any]) -> dict[str, Any]:
    median = _quantile(timed.seconds, 0.5)
    figures: dict[str, Any] = {
        "p20": _quantile(timed.seconds, 0.2),
        "p80": _quantile(timed.seconds, 0.8),
        "calls_per_round": timed.calls,
    }
    if group["bytes"]:
        figures |= {"bytes": group["bytes"], "gb_per_s": group["bytes"] / median / 1e9}
        figures["share_of_copy"] = group["bytes"] / median / group["copy_bytes_per_second"]
    if group["flops"]:
        figures |= {"flops": group["flops"], "gflop_per_s": group["flops"] / median / 1e9}
    return figures


def _memory(prepared: Prepared, inputs: Any, device: str) -> dict[str, Any]:
    """CUDA: peak of one call. CPU, where nothing counts allocations: what the graph keeps for the backward pass."""
    if device == "cuda":
        return {"extra_memory_bytes": memory.peak_on_cuda(prepared.call), "extra_memory": "peak of one call"}
    if prepared.forward is None:
        return {}
    return {
        "extra_memory_bytes": memory.kept_for_backward(prepared.forward, inputs),
        "extra_memory": "kept for the backward pass",
    }


def _quantile(seconds: list[float], q: float) -> float:
    return float(torch.tensor(seconds, dtype=torch.float64).quantile(q))


def _one_line(error: BaseException) -> str:
    """Type and first line of a message, without the folders of this machine."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return re.sub(r"(?:/[\w.+-]+)+/", "", text)[:300]
