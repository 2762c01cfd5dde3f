"""What the fake-quantisers share: one forward and one backward operator each, registered from two formulas.

A quantiser maps one tensor, or two of the same shape, element by element, with a few parameters that are scalars or
lie along one dimension.
A rule states its formulas on tensors of the accumulation dtype; layouts, sums, checks and gradients are done here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tersor._checks import as_int, check_floating
from tersor._operator import Operator, call_function, operator

_HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
BITS = (2, 3, 4, 5, 6, 7, 8, 32)


def check_bits(where: str, bits: int) -> int:
    """``bits`` as an int; 32 means that nothing is quantised."""
    bits = as_int(where, bits=bits)
    if bits not in BITS:
        raise ValueError(f"{where}: bits must be 2 to 8, or 32 for none, got {bits}")
    return bits


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that all arithmetic is done in, and that the parameters have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_parameters(where: str, input: Tensor, **parameters: Any) -> list[Tensor]:
    """The parameters in the accumulation dtype, each of one element or along the same one dimension of ``input``."""
    if _is_plain(input, parameters.values()):
        return list(parameters.values())
    check_floating(where, input=input, **parameters)
    axes = {}
    for name, parameter in parameters.items():
        if parameter.device != input.device:
            raise ValueError(f"{where}: {name} must be on the device of input {input.device}, got {parameter.device}")
        if parameter.numel() == 1:
            continue
        along = [axis for axis, size in enumerate(parameter.shape) if size != 1]
        fits = parameter.dim() == input.dim() and len(along) == 1 and parameter.shape[along[0]] == input.shape[along[0]]
        if not fits:
            raise ValueError(
                f"{where}: {name} must have one element, or be of input's shape in one dimension and 1 in all others "
                f"(as (N, 1, 1, 1) for one value per sample), got shape {tuple(parameter.shape)} "
                f"for input {tuple(input.shape)}"
            )
        axes[name] = along[0]
    if len(set(axes.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(axes)} must lie along the same dimension of input, got {axes}")
    dtype = exact_dtype(input.dtype)
    return [parameter if parameter.dtype == dtype else parameter.to(dtype) for parameter in parameters.values()]


def _is_plain(input: Any, parameters: Iterable[Any]) -> bool:
    """The usual case, in half the time that the full checks take: one float32 element each, on one device."""
    if type(input) is not Tensor or input.dtype not in _HALF_OR_SINGLE or input.layout != torch.strided:
        return False
    device = input.device
    for p in parameters:
        if (type(p) is not Tensor and type(p) is not Parameter) or p.dtype != torch.float32 or p.numel() != 1:
            return False
        if p.device != device or p.layout != torch.strided:
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Rule:
    """The formulas of one quantiser.

    Attributes:
        parameters: names of the learned parameters, in order.
        constants: schema of the other arguments, such as ``"int bits, float grad_scale"``.
        quantize: ``(*inputs, *parameters, *constants) -> output``.
        differentiate: ``(grad_output, *inputs, *parameters, *constants) -> (*grad_inputs, *contributions)``: per
            element, what it adds to each parameter's gradient.
        check_values: ``(*parameters)``; raises ValueError for values that no quantiser can have.
        inputs: names of the tensors that are quantised.
    """

    parameters: Sequence[str]
    constants: str
    quantize: Callable[..., Tensor]
    differentiate: Callable[..., tuple[Tensor, ...]]
    check_values: Callable[..., None]
    inputs: Sequence[str] = ("input",)


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A registered quantiser; a call is differentiable once."""

    rule: Rule
    forward: Operator
    backward: Operator
    function: type[torch.autograd.Function]

    def __call__(self, *args: Any) -> Tensor:
        if torch.compiler.is_compiling():  # whose tracer cannot see through a class that a function built
            return self.forward.overload(*args)
        try:
            return call_function(self.function, *args)
        except RuntimeError:
            # The C++ kernel refuses such values; here is said which. Reading them beforehand would cost every call.
            if args[0].device.type == "cpu":
                first = len(self.rule.inputs)
                self.rule.check_values(*args[first : first + len(self.rule.parameters)])
            raise


QUANTIZERS: dict[str, Quantizer] = {}


