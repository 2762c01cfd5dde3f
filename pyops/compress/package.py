"""Converted models compiled ahead of time: one file that runs without the model's own code."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.compress.prepare import compression_of


def compile_package(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
) -> str:
    """Compiles a converted model ahead of time to a file ``*.pt2``: ``torch.export``, then AOTInductor.

    The file holds machine code and all tensors, and runs where torch and tersor are installed, without the model's own
    code and without compiling anything::

        from tersor.compress import load_package

        run = load_package("model.pt2")
        logits = run(images)

    It is bound to this version of torch, to this processor's instruction set, and to the device that the model is on;
    :func:`tersor.compress.save` makes a file that is not. The operators have their schemas from Python, so a process
    without a Python interpreter cannot run it. Trust the file as you would a program: loading it runs its code.

    The output is that of the model but for the rounding of what Inductor puts together (norms, activations, sums); a
    value that this moves across a threshold of a later quantised layer takes the neighbouring level there.

    Args:
        model: from :func:`convert_`.
        inputs: example input, or a tuple of them; on the model's device.
        path: of the file; must end in ``.pt2``. What is there is replaced.
        dynamic_shapes: as for ``torch.export.export``, such as ``({0: torch.export.Dim("batch", max=64)},)``; sizes
            that are not named are fixed to those of ``inputs``. An example of size 1 fixes that size.

    Returns:
        The path.

    Raises:
        TypeError: ``model`` is not a module or an input not a tensor.
        ValueError: the model is not converted or not in eval mode, ``path`` has another ending, the inputs or
            ``dynamic_shapes`` do not fit the model, or torch cannot export it.
        RuntimeError: there is no C++ compiler, or it failed.
    """
    name = "compile_package"
    compression = compression_of(name, model)
    if not compression.converted:
        raise ValueError(f"{name}: model must be converted by convert_, got one that trains")
    training = [place or "the model itself" for place, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"{name}: model must be in eval mode, got training mode in {training[0]}; call model.eval()")
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: inputs must be tensors, got {type(tensor).__name__} among them")
    where = os.fspath(path)
    if not where.endswith(".pt2"):
        raise ValueError(f"{name}: path must end in '.pt2', got {where!r}")
    program = _exported(model, given, dynamic_shapes)
    _check_compiler(name)
    description = {"tersor": json.dumps(_sizes(program))}
    options = {"aot_inductor.metadata": description}
    return torch._inductor.aoti_compile_and_package(program, package_path=where, inductor_configs=options)


def load_package(path: str | os.PathLike[str]) -> Callable[..., Any]:
    """What :func:`compile_package` made, ready to run: takes the inputs and returns the model's output.

    It is ``torch._inductor.aoti_load_package`` in a process that has imported tersor, which registers the operators;
    and inputs of other shapes and dtypes than the file is for are a ValueError, where torch by default reads on beyond
    their end. (Torch's own check, ``AOTI_RUNTIME_CHECK_INPUTS``, refuses open sizes of 1 and such that its convolutions
    choose another kernel for, though the file computes them as well.)

    Args:
        path: of the file. Trust it as you would a program: loading it runs its code.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no such file, or of another version of torch or another kind of machine.
    """
    where = os.fspath(path)
    with open(where, "rb"):
        pass  # so that a missing file is an OSError like elsewhere
    if not zipfile.is_zipfile(where):
        raise ValueError(f"load_package: {where}: not a file that compile_package wrote, or damaged")
    try:
        model = torch._inductor.aoti_load_package(where)
        expected = json.loads(model.get_metadata()["tersor"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"load_package: {where}: cannot be loaded here: {error}") from error

    def run(*inputs: Tensor) -> Any:
        _check_inputs(expected, inputs)
        return model(*inputs)

    return run


@torch.no_grad()
def _exported(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    name = "compile_package"
    try:
        model(*inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: inputs must be such as the model takes: {error}") from error
    try:
        return torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # of many kinds, by torch.export and by the model's own code
        raise ValueError(f"{name}: torch.export cannot take the model with these inputs: {error}") from error


def _sizes(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    """Of each input: its dtype, and each size as a number, or as a name with the least and the greatest (or None)."""
    import sympy  # slow, and torch.export has done it

    found = []
    for node in program.graph.nodes:
        if node.op != "placeholder" or node.name not in program.graph_signature.user_inputs:
            continue
        value = node.meta["val"]
        shape: list[Any] = []
        for size in value.shape:
            if isinstance(size, int):
                shape.append(size)
                continue
            limits = program.range_constraints.get(size.node.expr)
            ends: list[Any] = [] if limits is None else [limits.lower, limits.upper]
            # Infinities are no Integer. From 2 on means that nothing was said: tracing leaves out 0 and 1.
            least, greatest = (int(end) if isinstance(end, sympy.Integer) else None for end in ends or [None, None])
            shape.append([str(size.node.expr), 1 if least in (None, 2) else least, greatest])
        found.append({"dtype": str(value.dtype), "shape": shape})
    return found


def _check_inputs(expected: list[dict[str, Any]], inputs: tuple[Any, ...]) -> None:
    name = "load_package"
    if len(inputs) != len(expected) or not all(isinstance(each, Tensor) for each in inputs):
        kinds = ", ".join(type(each).__name__ for each in inputs)
        raise TypeError(f"{name}: inputs must be {len(expected)} tensors for this file, got {kinds or 'none'}")
    known: dict[str, int] = {}
    for place, (tensor, wanted) in enumerate(zip(inputs, expected, strict=True)):
        shape = wanted["shape"]
        fits = str(tensor.dtype) == wanted["dtype"] and tensor.dim() == len(shape)
        for size, limit in zip(tensor.shape, shape, strict=False):
            if isinstance(limit, int):
                fits = fits and size == limit
            else:
                symbol, least, greatest = limit
                fits = fits and size >= least and (greatest is None or size <= greatest)
                fits = fits and known.setdefault(symbol, size) == size
        if not fits:
            texts = (
                str(x) if isinstance(x, int) else f"{x[0]} from {x[1]} {'on' if x[2] is None else f'to {x[2]}'}"
                for x in shape
            )
            raise ValueError(
                f"{name}: input {place} must be {wanted['dtype']} ({', '.join(texts)}) for this file, got "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )


def _check_compiler(name: str) -> None:
    from torch._inductor import config

    compilers = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    wanted = [each for each in compilers if each]
    if not any(shutil.which(each) for each in wanted):
        raise RuntimeError(
            f"{name}: a C++ compiler is needed, found none of {', '.join(wanted)}: install g++ or clang++, or name one "
            "in the environment variable CXX before Python starts"
        )
