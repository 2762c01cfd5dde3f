"""What an operator's own test file tells the conformance tests: how to call it, and with what."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Subject:
    """One public function that is built on registered operators.

    Attributes:
        function: the public function; its tensor arguments come first.
        exact: the same function in plain torch, differentiable, correct in float64.
        inputs: ``(size, dtype, device) -> tensors``; ``size`` is one of ``sizes``, and equal sizes must give tensors
            of the same shape. Values come from torch's generator.
        options: arguments after the tensors.
        operators: names of the registered operators that it runs, forward first.
        raw: ``(operator name, size, dtype, device) -> arguments`` of a direct call of an operator.
        sizes: small shapes, the first one the plainest; all must have the same number of dimensions.
        dtypes: floating-point types that every backend takes.
        quantizer: it rounds to levels. The first tensor may have any shape, the others are its parameters and have
            at least float32; ``exact`` computes in its tensors' dtype with straight-through rounding, and results are
            compared bit by bit. The output has the first tensor's dtype, under autocast too.
        data: of a quantiser, how many of the tensors are quantised; the rest are parameters.
        float64: whether it takes that, on the CPU.
        differentiable: whether it has gradients at all.
        name: in the tests' names, where one function has several subjects.
        alike: all tensors have the same shape, and the function says so of others.
        in_forward: its first operator runs in the forward pass, not in the backward pass only.
        autocast: under autocast it works in that dtype, else in its tensors'.
        surrogate: its gradient is not its derivative; that of ``exact`` is meant.
        changes: what it changes in place has to be mapped under vmap, whatever else is.
        skips: it leaves out products with zeros, so that what is not finite may reach fewer results than in ``exact``.
        inner: no user calls it; the class of this package that does has checked the arguments.
    """

    function: Callable[..., torch.Tensor]
    exact: Callable[..., torch.Tensor]
    inputs: Callable[[Any, torch.dtype, str], tuple[torch.Tensor, ...]]
    options: tuple[Any, ...]
    operators: tuple[str, ...]
    raw: Callable[[str, Any, torch.dtype, str], tuple[Any, ...]]
    sizes: Sequence[Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    quantizer: bool = False
    data: int = 1
    float64: bool = True
    differentiable: bool = True
    name: str = ""
    alike: bool = True
    in_forward: bool = True
    autocast: bool = True
    surrogate: bool = False
    changes: bool = False
    skips: bool = False
    inner: bool = False

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors, *self.options)

    def make(
        self, dtype: torch.dtype, device: str, *, size: Any = None, requires_grad: bool = True
    ) -> tuple[torch.Tensor, ...]:
        tensors = self.inputs(self.sizes[0] if size is None else size, dtype, device)
        return tuple(t.detach().requires_grad_(requires_grad and self.differentiable) for t in tensors)

    def widened(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What the exact results are computed from: float64, or for a quantiser the dtype that it computes in."""
        dtype = torch.float64
        if self.quantizer and tensors[0].dtype != torch.float64:
            dtype = torch.float32
        return tuple(t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for t in tensors)

    def __repr__(self) -> str:
        return self.name or self.function.__name__


def load_test_module(place: str) -> ModuleType:
    """The test file of the operator at ``place``: the house rule is the wiring."""
    family, name = place.split("/")
    path = TESTS / family / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"subject_{family}_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"operator {place} has no {path.relative_to(TESTS.parent)}")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # the compiler looks functions up there
    spec.loader.exec_module(module)
    return module


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true")
