"""How token operators become calls: some of their inputs have no gradient, and some have several outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import settings
import torch
from suite import Prepared, Results
from torch import Tensor

Outputs = tuple[Tensor, ...]


def prepare_tokens(
    fixed: int = 0, names: Sequence[str] = ("output",), compared: Callable[[Outputs], Outputs] = lambda outputs: outputs
) -> Callable[..., Prepared]:
    """A suite's ``prepare`` for functions with one output or a tuple of them.

    Args:
        fixed: the first inputs, such as scores and indices, that have no gradient.
        names: of the outputs, each of which begins with ``output``.
        compared: what the correctness gate looks at instead of the outputs.
    """

    def prepare(
        function: Callable[..., Any], inputs: tuple[Tensor, ...], dtype: torch.dtype, direction: str
    ) -> Prepared:
        def named(outputs: Outputs) -> Results:
            return dict(zip(names, (t.detach() for t in compared(outputs)), strict=True))

        def forward_only() -> Outputs:
            with torch.no_grad():
                return _tuple(function(*inputs))

        if direction == "forward":
            return Prepared(forward_only, lambda: named(forward_only()))
        leaves = [x.detach().requires_grad_() for x in inputs[fixed:]]
        everything = (*inputs[:fixed], *leaves)
        generator = torch.Generator().manual_seed(settings.SEED + 1)
        first = _tuple(function(*everything))
        places = [i for i, t in enumerate(first) if t.requires_grad]
        weights = [torch.randn(first[i].shape, generator=generator).to(dtype).to(first[i]) for i in places]

        def forward() -> Outputs:
            return _tuple(function(*everything))

        def forward_backward() -> tuple[Outputs, Outputs]:
            outputs = forward()
            return outputs, torch.autograd.grad([outputs[i] for i in places], leaves, weights)

        def results() -> Results:
            outputs, gradients = forward_backward()
            return named(outputs) | {f"gradient {i}": g for i, g in enumerate(gradients)}

        return Prepared(forward_backward, results, forward)

    return prepare


def _tuple(outputs: Any) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)
