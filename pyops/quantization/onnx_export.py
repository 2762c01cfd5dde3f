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
from tersor.quantization.onnx_levels import LEVELS, IntegerType, Levels, integer_type, scaled_signs
from tersor.quantization.onnx_signs import express_signs, sources_of_signs, store_derived

OPSET = 21  # the first with 4- and 16-bit types
LEAST_OPSET = 18  # torch translates to no lower one
SPARSIFIERS = ("nm_sparsify_forward", "srste_sparsify_forward")
_PACKED = "export the model before convert_ packs it"
REASONS = {  # by what an operator's name has in it, the first that fits
    "binary_packed": _PACKED,
    "pack": _PACKED,
    "quantized_conv2d": _PACKED,
    "quantized_linear": _PACKED,
    "nm_matmul": _PACKED,
}


def export_onnx(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    int4: bool = True,
    int16: bool = False,
    opset_version: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> torch.onnx.ONNXProgram:
    r"""Writes ``model`` to ``path``, its fake-quantisers as ``QuantizeLinear`` and ``DequantizeLinear``.

    An activation becomes ``Min``, ``QuantizeLinear`` and ``DequantizeLinear`` with constant scale and zero point; a
    weight becomes an integer initializer and ``DequantizeLinear``. Activations are stored in unsigned 8 bits, which
    runtimes have kernels for, with codes from 0, and weights in signed 8, or 4 if they fit. ``Min``, with the highest
    level, makes 8 bits exact where fewer are meant; it is left out where 255 is the highest level, and ``Max`` joins it
    where 0 is not the lowest. For :func:`fake_quantize_bounds` the scale is 1 / s and the zero point 2^(bits-1) - z, as
    near as the type allows; :func:`fake_quantize_lsq_plus` has a ``Sub`` and an ``Add`` of its offset around.

    The file computes what the model does but for last bits. A code times the scale is within 2 units in the last place
    of float32 of the model's value. x / scale is rounded where the model rounds s x - z, so an input within a few such
    units of the middle between two levels may go to the neighbouring level: of random ones less than 1 in 10^5. One
    exactly in the middle goes to the even multiple of the scale, in the model to the even q, which for odd z is the
    other one. What lies on a bound or beyond goes where it does in the model. ``fake_quantize_lsq``,
    ``fake_quantize_lsq_plus`` and ``fake_quantize_affine`` with ``corrected`` are the same bit for bit. NaN does not
    pass an integer.

    Of a model that :func:`tersor.compress.prepare_` made, export before ``convert_``. N:M sparse weights have their
    zeros among the whole numbers, or without a quantiser among floats. The levels of ``method="lts"``, between which 0
    is not one, are odd multiples of half their distance, which from 4 bits on take 8; within 2^-21 of the greatest.
    A binary layer becomes ``Sign``, and a convolution in floats with stored signs of its weight, 8 or 4 bits each: the
    file is as small as that, but no runtime counts bits.

    What cannot be said so is refused: packed layers; bounds that depend on the input (a dynamic gate) or lie
    along the batch; levels that do not fit 8 bits, as those far from 0 and the 257 that ``bits=8`` has where s lower is
    a whole number and a half (as for lower = -upper); the rule ``"unit"``; any dtype but float32.

    Args:
        model: in eval mode; any module that ``torch.export`` takes, with at least one quantiser, N:M sparse or
            binary weight in use.
        inputs: example input, or a tuple of them.
        path: of the file.
        dynamic_shapes: as for ``torch.onnx.export``, such as ``({0: "batch", 2: "height", 3: "width"},)``; sizes that
            are not named are fixed to those of ``inputs``.
        int4: store weights of up to 4 bits in 4 bits, two per byte; False for a runtime without that type.
        int16: store what does not fit 8 bits in 16, where a runtime has that type, instead of refusing it.
        opset_version: at least 21, or 18 with neither of these.
        input_names, output_names: as for ``torch.onnx.export``.

    Returns:
        The program that was written.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        TypeError, ValueError: an argument is not as stated, or a quantiser cannot be expressed: which, and why.

    Note:
        ONNX Runtime makes changes of its own. A convolution or ``Gemm`` between two 8-bit activations gets its bias
        rounded to multiples of both scales' product, and a float weight to 8 bits, unless the session has
        ``disabled_optimizers=["WeightBiasQuantization"]``. A ``MatMul`` of a float activation and an integer weight
        runs with activations of 8 bits unless the option ``session.qdq_matmulnbits_accuracy_level`` is ``"1"``.
    """
    inputs = _check_model(model, inputs)
    least = OPSET if int4 or int16 else LEAST_OPSET
    if as_int("export_onnx", opset_version=opset_version) < least:
        raise ValueError(
            f"export_onnx: opset_version must be at least {least} for int4={int4} and int16={int16}, "
            f"got {opset_version}"
        )
    wide = (8, 16) if int16 else (8,)
    onnxscript, onnx_ir = _packages()
    with torch.no_grad():
        program = torch.export.export(model, inputs, dynamic_shapes=_export_dims(dynamic_shapes), strict=False)
        emitters = _replace_quantizers(
            program, (4, *wide) if int4 else wide, wide, _Writer(onnxscript.values.Opset("", opset_version), onnx_ir)
        )

    def translate(input: Any, index: int, shape: Any = None) -> Any:
        return emitters[index](input)

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
    assert exported is not None  # as from the older exporter
    exported.save(path)
    return exported


def _check_model(model: nn.Module, inputs: Any) -> tuple[Tensor, ...]:
    where = "export_onnx"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(getattr(module, "converted", False) is True for module in model.modules()):
        raise ValueError(
            f"{where}: model must not be converted yet, got one whose layers are packed, for which ONNX has no "
            "operators: export it before tersor.compress.convert_"
        )
    training = [name or "the model itself" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{where}: model must be in eval mode, got training mode in {training[0]}; call model.eval()")
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: inputs must be tensors, got {type(tensor).__name__} among them")
    return inputs


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

    def emitter(self, layer: str, levels: Levels, kind: IntegerType, codes: Tensor | None) -> Callable[[Any], Any]:
        """Of an activation; or with ``codes``, of a stored tensor."""

        def emit(x: Any) -> Any:
            offset = None if levels.offset is None else self.constant(f"{layer}.offset", levels.offset)
            axis = {} if levels.axis is None else {"axis": levels.axis}
            step, zero = (t if levels.axis is None else t.flatten() for t in (levels.step, kind.zero_point))
            scale = self.constant(f"{layer}.scale", step)
            zero_point = self.constant(f"{layer}.zero_point", zero, kind.name)
            if codes is None:
                x = self.op.Relu(x) if levels.relu else x
                x = x if offset is None else self.op.Sub(x, offset)
                x = self._clip(x, layer, levels, kind)
                integers = self.op.QuantizeLinear(x, scale, zero_point, **axis)
            else:
                integers = self.constant(f"{layer}.codes", codes, kind.name)
            output = self.op.DequantizeLinear(integers, scale, zero_point, **axis)
            return output if offset is None else self.op.Add(output, offset)

        return emit

    def float_emitter(self, name: str, values: Tensor) -> Callable[[Any], Any]:
        """Of a constant that no integers express."""
        return lambda _: self.constant(name, values)

    def _clip(self, x: Any, layer: str, levels: Levels, kind: IntegerType) -> Any:
        # At the outermost levels themselves, half a step from where rounding decides; the bounds may lie on a tie.
        # Not Clip: behind a convolution with Clip and QuantizeLinear, ONNX Runtime rounds the bias to multiples of both
        # scales' product, 0.4% of EDSR's output at 2 bits. The constants come first lest an optimiser make it one.
        if kind.below:
            x = self.op.Max(self.constant(f"{layer}.lowest", levels.lowest * levels.step), x)
        if kind.above:
            x = self.op.Min(self.constant(f"{layer}.highest", levels.highest * levels.step), x)
        return x


# The exported program: constants found, quantisers replaced by a mark that the exporter is told how to translate.

_LIBRARY = torch.library.Library("tersor_onnx", "DEF")
_LIBRARY.define("quantize(Tensor input, int index, int[]? shape=None) -> Tensor")  # shape: of a constant made of input
_LIBRARY.impl("quantize", lambda *args: _like(*args).clone(), "CompositeExplicitAutograd")
torch.library.register_fake("tersor_onnx::quantize", lambda *args: torch.empty_like(_like(*args)), lib=_LIBRARY)
_quantize = torch.ops.tersor_onnx.quantize.default


def _like(input: Tensor, index: int, shape: Sequence[int] | None = None) -> Tensor:
    return input if shape is None else input.new_zeros(shape)


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
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                args = tuple(each.clone() if isinstance(each, Tensor) else each for each in args)
            self.values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self.values[node]

    def has(self, node: torch.fx.Node) -> bool:
        try:
            self.of(node)
        except _DependsOnInput:
            return False
        return True


def _replace_quantizers(
    program: torch.export.ExportedProgram,
    weight_widths: Sequence[int],
    activation_widths: Sequence[int],
    writer: _Writer,
) -> list[Callable[[Any], Any]]:
    """Puts a mark in the place of every quantiser and sparse weight; returns what writes each one's nodes."""
    constants, graph = _Constants(program), program.graph
    emitters: list[Callable[[Any], Any]] = []
    express_signs(graph, constants.has)
    graph.eliminate_dead_code()
    binary = sources_of_signs(graph)
    found = [node for node in graph.nodes if _operator_name(node) in {*LEVELS, *SPARSIFIERS}]
    if not found:
        _refuse_others(graph)
        raise ValueError("export_onnx: model must run a fake-quantiser, got none (are its layers in a float stage?)")
    covered: set[torch.fx.Node] = set()
    for node in found:
        if node in covered:
            continue
        try:
            if _operator_name(node) != "fake_quantize_add_forward" and constants.has(node.args[0]):
                covered |= _store(graph, node, constants, weight_widths, writer, emitters)
                continue
            outputs = []
            for source, levels in _levels(node, constants):
                kind = integer_type(levels, activation_widths, signed=False)
                emitters.append(writer.emitter(_layer(node), levels, kind, None))
                with graph.inserting_before(node):
                    outputs.append(graph.call_function(_quantize, (source, len(emitters) - 1)))
                outputs[-1].meta = {**node.meta, "val": source.meta["val"]}
        except (ValueError, RuntimeError) as error:  # the kernels' own refusals of a weight are RuntimeErrors
            raise ValueError(f"export_onnx: {_layer(node)}: {error}") from None
        _replace(graph, node, outputs)

    def store(node: torch.fx.Node) -> torch.fx.Node:
        emitters.append(writer.float_emitter(f"{_layer(node)}.scale", constants.of(node)))
        return _mark(graph, node, node, len(emitters) - 1)

    store_derived(graph, binary, lambda node: node.target is not _quantize and constants.has(node), store)
    graph.eliminate_dead_code()
    _refuse_others(graph)
    return emitters


def _store(
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    constants: _Constants,
    widths: Sequence[int],
    writer: _Writer,
    emitters: list[Callable[[Any], Any]],
) -> set[torch.fx.Node]:
    """Replaces a constant that is quantised or sparse by its codes, or by floats; returns the nodes it was made by."""
    chain = _chain(node, constants)
    names = [_operator_name(each) for each in chain]
    quantizer = next((i for i in reversed(range(len(chain))) if names[i] in LEVELS), None)
    last = next(i for i in reversed(range(len(chain))) if isinstance(chain[i].meta["val"], Tensor))
    emitter = None
    if quantizer is not None:
        ((_, levels),) = _levels(chain[quantizer], constants)
        if any(name in SPARSIFIERS for name in names[quantizer:]):  # 0 has to be one of them
            zero = torch.zeros_like(levels.lowest)
            lowest, highest = torch.minimum(levels.lowest, zero), torch.maximum(levels.highest, zero)
            levels = dataclasses.replace(levels, lowest=lowest, highest=highest)
        for place in reversed(range(quantizer, last + 1)):
            values = _first(constants.of(chain[place]))
            found = scaled_signs(values) if names[quantizer] == "binary_sign_forward" else levels
            kind = integer_type(found, widths, signed=True)
            if (codes := _codes(values, found, kind)) is not None:
                emitter, last = writer.emitter(_layer(chain[quantizer]), found, kind, codes), place
                break
    values = _first(constants.of(chain[last]))
    emitters.append(emitter or writer.float_emitter(f"{_layer(node)}.weight", values))
    end = chain[last]
    if isinstance(end.meta["val"], (tuple, list)):
        end = next(user for user in end.users if user.target is operator.getitem and user.args[1] == 0)
    mark = _mark(graph, node, end, len(emitters) - 1)
    end.replace_all_uses_with(mark)
    for each in reversed([*chain[: last + 1], end] if end not in chain[: last + 1] else chain[: last + 1]):
        if not each.users and each in graph.nodes:  # by hand: what changes its arguments is never dead code
            graph.erase_node(each)
    return set(chain)


def _mark(graph: torch.fx.Graph, node: torch.fx.Node, end: torch.fx.Node, index: int) -> torch.fx.Node:
    """In the place of the constant ``end``, made of ``node``; the mark's own input is any that exists, and not read."""
    source = node
    while source.op != "placeholder":
        source = next(each for each in source.all_input_nodes)
    with graph.inserting_after(end):
        mark = graph.call_function(_quantize, (source, index, list(end.meta["val"].shape)))
    mark.meta = {**end.meta}
    return mark


def _chain(node: torch.fx.Node, constants: _Constants) -> list[torch.fx.Node]:
    """The node and what is made of its result, as long as that is constant, of one shape and goes one way."""
    shape, chain = node.args[0].meta["val"].shape, [node]  # type: ignore[union-attr]
    while len(chain[-1].users) == 1:
        (user,) = chain[-1].users
        value = user.meta.get("val")
        whole = value[0] if isinstance(value, (tuple, list)) else value
        if not isinstance(whole, Tensor) or whole.shape != shape or not constants.has(user):
            break
        chain.append(user)
    return chain


def _refuse_others(graph: torch.fx.Graph) -> None:
    for node in graph.nodes:
        if name := _operator_name(node):
            why = next((f": {why}" for part, why in REASONS.items() if part in name), "")
            raise ValueError(f"export_onnx: {_layer(node)}: {name} is not expressible in ONNX{why}")


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
    given = given[:2] if name == "lts_quantize_forward" else given  # then comes its state
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


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _codes(values: Tensor, levels: Levels, kind: IntegerType) -> Tensor | None:
    """Of an operator's output for a constant input; None if it is not on the levels but for last bits."""
    offset = 0 if levels.offset is None else levels.offset
    steps = torch.round((values - offset) / levels.step)
    error = (steps * levels.step + offset - values).abs()
    inside = (steps >= levels.lowest) & (steps <= levels.highest) & (error <= 2**-21 * values.abs().max())
    return steps + kind.zero_point if inside.all() else None


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
