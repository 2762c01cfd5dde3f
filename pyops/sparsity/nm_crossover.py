"""Where the CPU takes a dense product instead of a packed one: timed by hand on two cores of a Xeon with AMX."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tersor._operator import is_autocast_enabled


class Crossover(NamedTuple):
    """From ``columns`` input rows (output pixels of a convolution) on, where more than ``density`` is kept."""

    product: str
    dtype: torch.dtype
    density: float
    columns: int

    def __str__(self) -> str:
        kept = f" with n/m above {self.density:g}" if self.density else ""
        unit = "rows" if self.product == "linear" else "output pixels"
        return f"{self.dtype} from {self.columns} {unit} on{kept}"


# The weight is unpacked for each such call, which is counted in.
CROSSOVERS = (
    Crossover("linear", torch.float32, 0.5, 64),
    Crossover("linear", torch.bfloat16, 0.0, 1024),
    Crossover("convolution", torch.float32, 0.25, 1024),
    Crossover("convolution", torch.bfloat16, 0.0, 1024),
)


def notes(product: str) -> tuple[str, ...]:
    """For :func:`tersor.backends`."""
    return tuple(
        f"on the CPU a dense product with the unpacked weight runs for {c}" for c in CROSSOVERS if c[0] == product
    )


def dense_is_faster(product: str, input: Tensor, n: int, m: int, columns: int) -> bool:
    """Whether to unpack the weight for this call. Not where a gradient is asked for, which packed products refuse."""
    if input.device.type != "cpu" or (torch.is_grad_enabled() and input.requires_grad):
        return False
    dtype = torch.get_autocast_dtype("cpu") if is_autocast_enabled("cpu") else input.dtype
    found = [c for c in CROSSOVERS if c.product == product and c.dtype == dtype and n > c.density * m]
    if not torch.compiler.is_compiling():
        return any(columns >= c.columns for c in found)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    # Not asked of a size that is left open, since the program would then hold on one side of the crossover only.
    return any(statically_known_true(columns >= c.columns) for c in found)
