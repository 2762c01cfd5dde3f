"""How long a call takes: warm, in interleaved blocks, on the CPU by the clock and on CUDA by events."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import settings
import torch

BLOCKS = 3  # every implementation is timed in this many turns, so that a slow spell of the machine hits all alike
_ROUND = 200e-6  # seconds a round on the CPU lasts at least: 1000 times the clock's cost
_BUDGET = {"cpu": 0.3 if settings.QUICK else 1.2, "cuda": 0.05 if settings.QUICK else 0.3}  # seconds per implementation
_ROUNDS = {"cpu": (3, 30) if settings.QUICK else (6, 90), "cuda": (6, 30) if settings.QUICK else (21, 201)}


class Timed(NamedTuple):
    """Seconds per call of every round, and the calls in a round."""

    seconds: list[float]
    calls: int


class Contender(NamedTuple):
    call: Callable[[], Any]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def measure(contenders: dict[str, Contender], device: str) -> dict[str, Timed]:
    """Times all of them in turns; within a turn one untimed call comes first, so that caches are its own."""
    timer = _cuda_round if device == "cuda" else _cpu_round
    plans = {name: _plan(contender, device, timer) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(BLOCKS):
            for name, (call, context) in contenders.items():
                rounds, calls = plans[name]
                with context():
                    call()
                    seconds[name] += timer(call, -(-rounds // BLOCKS), calls)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {name: Timed(seconds[name], plans[name][1]) for name in contenders}


def _plan(contender: Contender, device: str, timer: Callable[..., list[float]]) -> tuple[int, int]:
    """Rounds, and calls in a round, from two calls after a first one."""
    with contender.context():
        contender.call()
        once = min(timer(contender.call, 2, 1))
        calls = 1
        if device == "cpu" and once < _ROUND:
            once = min(timer(contender.call, 2, 100))
            calls = max(1, int(10 * _ROUND / once))
    low, high = _ROUNDS[device]
    return min(high, max(low, int(_BUDGET[device] / (once * calls)))), calls


def _cpu_round(call: Callable[[], Any], rounds: int, calls: int) -> list[float]:
    clock, seconds = time.perf_counter, []
    for _ in range(rounds):
        start = clock()
        for _ in range(calls):
            call()
        seconds.append((clock() - start) / calls)
    return seconds


def _cuda_round(call: Callable[[], Any], rounds: int, calls: int) -> list[float]:
    """Between events on the stream; the second-level cache is overwritten before every call.

    Overwriting also keeps the card busy while the call's kernels are queued, so their launch cost stays hidden, as
    it is in a training step.
    """
    properties = torch.cuda.get_device_properties(0)
    scratch = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        scratch.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


class Replay:
    """Hands measured rounds to pytest-benchmark, which is to keep the statistics: a clock that only they advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self._seconds: list[float] = []

    def read(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self._seconds.pop(0)

    def __call__(self, benchmark: Any, seconds: list[float]) -> None:
        self.now, self._seconds = 0.0, list(seconds)
        benchmark.pedantic(self.step, rounds=len(seconds), iterations=1, warmup_rounds=0)
