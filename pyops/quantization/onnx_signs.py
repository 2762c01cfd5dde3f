"""Binary layers on their way to ONNX as signs, float convolutions and stored weights; for :func:`export_onnx`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

Node = torch.fx.Node
_SIGN, _CONVOLVE = "binary_sign_forward", "binary_conv2d_forward"


def express_signs(graph: torch.fx.Graph, is_constant: Callable[[Node], bool]) -> None:
    """Turns products of signs into convolutions in floats, which hold whole numbers up to 2^24 exactly.

    What is left of tersor's are the signs of constants, for which codes are stored.
    """
    for node in list(graph.nodes):
        if _is(node, _CONVOLVE):
            _replace_first(graph, node, _convolution(graph, node))
    for node in list(graph.nodes):
        if _is(node, _SIGN) and not is_constant(node.args[0]):
            _replace_first(graph, node, _call(graph, node, torch.ops.aten.sign.default, node.args[0]))


def sources_of_signs(graph: torch.fx.Graph) -> list[Node]:
    """The constants of which the signs are taken."""
    return [node.args[0] for node in graph.nodes if _is(node, _SIGN)]


def store_derived(
    graph: torch.fx.Graph, weights: list[Node], is_constant: Callable[[Node], bool], store: Callable[[Node], Node]
) -> None:
    """Has every value that follows from these weights (a mean of magnitudes, say) replaced, so that they can go."""
    derived = set(weights)
    for node in graph.nodes:
        if node.op == "call_function" and is_constant(node) and derived.intersection(node.all_input_nodes):
            derived.add(node)
    for node in [each for each in graph.nodes if each in derived and each not in weights]:
        users = [user for user in node.users if user not in derived]
        if users and isinstance(node.meta["val"], torch.Tensor):
            stored = store(node)
            for user in users:
                user.replace_input_with(node, stored)


def _convolution(graph: torch.fx.Graph, node: Node) -> Node:
    input, weight, scale, stride, padding, dilation, groups = node.args
    signs = [_signs(graph, node, each) for each in (input, weight)]
    window = (None, stride, padding, dilation, False, [0, 0], groups)
    output = _call(graph, node, torch.ops.aten.convolution.default, *signs, *window)
    if scale is None:
        return output
    factor = _call(graph, node, torch.ops.aten.reshape.default, scale, [-1, 1, 1])
    return _call(graph, node, torch.ops.aten.mul.Tensor, output, factor)


def _signs(graph: torch.fx.Graph, before: Node, source: Any) -> Node:
    if source.target is operator.getitem and _is(source.args[0], _SIGN):
        return source
    sign = torch.ops.tersor.binary_sign_forward.default
    return _call(graph, before, operator.getitem, _call(graph, before, sign, source, "ste", 1.0, 1.0, 1.0, False), 0)


def _call(graph: torch.fx.Graph, before: Node, target: Callable[..., Any], *args: Any) -> Node:
    """A node that knows its shape, of the layer of the node before which it stands."""
    with graph.inserting_before(before):
        made = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda each: each.meta["val"])
    made.meta = {**before.meta, "val": target(*values)}
    return made


def _replace_first(graph: torch.fx.Graph, node: Node, output: Node) -> None:
    """Of the operator's results the others serve the backward pass."""
    for user in [user for user in node.users if user.args[1] == 0]:
        user.replace_all_uses_with(output)


def _is(node: Any, name: str) -> bool:
    target = getattr(node, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target._schema.name == f"tersor::{name}"
