"""Product with a packed N:M matrix, for inference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._checks import check_floating
from tersor._operator import is_autocast_enabled, operator
from tersor.sparsity.nm_crossover import dense_is_faster, notes
from tersor.sparsity.nm_pack import check_packed
from tersor.sparsity.nm_unpack import nm_unpack, unpack_rows

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "gelu": F.gelu}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def nm_matmul(
    input: Tensor,
    values: Tensor,
    index: Tensor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    r"""``linear`` with a packed N:M weight, and an activation in the same pass:

    .. math:: output[b, o] = activation\Bigl(bias[o] + \sum_{g, i} values[o, g, i]\; input[b, g m + p(o, g, i)]\Bigr)

    with p(o, g, i) the place of the i-th kept element of group g. Sums are float32; the result is rounded once. On the
    CPU the weight is unpacked for torch's own product where that was measured to be faster (:func:`tersor.backends`
    says where), which rounds before the activation too. Whether an element that is not finite reaches outputs that
    do not keep its place is left open.

    Args:
        input: ``(..., K)``; float16, bfloat16 or float32.
        values, index, n, m: from :func:`nm_pack`, for a weight ``(O, K)`` of the input's dtype.
        bias: ``(O,)``, of the input's dtype.
        activation: ``"none"``, ``"relu"`` or ``"gelu"`` (the exact one).

    Returns:
        ``(..., O)``, contiguous, of the input's dtype. Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "nm_matmul"
    n, m = check_packed(name, values, index, n, m)
    columns = values.shape[1] * m
    check_floating(name, input=input)
    if not input.dim() or input.shape[-1] != columns:
        raise ValueError(f"{name}: input must be (..., {columns}) for this weight, got shape {tuple(input.shape)}")
    check_operands(name, input, values, bias, activation)
    if dense_is_faster("linear", input, n, m, math.prod(input.shape[:-1])):
        return ACTIVATIONS[activation](F.linear(input, nm_unpack(values, index, n, m), bias))
    return _nm_matmul.overload(input, values, index, bias, n, m, activation)


def check_operands(where: str, input: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> None:
    """Dtypes, devices, bias and activation of a product whose input and values fit each other."""
    if not is_autocast_enabled(input.device.type):  # which makes them the same
        if input.dtype not in DTYPES:
            raise TypeError(f"{where}: input must be float16, bfloat16 or float32, got {input.dtype}")
        if values.dtype != input.dtype:
            raise TypeError(f"{where}: values must have the dtype of input {input.dtype}, got {values.dtype}")
    if values.device != input.device:
        raise ValueError(f"{where}: values must be on the device of input {input.device}, got {values.device}")
    if bias is not None:
        check_floating(where, bias=bias)
        if tuple(bias.shape) != values.shape[:1]:
            raise ValueError(f"{where}: bias must have shape ({values.shape[0]},), got {tuple(bias.shape)}")
        if bias.dtype != values.dtype or bias.device != values.device:
            raise TypeError(
                f"{where}: bias must have the dtype and device of values, {values.dtype} on {values.device}, "
                f"got {bias.dtype} on {bias.device}"
            )
    check_activation(where, activation)


def check_activation(where: str, activation: Any) -> str:
    """The activation; raises unless it is one that the products compute."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def _reference(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, n: int, m: int, activation: str
) -> Tensor:
    weight = unpack_rows(values, index, n, m).float()
    output = F.linear(input.float(), weight, None if bias is None else bias.float())
    return ACTIVATIONS[activation](output).to(input.dtype)


def _fake(input: Tensor, values: Tensor, *_: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], values.shape[0]))


def _vmap(info: Any, in_dims: Any, input: Tensor, *args: Any) -> tuple[Tensor, int]:
    if all(d is None for d in in_dims[1:]):  # one more dimension of the batch
        return _nm_matmul.overload(input.movedim(in_dims[0], 0), *args), 0
    mapped = [
        a.unbind(d) if isinstance(d, int) else [a] * info.batch_size
        for a, d in zip((input, *args), in_dims, strict=True)
    ]
    return torch.stack([_nm_matmul.overload(*each) for each in zip(*mapped, strict=True)]), 0


_nm_matmul = operator(
    "nm_matmul(Tensor input, Tensor values, Tensor index, Tensor? bias, int n, int m, str activation) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    autocast=True,
    notes=notes("linear"),
)