def quantizer(module: str, name: str, rule: Rule) -> Quantizer:
    """Registers ``<name>_forward`` and ``<name>_backward`` and builds the differentiable function around them."""
    first, last = len(rule.inputs), len(rule.inputs) + len(rule.parameters)
    registered: dict[str, Operator] = {}

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return registered["forward"](*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:last])
            ctx.constants = inputs[last:]

        @staticmethod
        def backward(ctx, grad_output):
            gradients = registered["backward"](grad_output, *ctx.saved_tensors, *ctx.constants)
            return *gradients, *[None] * len(ctx.constants)

        @staticmethod
        def vmap(info, in_dims, *args):
            return vmap_forward(info, in_dims, *args)

    Function.__name__ = Function.__qualname__ = name

    def reference(*args: Any) -> Tensor:
        data, parameters, constants = args[:first], args[first:last], args[last:]
        if data[0].device.type == "cpu":
            rule.check_values(*parameters)
        exact = [t.to(parameters[0].dtype) for t in data]
        return torch.empty_like(data[0]).copy_(rule.quantize(*exact, *map(_broadcast, parameters), *constants))

    def reference_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        data, parameters, constants = args[:first], args[first:last], args[last:]
        exact = [t.to(parameters[0].dtype) for t in (grad_output, *data)]
        results = rule.differentiate(*exact, *map(_broadcast, parameters), *constants)
        gradients = [torch.empty_like(t).copy_(g) for t, g in zip(data, results[:first], strict=True)]
        sums = [_sum_to(c, p) for c, p in zip(results[first:], parameters, strict=True)]
        return *gradients, *sums

    def fake(*args: Any) -> Tensor:
        return torch.empty_like(args[0])

    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in args[:first]) + tuple(p.new_empty(p.shape) for p in args[first:last])

    def vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        folded, axis, _ = _fold(info, in_dims, args[:first], args[first:last])
        output = Function.apply(*folded, *args[last:])
        return _unfold(output, axis, info.batch_size, args[:first], in_dims), axis

    def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        data, parameters = args[: 1 + first], args[1 + first : 1 + last]
        folded, axis, shapes = _fold(info, in_dims, data, parameters)
        results = registered["backward"].overload(*folded, *args[1 + last :])
        gradients = [_unfold(g, axis, info.batch_size, data, in_dims) for g in results[:first]]
        sums = [_unfold_sum(s, info.batch_size, shape) for s, shape in zip(results[first:], shapes, strict=True)]
        return (*gradients, *sums), (*[axis] * first, *[0] * len(sums))

    inputs = ", ".join(f"Tensor {n}" for n in (*rule.inputs, *rule.parameters))
    returns = ", ".join(f"Tensor grad_{n}" for n in (*rule.inputs, *rule.parameters))
    registered["forward"] = operator(
        f"{name}_forward({inputs}, {rule.constants}) -> Tensor",
        reference=reference,
        fake=fake,
        vmap=vmap_forward,
        derivative=Function.apply,
        module=module,
    )
    registered["backward"] = operator(
        f"{name}_backward(Tensor grad_output, {inputs}, {rule.constants}) -> ({returns})",
        reference=reference_backward,
        fake=fake_backward,
        vmap=vmap_backward,
        module=module,
    )
    QUANTIZERS[name] = Quantizer(rule, registered["forward"], registered["backward"], Function)
    return QUANTIZERS[name]


def _broadcast(parameter: Tensor) -> Tensor:
    return parameter.reshape(()) if parameter.numel() == 1 else parameter


def _sum_to(contributions: Tensor, parameter: Tensor) -> Tensor:
    if parameter.numel() == 1:
        return contributions.sum().reshape(parameter.shape)
    return contributions.sum_to_size(parameter.shape)


def _fold(
    info: Any, in_dims: Sequence[int | None], data: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[list[Tensor], int, list[torch.Size]]:
    """The mapped dimension merged into the dimension that the parameters lie along, or into the first one.

    Returns the tensors, that dimension, and the parameters' shapes without the mapped dimension.
    """
    size = info.batch_size

    def front(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    dims = iter(in_dims)
    data = [front(t, next(dims)) for t in data]
    parameters = [front(p, next(dims)) for p in parameters]
    shapes = [p.shape[1:] for p in parameters]
    along = [axis for shape in shapes if shape.numel() > 1 for axis, extent in enumerate(shape) if extent > 1]
    axis, group = (along[0], data[0].shape[1 + along[0]]) if along else (0, 1)
    if not along and data[0].dim() > 1:  # one value per mapped element, for all of its first dimension
        group = data[0].shape[1]
    data = [(t.unsqueeze(1) if t.dim() == 1 else t).movedim(0, axis).flatten(axis, axis + 1) for t in data]
    ones = [1] * data[0].dim()
    folded = [p.reshape(size, -1).expand(size, group).reshape(*ones[:axis], -1, *ones[axis + 1 :]) for p in parameters]
    return [*data, *folded], axis, shapes


def _unfold(tensor: Tensor, axis: int, size: int, data: Sequence[Tensor], in_dims: Sequence[int | None]) -> Tensor:
    scalars = data[0].dim() == (0 if in_dims[0] is None else 1)  # which _fold gave a dimension more
    return tensor.squeeze(1) if scalars else tensor.unflatten(axis, (size, tensor.shape[axis] // size))


def _unfold_sum(gradient: Tensor, size: int, shape: torch.Size) -> Tensor:
    gradient = gradient.reshape(size, -1)
    return (gradient.sum(1) if shape.numel() == 1 else gradient).reshape(size, *shape)
