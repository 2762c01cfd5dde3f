"""How many combinations of every group are removed in which epoch (LBC)."""

from __future__ import annotations

import math

from tersor._checks import as_int


def nm_schedule(epoch: int, combinations: int, final_epoch: int, power: int = 3) -> int:
    """k = C - 1 - ceil((C - 1) (1 - e / t)^q), at most C - 1, in float64 and in this order.

    Args:
        epoch: e, from 0.
        combinations: C, of one group.
        final_epoch: t, from which on one combination is left.
        power: q, 3 in the published training of ResNets and 4 of DeiT.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: Zhang et al., arXiv 2206.06662.
    """
    name = "nm_schedule"
    for argument, value, least in (
        ("epoch", epoch, 0),
        ("combinations", combinations, 2),
        ("final_epoch", final_epoch, 1),
    ):
        if as_int(name, **{argument: value}) < least:
            raise ValueError(f"{name}: {argument} must be at least {least}, got {value}")
    if not power > 0:
        raise ValueError(f"{name}: power must be above 0, got {power}")
    if epoch >= final_epoch:
        return combinations - 1
    return combinations - 1 - math.ceil((combinations - 1) * (1 - epoch / final_epoch) ** power)
