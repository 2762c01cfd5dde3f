"""What a bench file states: sizes, implementations and targets. The harness measures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import settings
import torch
from torch import Tensor

import tersor

Results = dict[str, Tensor]


class Prepared(NamedTuple):
    """One implementation on one set of inputs.

    ``call`` is what is timed. ``results`` gives what the correctness gate compares. ``forward`` builds the graph
    of a backward pass and returns its end, for the memory it keeps; None where there is no backward.
    """

    call: Callable[[], Any]
    results: Callable[[], Results]
    forward: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A way to compute the operator.

    Args:
        name: the ``impl`` of its measurements.
        make: takes a size, returns the function of the inputs (for a suite with its own ``prepare``: what that takes).
        note: one sentence for the report, where there is something a reader must know.
        ours: tersor's own. An exception is a failed check; for a peer it is a finding ("fails: reason").
        backend: forced with :func:`tersor.use_backend`; not timed where the suite's operators do not run on it.
        directions: those it can run; None for all.
        sizes: the names of the sizes it is timed at; None for all.
        crop: what is compared of an output and of a gradient, for a peer that differs at the border.
        stands_in_for: the name of another one that this replaces where it fails; not timed where it works.
        compared: False for a yardstick that computes something else and is only timed.
        unavailable: returns the reason why it cannot run here, or None.
    """

    name: str
    make: Callable[..., Any]
    note: str = ""
    ours: bool = False
    backend: str | None = None
    directions: Sequence[str] | None = None
    sizes: Sequence[str] | None = None
    crop: Callable[[Tensor], Tensor] | None = None
    stands_in_for: str | None = None
    compared: bool = True
    unavailable: Callable[[], str | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Target:
    """A bar: ``impl``'s speed relative to ``against`` (a name or pattern; the fastest match counts) in the groups that
    match ``group``, or, where ``against`` is ``"copy"``, its share of the copy bandwidth measured in the same group.
    With ``memory`` it is the extra memory that is compared."""

    group: str
    against: str
    at_least: float
    impl: str = "tersor"
    memory: bool = False


class Case(NamedTuple):
    """One group of measurements: everything but the implementation."""

    group: str
    size_name: str
    size: Any
    dtype: torch.dtype
    direction: str


@dataclasses.dataclass
class Suite:
    """The benchmark of one operator, or of one model.

    Args:
        operator: the first part of every group, ``operator/size/dtype/direction``.
        sizes: name to size; a size is whatever ``make_inputs`` and the implementations understand.
        small: the size that every implementation is checked on first.
        make_inputs: ``(size, dtype, device, generator)`` to the input tensors.
        reference: ``(size)`` to the function that defines the right answer; it is given float64 inputs.
        implementations: what is compared.
        traffic: ``(size, element_bytes, direction)`` to (bytes that must move, FLOPs); None for no such figures.
        operators: the registered operators behind it; a forced backend must run all of them.
        prepare: how an implementation becomes a call, by default as an operator: see :func:`prepare_operator`.
        tolerance: ``(dtype, result name)`` to the error allowed; None for the gate's own.
    """

    operator: str
    sizes: dict[str, Any]
    small: Any
    make_inputs: Callable[..., tuple[Tensor, ...]]
    reference: Callable[[Any], Any]
    implementations: Sequence[Implementation]
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    directions: Sequence[str] = ("forward", "forward_backward")
    traffic: Callable[..., tuple[int, int]] | None = None
    targets: Sequence[Target] = ()
    operators: Sequence[str] = ()
    device: str = dataclasses.field(default_factory=settings.device)
    prepare: Callable[..., Prepared] = dataclasses.field(default_factory=lambda: prepare_operator)
    tolerance: Callable[[torch.dtype, str], float] | None = None

    def cases(self) -> list[Case]:
        return [
            Case("/".join([self.operator, name, dtype_name(dtype), direction]), name, size, dtype, direction)
            for name, size in self.sizes.items()
            for dtype in self.dtypes
            for direction in self.directions
        ]

    def offered(self, case: Case) -> list[Implementation]:
        """The implementations that are meant for a case."""
        return [
            impl
            for impl in self.implementations
            if case.direction in (impl.directions or self.directions) and case.size_name in (impl.sizes or self.sizes)
        ]

    def inputs(self, size: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same values for every implementation and run."""
        return self.make_inputs(size, dtype, self.device, torch.Generator().manual_seed(settings.SEED))

    def why_not(self, impl: Implementation) -> str | None:
        """The reason why an implementation cannot be timed here."""
        if impl.backend in settings.WITHOUT:
            return f"the checks of the {impl.backend} backend are red"
        if reason := impl.unavailable():
            return reason
        if impl.backend is None:
            return None
        try:
            with tersor.use_backend(impl.backend):
                rows = [
                    row for row in tersor.backends() if row.device == self.device and row.operator in self.operators
                ]
        except RuntimeError as error:
            return str(error)
        reasons = [row.refused.get(impl.backend, "refused") for row in rows if row.runs != impl.backend]
        return reasons[0] if reasons else None

    def runs(self, impl: Implementation) -> str | None:
        """The backend behind one of tersor's own implementations."""
        if not impl.ours or not self.operators:
            return None
        with self.backend(impl):
            names = {
                row.runs for row in tersor.backends() if row.device == self.device and row.operator in self.operators
            }
        return " and ".join(sorted(names))

    def backend(self, impl: Implementation) -> contextlib.AbstractContextManager[None]:
        return tersor.use_backend(impl.backend) if impl.backend else contextlib.nullcontext()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def prepare_operator(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype, direction: str
) -> Prepared:
    """``forward`` without a graph, ``forward_graph`` with one, ``forward_backward`` with the gradients of the inputs.

    ``dtype`` is the case's: the incoming gradient is rounded to it, also where the inputs are its float64 copies.
    """
    if direction == "forward":

        def forward_only() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return Prepared(forward_only, lambda: {"output": forward_only()})
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    if direction == "forward_graph":
        return Prepared(lambda: function(*leaves), lambda: {"output": function(*leaves).detach()})
    with torch.no_grad():
        shape = function(*inputs).shape
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(settings.SEED + 1), dtype=torch.float32)
    grad_output = grad_output.to(dtype).to(leaves[0])

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        output = function(*leaves)
        return output, torch.autograd.grad(output, leaves, grad_output)

    def results() -> Results:
        output, gradients = forward_backward()
        return {"output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}

    return Prepared(forward_backward, results, lambda: function(*leaves))
