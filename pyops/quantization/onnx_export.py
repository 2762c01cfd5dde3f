"""Fake-quantised models as ONNX files with ``QuantizeLinear`` and ``DequantizeLinear``."""

from __future__ import annotations

import dataclasses
import importlib
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor._checks import as_int
from tersor.quantization.fake_quantize_affine import _check_values as check_affine
from tersor.quantization.fake_quantize_bounds import check_bounds, quantize_ddtb
from tersor.quantization.fake_quantize_lsq_plus import _check_values as check_lsq_plus
from tersor.quantization.fake_quantize_pact import check_positive

WIDTHS = (4, 8, 16)
OPSET = 21  # the first with 4- and 16-bit types
LEAST_OPSET = 18  # torch translates to no lower one


def export_onnx(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    widths: Sequence[int] = (4, 8),
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> torch.onnx.ONNXProgram:
    r"""Writes ``model`` to ``path``, its fake-quantisers as integers between whose levels other runtimes compute.

    A quantised activation becomes ``Clip``, ``QuantizeLinear`` and ``DequantizeLinear`` with constant scale and zero
    point, a quantised weight an integer initializer and ``DequantizeLinear``; the ``Clip`` is left out where the
    integer type saturates at the same levels. Of ``widths``, each takes the narrowest that holds all its levels, so
    2 to 4 bits are stored in 4 (2 and 3 between clips), 5 to 8 in 8. :func:`fake_quantize_bounds` has codes q and zero
    point -z, or in its own names scale 1 / s; :func:`fake_quantize_lsq_plus` also an ``Add`` of its offset.

    What the file computes is what the model does, but for the last bit: x / scale is rounded where the model rounds
    s x - z, and code times scale is off by at most 2 units in the last place of float32. An input within a few such
    units of the middle between two levels may so take the neighbouring one (for random inputs about 1 in 100,000 at
    8 bits). An input exactly in the middle goes to the even code, in the model's ddtb rule to the even q: where z is
    odd that is the other one. ``fake_quantize_lsq``, ``fake_quantize_lsq_plus`` and ``fake_quantize_affine`` with
    ``corrected`` are the same in every bit. NaN, which integers lack, does not pass.

    Nothing else is written than what is exact in this sense. Refused are hence bounds that depend on the input (a
    dynamic gate) or lie along the batch; levels that no type of ``widths`` holds: those far from 0 and, at 8 bits in 8,
    the 257 that lower = -upper has; the rule ``"unit"``; a dtype other than float32.

    Args:
        model: in eval mode; any :class:`torch.nn.Module` that ``torch.export`` takes.
        inputs: example input, or a tuple of them.
        path: of the file; what does not fit 2 GB goes to a second one beside it.
        dynamic_shapes: as for ``torch.onnx.export``, such as ``({0: "batch", 2: "height", 3: "width"},)``; sizes that
            are not named are fixed to those of ``inputs``.
        widths: the integer types allowed, of 4, 8 and 16 bits. ``(8,)`` is for a runtime without the 4-bit types;
            ``(4, 8, 16)`` holds any sensible level, exactly, where a runtime has 16 bits.
        opset_version: at least 21 for 4 or 16 bits, else at least 18.
        input_names, output_names: as for ``torch.onnx.export``.

    Returns:
        The exported program, also written.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument is not as stated, or a quantiser cannot be expressed: its layer and why.
    """
    inputs, widths, opset_version = _check(model, inputs, widths, opset_version)
    onnxscript, onnx_ir = _packages()
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=_export_dims(dynamic_shapes), strict=False)
        emitters = _replace_quantizers(program, widths, _Writer(onnxscript.values.Opset("", opset_version), onnx_ir))

    def translate(input: Any, index: int) -> Any:
        return emitters[index](input)

    return _save(program, path, dynamic_shapes, opset_version, translate, input_names, output_names)


