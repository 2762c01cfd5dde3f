"""Packed convolutions of ResNet-18, channels-last, against torch's float32 ones; see ``support/packed_signs.py``."""

import settings
from harness import benchmark
from packed_signs import suite

LAYERS = {"c64": (64, 56), "c128": (128, 28), "c256": (256, 14), "c512": (512, 7)}
SIZES = {f"{n}_b{b}": (b, c, c, side, 3) for n, (c, side) in LAYERS.items() for b in (1, 16)}
if settings.QUICK:
    SIZES = {"c32_b2": (2, 32, 32, 6, 3)}

SUITE = suite("binary_packed_conv2d", SIZES, (2, 70, 9, 5, 3), ["c256_*", "c512_*"], 8, [])

bench_binary_packed_conv2d = benchmark(SUITE)
