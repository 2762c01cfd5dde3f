"""N:M patterns: the combinations, and the order in which a weight's elements form groups of M."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor._checks import as_int

MOST_COMBINATIONS = 4096


def check_pattern(where: str, n: int, m: int, scored: bool = True) -> tuple[int, int]:
    """``n`` and ``m`` as ints, with 1 <= n < m <= 16, and where combinations are scored not too many of them."""
    n, m = as_int(where, n=n), as_int(where, m=m)
    if not 1 <= n < m <= 16:
        raise ValueError(f"{where}: n and m must satisfy 1 <= n < m <= 16, got {n}:{m}")
    if scored and math.comb(m, n) > MOST_COMBINATIONS:
        raise ValueError(f"{where}: {n}:{m} has {math.comb(m, n)} combinations, more than {MOST_COMBINATIONS}")
    return n, m


def check_groups(where: str, shape: Sequence[int], m: int) -> int:
    """The number of groups of a weight ``(O, I)`` or ``(O, I, KH, KW)``."""
    if len(shape) not in (2, 4):
        raise ValueError(f"{where}: weight must be (O, I) or (O, I, KH, KW), got shape {tuple(shape)}")
    elements = math.prod(shape)
    if elements % m:
        raise ValueError(f"{where}: m must divide the {elements} elements of the weight {tuple(shape)}, got {m}")
    return elements // m


@functools.cache
def _combinations(n: int, m: int) -> Tensor:
    rows = [[int(p in kept) for p in range(m)] for kept in itertools.combinations(range(m), n)]
    return torch.tensor(rows, dtype=torch.float32, device="cpu")  # whatever the default is


def nm_combinations(n: int, m: int) -> Tensor:
    """All ways to keep n of m positions: float32 ``(C, m)`` of 0 and 1, in lexicographic order."""
    return _combinations(*check_pattern("nm_combinations", n, m)).clone()


def combination_dtype(n: int, m: int) -> torch.dtype:
    """Of the numbers of n:m's combinations: the smaller of uint8 and int16 that holds them."""
    return torch.uint8 if math.comb(m, n) <= 256 else torch.int16


def to_groups(weight: Tensor, m: int) -> Tensor:
    """``(G, m)``: the weight's elements in the order (O, KH, KW, I), cut into runs of m."""
    return (weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight).reshape(-1, m)


def from_groups(groups: Tensor, shape: Sequence[int]) -> Tensor:
    """Undoes :func:`to_groups`; a view where that is possible."""
    if len(shape) == 2:
        return groups.reshape(tuple(shape))
    outputs, inputs, height, width = shape
    return groups.reshape(outputs, height, width, inputs).permute(0, 3, 1, 2)