def _save(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    dynamic_shapes: Any,
    opset_version: int,
    translate: Callable[..., Any],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> torch.onnx.ONNXProgram:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        dynamic_shapes=dynamic_shapes,  # only names the sizes: the program has them already
        custom_translation_table={_quantize: translate},
        opset_version=opset_version,
        input_names=input_names,
        output_names=output_names,
        verbose=False,
    )
    assert exported is not None  # what the older exporter returns
    exported.save(path)
    return exported


def _check(
    model: nn.Module, inputs: Any, widths: Sequence[int], opset_version: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...], int]:
    where = "export_onnx"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{where}: model must be in eval mode, got training mode in {training[0]}: call model.eval()")
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for i, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: inputs must be tensors, got {type(tensor).__name__} at {i}")
    chosen = tuple(sorted({as_int(where, widths=width) for width in widths}))
    if not chosen or not set(chosen) <= set(WIDTHS):
        raise ValueError(f"{where}: widths must be one or more of 4, 8 and 16, got {tuple(widths)}")
    opset_version = as_int(where, opset_version=opset_version)
    least = LEAST_OPSET if chosen == (8,) else OPSET
    if opset_version < least:
        raise ValueError(f"{where}: opset_version must be at least {least} for widths {chosen}, got {opset_version}")
    return inputs, chosen, opset_version


def _packages() -> tuple[Any, Any]:
    try:
        importlib.import_module("onnx")
        return importlib.import_module("onnxscript"), importlib.import_module("onnx_ir")
    except ImportError as error:
        raise ImportError(f'export_onnx needs onnx and onnxscript ({error}): pip install "tersor[onnx]"') from error


def _export_dims(shapes: Any) -> Any:
    """Torch's exporter to ONNX takes a name for a dynamic size, ``torch.export`` does not."""
    if isinstance(shapes, dict):
        return {key: _export_dims(value) for key, value in shapes.items()}
    if isinstance(shapes, (tuple, list)):
        return type(shapes)(_export_dims(value) for value in shapes)
    return torch.export.Dim.DYNAMIC if isinstance(shapes, str) else shapes


# The levels of each quantiser, from its constants.


@dataclasses.dataclass(frozen=True)
class Levels:
    """What a quantiser rounds to: ``offset + m step`` for the whole numbers m from ``lowest`` to ``highest``.

    Attributes:
        step, lowest, highest: float32 of one element, or one per index of the input's dimension ``axis``.
        zero: the integer code of m = 0, by the operator's own formula.
        offset: as ``step``; None for none.
        relu: whether the input goes through a ReLU first.
    """

    step: Tensor
    lowest: Tensor
    highest: Tensor
    zero: Tensor
    offset: Tensor | None = None
    relu: bool = False
    axis: int | None = None


def _bounds_levels(lower: Tensor, upper: Tensor, bits: int, relu: bool = False) -> Levels:
    check_bounds(lower, upper)
    lower, upper = torch.broadcast_tensors(lower, upper)
    scale = torch.full_like(upper, 2**bits - 1) / (upper - lower)
    zero = torch.round(scale * lower) + 2 ** (bits - 1)
    # The operator's own outermost levels: by a bound's tie the top one may be a level higher or lower than planned.
    lowest, highest = (torch.round(quantize_ddtb(bound, lower, upper, bits)[0] * scale) for bound in (lower, upper))
    return Levels(1 / scale, lowest, highest, -zero, relu=relu)


def _fake_quantize_bounds(lower: Tensor, upper: Tensor, *, bits: int, rule: str, relu: bool, **_: Any) -> Levels:
    if rule != "ddtb":
        raise ValueError(f"rule {rule!r} does not scale its levels back to the input's units; only 'ddtb' does")
    return _bounds_levels(lower, upper, bits, relu)


def _fake_quantize_add(
    lower: Tensor, upper: Tensor, other_lower: Tensor, other_upper: Tensor, *, bits: int, **_: Any
) -> tuple[Levels, Levels]:
    return _bounds_levels(lower, upper, bits), _bounds_levels(other_lower, other_upper, bits)


def _fake_quantize_pact(alpha: Tensor, *, bits: int) -> Levels:
    check_positive("alpha", alpha=alpha)
    if bits == 32:
        raise ValueError("bits=32 clips without quantising; use torch.clamp")
    levels = 2**bits - 1
    return _from_zero(alpha / levels, levels)


