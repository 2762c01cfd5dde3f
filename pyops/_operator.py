"""Registration of operators: schema, reference, fake kernel, autocast rule and vmap rule in one call.

Every operator is defined here once, in Python, with its plain-torch reference as the kernel of last resort.
Faster kernels are found by the operator's own name and place, see :mod:`tersor._backends`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("tersor", "FRAGMENT")

REGISTRY: dict[str, Operator] = {}


@dataclasses.dataclass(frozen=True)
class Operator:
    """A registered operator; an ``autograd.Function`` calls it to run the chosen kernel below autograd.

    ``name`` is the name under ``torch.ops.tersor``, ``place`` the path that the operator's files share in every
    folder (``attention/dilated_attention``). ``derivative`` is the differentiable function that it is the forward
    of; a backward operator has none, and differentiating through it is an error. ``notes`` are what
    :func:`tersor.backends` adds to its row.
    """

    name: str
    place: str
    schema: str
    reference: Callable[..., Any]
    overload: Any
    derivative: Callable[..., Any] | None
    notes: tuple[str, ...] = ()

    def __call__(self, *args: Any) -> Any:
        if self.derivative is None and torch.is_grad_enabled():  # create_graph=True, or torch.func
            return _OnceDifferentiable.apply(self.name, *args)
        if torch.compiler.is_compiling():
            return self.overload(*args)
        # The caller is an autograd.Function, so the operator's own autograd rule has nothing to do.
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def without_gradient(self, *args: Any) -> Any:
        """The operator's results for tensors that carry no gradient, past autograd's own dispatch (5 us)."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return self.overload(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def inference(self, *args: Any) -> Any:
        """:meth:`without_gradient`, but for arguments that ask for one: then autograd says that there is none."""
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return self.overload(*args)
        return self.without_gradient(*args)


def operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    derivative: Callable[..., Any] | None = None,
    autocast: bool = False,
    module: str | None = None,
    notes: tuple[str, ...] = (),
) -> Operator:
    """Registers ``tersor::<schema>`` and returns the callable that an ``autograd.Function`` uses.

    Args:
        schema: name, arguments and returns, without the namespace.
        reference: the formula in plain torch; defines correctness and runs wherever no kernel does.
        fake: shapes, dtypes and strides of the outputs without reading data.
        vmap: the batching rule ``(info, in_dims, *args) -> (outputs, out_dims)``.
        derivative: the differentiable function with the same arguments, which serves whoever calls
            ``torch.ops.tersor.<name>`` directly with tensors that require a gradient; None for an operator that
            is itself a derivative (``..._backward``) or has none, where asking for one is an error.
        autocast: cast floating-point inputs to the autocast dtype (for operators that are matrix products in kind).
        module: the ``__name__`` of the operator's own module, by default the caller's.
        notes: what a user should know of which kernel runs when, one sentence each.
    """
    name = schema.partition("(")[0]
    module = module or sys._getframe(1).f_globals["__name__"]
    qualified = f"tersor::{name}"
    if name in REGISTRY:
        raise RuntimeError(f"operator {qualified} is already registered by {REGISTRY[name].place}")
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    overload = getattr(torch.ops.tersor, name).default

    def call_autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            if derivative is None and "!" in schema:
                raise RuntimeError(f"{qualified} changes its arguments in place: call it under torch.no_grad()")
            return derivative(*args) if derivative else _OnceDifferentiable.apply(name, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    _LIBRARY.impl(name, call_autograd, "Autograd")
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    if autocast:
        for device in ("cpu", "cuda"):
            _register_autocast(name, overload, device)
    place = module.removeprefix("tersor.").replace(".", "/")
    REGISTRY[name] = Operator(name, place, schema, reference, overload, derivative, notes)
    return REGISTRY[name]


class _OnceDifferentiable(torch.autograd.Function):
    """Torch's own ``once_differentiable`` gives silent zeros under ``torch.func``; this raises there too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return REGISTRY[name].overload(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        if ctx.name.endswith("_backward"):
            raise RuntimeError(f"tersor::{ctx.name} is once differentiable: it has no second derivative")
        raise RuntimeError(f"tersor::{ctx.name} has no derivative")


def call_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` without the 30 us that it spends on ``inspect.signature`` to bind no defaults.

    Where no gradient is wanted, not even a node is made (5 us).
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if forward_ad._current_level < 0 and not (
        torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
    ):
        return function.forward(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_autocast_enabled(device_type: str) -> bool:
    """Torch's own refuses the meta device."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_tensors(device_type: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on for the device, else as they are."""
    if not is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _register_autocast(name: str, overload: Any, device: str) -> None:
    key = f"Autocast{device.upper()}"

    def call_autocast(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        cast = iter(autocast_tensors(device, *tensors))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return overload(*(next(cast) if isinstance(a, torch.Tensor) else a for a in args))

    _LIBRARY.impl(name, call_autocast, key)
