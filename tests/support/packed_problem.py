"""Random packed N:M weights for the tests of the products with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.sparsity import nm_pack

# All kinds of index: places of 1, 2 and 4 bits, pairs of places, masks of 4, 8 and 16 bits.
PATTERNS = [(1, 2), (1, 3), (1, 4), (1, 7), (1, 16), (2, 3), (2, 4), (3, 4), (2, 8), (4, 8), (7, 8), (5, 12), (15, 16)]

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "gelu": F.gelu}
# Of the sum of the terms' absolute values. In float32 all roundings of a sum, in the half types that of the result.
ERRORS = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def packed_weight(
    shape: Sequence[int], n: int, m: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with n of every m consecutive input channels, its values and its index."""
    order = (shape[0], *shape[2:], shape[1] // m, m)
    kept = (torch.rand(order).argsort(-1) < n).reshape(shape[0], *shape[2:], shape[1])
    kept = kept.permute(0, 3, 1, 2) if len(shape) == 4 else kept
    weight = (torch.randn(*shape) * kept).to(dtype)
    return weight, *nm_pack(weight, kept, n, m)