def _fake_quantize_lsq(scale: Tensor, *, quant_min: int, quant_max: int, **_: Any) -> Levels:
    check_positive("fake_quantize_lsq", scale=scale)
    lowest, highest, zero = (torch.full_like(scale, level) for level in (quant_min, quant_max, 0))
    return Levels(scale, lowest, highest, zero)


def _fake_quantize_lsq_plus(scale: Tensor, offset: Tensor, *, levels: int, **_: Any) -> Levels:
    check_lsq_plus(scale, offset)
    scale, offset = torch.broadcast_tensors(scale, offset)
    return dataclasses.replace(_from_zero(scale, levels), offset=offset)


def _fake_quantize_affine(scale: Tensor, zero_point: Tensor, *, quant_min: int, quant_max: int, **_: Any) -> Levels:
    check_affine(scale, zero_point)
    scale, zero_point = torch.broadcast_tensors(scale, zero_point)
    zero = torch.round(zero_point).clamp(quant_min, quant_max)
    return Levels(scale, quant_min - zero, quant_max - zero, zero)


def _weight_fake_quantize(lower: Tensor, upper: Tensor, *, bits: int, mode: str, **_: Any) -> Levels:
    if mode != "symmetric":
        return _bounds_levels(lower, upper, bits)
    levels = torch.full_like(upper, 2 ** (bits - 1) - 1)
    return Levels(upper / levels, -levels, levels, torch.zeros_like(levels))


def _from_zero(step: Tensor, levels: int) -> Levels:
    zero = torch.zeros_like(step)
    return Levels(step, zero, torch.full_like(step, levels), zero)


LEVELS: dict[str, Callable[..., Levels | tuple[Levels, ...]]] = {
    f"{function.__name__[1:]}_forward": function
    for function in (
        _fake_quantize_add,
        _fake_quantize_affine,
        _fake_quantize_bounds,
        _fake_quantize_lsq,
        _fake_quantize_lsq_plus,
        _fake_quantize_pact,
        _weight_fake_quantize,
    )
}


# From levels to an integer type.


@dataclasses.dataclass(frozen=True)
class IntegerType:
    """An ONNX type and zero point that hold a quantiser's codes; ``clip`` where it would hold codes beyond."""

    name: str
    zero_point: Tensor
    clip: bool


def integer_type(levels: Levels, widths: Sequence[int]) -> IntegerType:
    """The narrowest allowed; ValueError if none holds the levels."""
    signed = bool((levels.lowest + levels.zero < 0).any() or (levels.zero < 0).any())
    for width in widths:
        least, greatest = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
        zero_point = levels.zero.clamp(least, greatest)  # any serves that lets the codes fit; their own if it can
        lowest, highest = levels.lowest + zero_point, levels.highest + zero_point
        if (lowest >= least).all() and (highest <= greatest).all():
            clip = bool((lowest != least).any() or (highest != greatest).any())
            return IntegerType(f"{'' if signed else 'u'}int{width}", zero_point, clip)
    worst = (levels.lowest.abs() + levels.highest.abs()).argmax()
    first, last = (int(level.flatten()[worst]) for level in (levels.lowest, levels.highest))
    count = last - first + 1
    raise ValueError(
        f"its {count} levels lie {first} to {last} steps from 0, which no zero point brings into "
        f"{' or '.join(str(width) for width in widths)} bits; "
        + ("move one bound by a little, or allow widths=(4, 8, 16)" if count == 257 else "allow widths=(4, 8, 16)")
    )


