"""Logarithm and power in float32 to the last digits: the GPU's own are fast and lose them near 1, or far from it.

A number is 2^k m with m from sqrt(1/2) to sqrt(2). The logarithm of m is an odd series in (m - 1) / (m + 1), at most
0.172, whose five terms err by 1e-9; the exponent times k is exact where the exponent has 16 digits, and the rest of
the exponent is multiplied on its own. What the GPU's 2^f adds for f below 1.1 in size is 2^-22.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from tersor.triton_kernels.quantization._fake_quantize import Case

DIGITS = 15  # of an exponent of at most 1 that are multiplied exactly

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_parts(x):
    """``log2`` of positive, finite float32 as a whole number and a rest of at most 0.5 in size."""
    small = x < 1.1754943508222875e-38  # no digits before the point
    x = tl.where(small, x * 16777216.0, x)
    bits = x.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23
    m = (bits - (whole << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    series = 0.41219858311113244 + z * 0.3205988979753252
    series = 2.8853900817779268 + z * (0.9617966939259756 + z * (0.5770780163555854 + z * series))
    return tl.where(small, whole - 24, whole), s * series


@triton.jit
def log(x):
    """The natural logarithm of positive, finite float32, with digits next to 1 too."""
    whole, rest = log2_parts(x)
    return (whole.to(tl.float32) + rest) * _LN_2


@triton.jit
def power(x, exponent, high, low):
    """``x ** exponent`` of positive float32, for an exponent from -1 to 0 that is ``high + low`` by :func:`split`."""
    whole, rest = log2_parts(x)
    whole = whole.to(tl.float32)
    product = high * whole  # exact
    near = (product + _MAGIC) - _MAGIC
    fraction = (product - near) + (low * whole + exponent * rest)
    n = near.to(tl.int32)
    half = n >> 1  # 2^n itself may have no float32
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    result = tl.exp2(fraction) * first * second
    return tl.where(x == float("inf"), tl.where(exponent < 0.0, 0.0, 1.0), result)


def split(exponent: float) -> tuple[float, float, float]:
    """What :func:`power` takes: the exponent, its first digits, and the rest."""
    high = round(exponent * 2**DIGITS) / 2**DIGITS
    return exponent, high, exponent - high


def ahead_of_time_cases() -> Iterator[Case]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
