"""What a run is told through its environment; ``bench/run.py`` sets it, a plain pytest run gets the defaults."""

from __future__ import annotations

import os

import torch

THREADS = int(os.environ.get("TERSOR_BENCH_THREADS", "2"))
QUICK = os.environ.get("TERSOR_BENCH_QUICK") == "1"  # fewer cases and rounds: does it work, not how fast is it
FULL = os.environ.get("TERSOR_BENCH_FULL") == "1"  # slow extras, such as compiling a whole model
DEADLINE = float(os.environ.get("TERSOR_BENCH_DEADLINE", "inf"))  # time.time() after which no group is started
WITHOUT = frozenset(os.environ.get("TERSOR_BENCH_WITHOUT", "").split())  # backends whose checks are red
SEED = 2302


def device() -> str:
    """``cpu`` or ``cuda``: TERSOR_BENCH_DEVICE, else CUDA where there is a card."""
    named = os.environ.get("TERSOR_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if named not in ("cpu", "cuda"):
        raise ValueError(f"TERSOR_BENCH_DEVICE must be cpu or cuda, got {named!r}")
    return named