class _Writer:
    """Writes the ONNX nodes of a quantiser when the exporter comes to it."""

    def __init__(self, opset: Any, onnx_ir: Any) -> None:
        self.op, self.ir = opset, onnx_ir
        self.names: set[str] = set()

    def constant(self, name: str, values: Tensor, dtype: str = "float") -> Any:
        kind = getattr(self.ir.DataType, dtype.upper())
        array = values.detach().cpu().numpy().astype(kind.numpy())
        result = self.op.Constant(value=self.ir.Tensor(array, dtype=kind))
        candidates = (f"{name}_{i}" if i else name for i in range(len(self.names) + 1))
        result.name = next(candidate for candidate in candidates if candidate not in self.names)
        self.names.add(result.name)
        return result

    def activation(self, layer: str, levels: Levels, kind: IntegerType) -> Callable[[Any], Any]:
        def emit(x: Any) -> Any:
            x = self.op.Relu(x) if levels.relu else x
            offset = None if levels.offset is None else self.constant(f"{layer}.offset", levels.offset)
            x = x if offset is None else self.op.Sub(x, offset)
            if kind.clip:
                x = self._clip(x, layer, levels)
            scale, zero_point, axis = self._parameters(layer, levels, kind)
            codes = self.op.QuantizeLinear(x, scale, zero_point, **axis)
            output = self.op.DequantizeLinear(codes, scale, zero_point, **axis)
            return output if offset is None else self.op.Add(output, offset)

        return emit

    def stored(self, layer: str, levels: Levels, kind: IntegerType, codes: Tensor) -> Callable[[Any], Any]:
        def emit(_: Any) -> Any:
            scale, zero_point, axis = self._parameters(layer, levels, kind)
            stored = self.constant(f"{layer}.codes", codes, kind.name)
            output = self.op.DequantizeLinear(stored, scale, zero_point, **axis)
            if levels.offset is None:
                return output
            return self.op.Add(output, self.constant(f"{layer}.offset", levels.offset))

        return emit

    def _parameters(self, layer: str, levels: Levels, kind: IntegerType) -> tuple[Any, Any, dict[str, int]]:
        step, zero_point = (t if levels.axis is None else t.flatten() for t in (levels.step, kind.zero_point))
        axis = {} if levels.axis is None else {"axis": levels.axis}
        scale = self.constant(f"{layer}.scale", step)
        return scale, self.constant(f"{layer}.zero_point", zero_point, kind.name), axis

    def _clip(self, x: Any, layer: str, levels: Levels) -> Any:
        # At the outermost levels themselves, half a step from where rounding decides; the bounds may lie on a tie.
        least = self.constant(f"{layer}.lowest", levels.lowest * levels.step)
        greatest = self.constant(f"{layer}.highest", levels.highest * levels.step)
        if levels.axis is None:
            return self.op.Clip(x, least, greatest)
        return self.op.Min(self.op.Max(x, least), greatest)  # Clip takes scalars only


# The exported program: constants found, quantisers replaced by a mark that the exporter is told how to translate.

