"""Packed binary linear layers against torch's float32 ones; see ``support/packed_signs.py``."""

import settings
from harness import benchmark
from packed_signs import suite

SIZES = {f"{c}_b{b}": (b, c, c, 1, 1) for c in (1024, 4096) for b in (1, 64)}
if settings.QUICK:
    SIZES = {"64_b4": (4, 64, 64, 1, 1)}

SUITE = suite("binary_packed_linear", SIZES, (3, 70, 9, 1, 1), ["*"], 10, ["binary_packed_linear"])

bench_binary_packed_linear = benchmark(SUITE)