_LIBRARY = torch.library.Library("tersor_onnx", "DEF")
_LIBRARY.define("quantize(Tensor input, int index) -> Tensor")
_LIBRARY.impl("quantize", lambda input, index: input.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("tersor_onnx::quantize", lambda input, index: torch.empty_like(input), lib=_LIBRARY)
_quantize = torch.ops.tersor_onnx.quantize.default


class _DependsOnInput(Exception):  # noqa: N818  (an answer, not an error)
    pass


class _Constants:
    """Values of the nodes that follow from parameters, buffers and constants alone."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature, self.values = program.graph_signature, {}
        stored = {**program.constants, **program.state_dict}
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        for node in program.graph.nodes:
            if node.op == "placeholder" and node.name in names:
                self.values[node] = stored[names[node.name]].detach()

    def of(self, node: Any) -> Any:
        if not isinstance(node, torch.fx.Node):
            return node
        if node not in self.values:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            if node.op != "call_function" or random:
                raise _DependsOnInput
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.of)
            self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.values[node]

    def has(self, node: torch.fx.Node) -> bool:
        try:
            self.of(node)
        except _DependsOnInput:
            return False
        return True


def _replace_quantizers(
    program: torch.export.ExportedProgram, widths: Sequence[int], writer: _Writer
) -> list[Callable[[Any], Any]]:
    """Puts a mark in the place of every quantiser; returns what writes each one's nodes."""
    constants, emitters = _Constants(program), []
    graph = program.graph
    quantizers = [node for node in graph.nodes if _operator_name(node) in LEVELS]
    if not quantizers:
        raise ValueError("export_onnx: model must run a fake-quantiser, got none (are its layers in a float stage?)")
    for node in quantizers:
        try:
            pairs = _levels(node, constants)
            outputs = []
            for source, levels in pairs:
                emitters.append(_emitter(node, source, levels, widths, constants, writer))
                with graph.inserting_before(node):
                    outputs.append(graph.call_function(_quantize, (source, len(emitters) - 1)))
                outputs[-1].meta = {**node.meta, "val": source.meta["val"]}
        except (ValueError, RuntimeError) as error:  # the kernels' own refusals of a weight are RuntimeErrors
            raise ValueError(f"export_onnx: {_layer(node)}: {error}") from None
        _replace(graph, node, outputs)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if _operator_name(node):
            raise ValueError(f"export_onnx: {_layer(node)}: {_operator_name(node)} is not expressible in ONNX")
    return emitters


def _operator_name(node: torch.fx.Node) -> str:
    """Of one of tersor's operators, else nothing."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "tersor":
        return node.target._schema.name.removeprefix("tersor::")
    return ""


def _layer(node: torch.fx.Node) -> str:
    """The path of the module that called the operator."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(stack.values()) if path), "model")


def _levels(node: torch.fx.Node, constants: _Constants) -> list[tuple[torch.fx.Node, Levels]]:
    """Each tensor that the node quantises, and its levels."""
    name = _operator_name(node)
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    sources = [arguments.pop(key) for key in ("input", "weight", "other") if key in arguments]
    for source in sources:
        if source.meta["val"].dtype != torch.float32:
            raise ValueError(f"only float32 is expressible, got {source.meta['val'].dtype}: call model.float() before")
    given = [arguments.pop(key) for key in names if isinstance(arguments.get(key), torch.fx.Node)]
    weight = name == "weight_fake_quantize_forward"
    try:
        parameters = list(constants.of(node)[1]) if weight else [constants.of(parameter) for parameter in given]
    except _DependsOnInput:
        what = "the weight depends" if weight else "bounds, scale or offset depend"
        raise ValueError(
            f"{what} on the model's input, as with a dynamic gate; QuantizeLinear takes constants"
        ) from None
    axis = next((i for p in parameters if p.numel() > 1 for i, size in enumerate(p.shape) if size > 1), None)
    if axis == 0 and not constants.has(sources[0]):
        raise ValueError("one value per sample is not expressible, whose number ONNX leaves open")
    levels = LEVELS[name](*(p.reshape(()) if p.numel() == 1 else p for p in parameters), **arguments)
    each = levels if isinstance(levels, tuple) else (levels,)
    return [(source, dataclasses.replace(one, axis=axis)) for source, one in zip(sources, each, strict=True)]


def _emitter(
    node: torch.fx.Node,
    source: torch.fx.Node,
    levels: Levels,
    widths: Sequence[int],
    constants: _Constants,
    writer: _Writer,
) -> Callable[[Any], Any]:
    kind = integer_type(levels, widths)
    if _operator_name(node) == "fake_quantize_add_forward" or not constants.has(source):
        return writer.activation(_layer(node), levels, kind)
    output = constants.of(node)
    output = output[0] if isinstance(output, tuple) else output
    steps = (output if levels.offset is None else output - levels.offset) / levels.step
    return writer.stored(_layer(node), levels, kind, torch.round(steps) + kind.zero_point)


def _replace(graph: torch.fx.Graph, node: torch.fx.Node, outputs: Sequence[torch.fx.Node]) -> None:
    if len(outputs) == 2:
        with graph.inserting_before(node):
            total = graph.call_function(torch.ops.aten.add.Tensor, tuple(outputs))
        total.meta = {**node.meta}
        node.replace_all_uses_with(total)
    elif isinstance(node.meta["val"], (tuple, list)):  # weight_fake_quantize's bounds have no user
        for user in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]:
            user.replace_all_uses_with(outputs[0])
    else:
        node.replace_all_uses_with(outputs[0])
