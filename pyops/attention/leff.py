"""Uformer's locally enhanced feed-forward (LeFF, arXiv 2106.03106) without its hidden map in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._batching import fold, one_by_one, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating
from tersor._operator import autocast_tensors, call_function, operator


def leff(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None = None,
    hidden_shift: Tensor | None = None,
) -> Tensor:
    r"""Linear, GELU, depth-wise 3 x 3 convolution, GELU, Linear: a feed-forward that looks at its neighbours.

    .. math::
        u &= \mathrm{gelu}(W_1 x + b_1) \cdot \mathrm{scale} + \mathrm{shift} \\
        v_e[r, c] &= \mathrm{gelu}\Bigl(b_e + \sum_{i, j = 0}^{2} D_e[i, j] \, u_e[r + i - 1, c + j - 1]\Bigr) \\
        y &= W_2 v + b_2

    with the exact :math:`\mathrm{gelu}(t) = t \, \Phi(t)` and :math:`u = 0` outside of the map: the padding comes after
    activation and affine. Without ``hidden_scale`` this is Uformer's LeFF; with it PSLT's MLPlight in inference, whose
    first batch norm stands between the activation and the padding.

    Nothing of the hidden map's size is kept for the backward pass, which computes it again from the inputs.

    Args:
        input: ``(B, H, W, C)``, float16, bfloat16, float32 or float64, any strides.
        weight1, bias1: ``(E, C)`` and ``(E)`` or None, of the first linear layer.
        depthwise_weight, depthwise_bias: ``(E, 1, 3, 3)`` and ``(E)`` or None, of the convolution.
        weight2, bias2: ``(C_out, E)`` and ``(C_out)`` or None, of the second linear layer.
        hidden_scale, hidden_shift: ``(E)``, both or neither.

    All tensors have the input's dtype and device (under autocast: any floating dtype).

    Returns:
        ``(B, H, W, C_out)``, contiguous, in the inputs' dtype (under autocast: the autocast dtype). Accumulation is in
        float32 (float64 for float64). Differentiable once, for every tensor.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: a shape does not fit, devices differ, or one of ``hidden_scale`` and ``hidden_shift`` is missing.

    Source: Wang et al., "Uformer: A General U-Shaped Transformer for Image Restoration", arXiv 2106.03106.
    """
    name = "leff"
    named: dict[str, Any] = {
        "input": input, "weight1": weight1, "bias1": bias1, "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias, "weight2": weight2, "bias2": bias2, "hidden_scale": hidden_scale,
        "hidden_shift": hidden_shift,
    }  # fmt: skip
    optional = ("bias1", "depthwise_bias", "bias2", "hidden_scale", "hidden_shift")
    given = {key: t for key, t in named.items() if t is not None or key not in optional}
    check_floating(name, **given)
    _check_shapes(name, given)
    cast = dict(zip(given, autocast_tensors(input.device.type, *given.values()), strict=True))
    for key, tensor in cast.items():
        if tensor.dtype != cast["input"].dtype:
            raise TypeError(f"{name}: {key} must have the dtype of input {cast['input'].dtype}, got {tensor.dtype}")
    return call_function(_Leff, *(cast.get(key) for key in named))


class LeFF(nn.Module):
    """:func:`leff` with its parameters, under the names that Uformer's checkpoints use.

    Args:
        dim: channels of the input and of the output.
        hidden_dim: channels in between.

    ``forward(input, height=None, width=None)`` takes ``(B, H, W, dim)``, or tokens ``(B, H * W, dim)``, which need the
    sizes unless their number is a square, and returns the same shape.

    Raises:
        TypeError, ValueError: as :func:`leff`; sizes below 1; tokens that do not make up the map.

    Source: arXiv 2106.03106. ``state_dict``: ``linear1.0``, ``dwconv.0`` and ``linear2.0``.
    """

    weights_read_directly = ("linear1", "dwconv", "linear2")  # for tersor.compress

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        for key, size in (("dim", dim), ("hidden_dim", hidden_dim)):
            if as_int("LeFF", **{key: size}) < 1:
                raise ValueError(f"LeFF: {key} must be at least 1, got {size}")
        self.linear1 = nn.Sequential(nn.Linear(dim, hidden_dim))
        self.dwconv = nn.Sequential(nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim))
        self.linear2 = nn.Sequential(nn.Linear(hidden_dim, dim))

    def forward(self, input: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        shape = input.shape
        if input.dim() == 3:
            height, width = _map_size(shape, height, width)
            input = input.unflatten(1, (height, width))
        layers: list[Any] = [self.linear1[0], self.dwconv[0], self.linear2[0]]
        output = leff(input, *(tensor for layer in layers for tensor in (layer.weight, layer.bias)))
        return output.flatten(1, 2) if len(shape) == 3 else output


def _map_size(shape: Sequence[int], height: int | None, width: int | None) -> tuple[int, int]:
    if height is None and width is None:
        height = width = math.isqrt(shape[1])
    if height is None or width is None or height < 1 or height * width != shape[1]:
        raise ValueError(
            f"LeFF: height and width must multiply to the number of tokens, which must be a square where they are not "
            f"given; got height {height} and width {width} for shape {tuple(shape)}"
        )
    return height, width


def _check_shapes(name: str, given: dict[str, Tensor]) -> None:
    input, weight1, weight2 = given["input"], given["weight1"], given["weight2"]
    if input.dim() != 4:
        raise ValueError(f"{name}: input must be (B, H, W, C), got shape {tuple(input.shape)}")
    for axis, size in zip("HWC", input.shape[1:], strict=True):
        if size < 1:
            raise ValueError(f"{name}: {axis} must be at least 1, got shape {tuple(input.shape)}")
    channels = input.shape[3]
    if weight1.dim() != 2 or weight1.shape[0] < 1 or weight1.shape[1] != channels:
        raise ValueError(
            f"{name}: weight1 must be (E, C) with the {channels} channels of input, got shape {tuple(weight1.shape)}"
        )
    hidden = weight1.shape[0]
    if weight2.dim() != 2 or weight2.shape[0] < 1 or weight2.shape[1] != hidden:
        raise ValueError(
            f"{name}: weight2 must be (C_out, E) with the {hidden} rows of weight1, got shape {tuple(weight2.shape)}"
        )
    expected = {"depthwise_weight": (hidden, 1, 3, 3), "bias2": (weight2.shape[0],)}
    for key, tensor in given.items():
        shape = expected.get(key, (hidden,))
        if key not in ("input", "weight1", "weight2") and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {key} must be {shape}, got shape {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: {key} must be on the device of input {input.device}, got {tensor.device}")
    if ("hidden_scale" in given) != ("hidden_shift" in given):
        one, other = ("scale", "shift") if "hidden_scale" in given else ("shift", "scale")
        raise ValueError(f"{name}: hidden_{other} must be given where hidden_{one} is, got None")


def _widen(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else t.to(accumulate_dtype(t.dtype)) for t in tensors]


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(input.movedim(3, 1), weight, bias, padding=1, groups=input.shape[3]).movedim(1, 3)


def _affine(input: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return input if scale is None or shift is None else input * scale + shift


def _reference(input: Tensor, *parameters: Tensor | None) -> Tensor:
    x, w1, b1, dw, db, w2, b2, scale, shift = _widen((input, *parameters))
    u = _affine(F.gelu(F.linear(x, w1, b1)), scale, shift)
    v = F.gelu(_convolution(u, dw, db))
    return F.linear(v, w2, b2).to(input.dtype).contiguous()


def _reference_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    hidden_scale: Tensor | None,
    hidden_shift: Tensor | None,
    need_input: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    parameters = (
        weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale, hidden_shift,
    )  # fmt: skip
    g, x, w1, b1, dw, db, w2, _, scale, shift = _widen((grad_output, input, *parameters))
    hidden = w1.shape[0]
    gelu_backward, convolution_backward = torch.ops.aten.gelu_backward, torch.ops.aten.convolution_backward
    p1 = F.linear(x, w1, b1)
    a = F.gelu(p1)
    u = _affine(a, scale, shift)
    p2 = _convolution(u, dw, db)
    grad_p2 = gelu_backward(g @ w2, p2)
    grad_u, grad_dw, grad_db = convolution_backward(
        grad_p2.movedim(3, 1), u.movedim(3, 1), dw, [hidden], [1, 1], [1, 1], [1, 1], False, [0, 0], hidden,
        [True, need_parameters, need_parameters],
    )  # fmt: skip
    grad_u = grad_u.movedim(1, 3)
    grad_p1 = gelu_backward(grad_u if scale is None else grad_u * scale, p1)
    grad_input = (grad_p1 @ w1).to(input.dtype) if need_input else input.new_empty(0)
    if not need_parameters:
        return (grad_input, *(input.new_empty(0) for _ in parameters))

    def total(tensor: Tensor) -> Tensor:
        return tensor.sum((0, 1, 2))

    def outer(rows: Tensor, columns: Tensor) -> Tensor:
        return rows.flatten(0, 2).t() @ columns.flatten(0, 2)

    gradients = [
        outer(grad_p1, x),
        total(grad_p1),
        grad_dw,
        grad_db,
        outer(g, F.gelu(p2)),
        total(g),
        total(grad_u * a),
        total(grad_u),
    ]
    given = [
        input.new_empty(0) if p is None else t.to(input.dtype).contiguous()
        for t, p in zip(gradients, parameters, strict=True)
    ]
    return (grad_input, *given)


def _fake(input: Tensor, weight1: Tensor, bias1: Any, dw: Tensor, db: Any, weight2: Tensor, *args: Any) -> Tensor:
    return input.new_empty((*input.shape[:3], weight2.shape[0]))


def _fake_backward(grad_output: Tensor, input: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *parameters, need_input, need_parameters = args
    wanted = [input if need_input else None, *(p if need_parameters else None for p in parameters)]
    return tuple(input.new_empty(0 if t is None else t.shape) for t in wanted)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    if any(isinstance(d, int) for d in in_dims[1:]):
        return one_by_one(_Leff.apply, info, in_dims, args)
    folded = fold(args[0], in_dims[0], info.batch_size)
    return unfold(_Leff.apply(folded, *args[1:]), info), 0


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_forward.overload, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward.overload, info, in_dims, args)


class _Leff(torch.autograd.Function):
    @staticmethod
    def forward(input, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale, hidden_shift):
        return _forward(
            input, weight1, bias1, depthwise_weight, depthwise_bias, weight2, bias2, hidden_scale, hidden_shift
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad
        gradients = _backward(grad_output, *tensors, wanted[0], any(wanted[1:]))
        return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))

    vmap = staticmethod(_vmap)


_TENSORS = (
    "Tensor input, Tensor weight1, Tensor? bias1, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor weight2,"
    " Tensor? bias2, Tensor? hidden_scale, Tensor? hidden_shift"
)
_forward = operator(
    f"leff_forward({_TENSORS}) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_Leff.apply,
    autocast=True,
    notes=(
        "on the CPU in bfloat16, where the processor multiplies it (AVX512-BF16), torch's own products run from 64"
        " channels and 65536 hidden elements (B * H * W * E) on, and the hidden map is in memory during the call",
    ),
)
_backward = operator(
    f"leff_backward(Tensor grad_output, {_TENSORS}, bool need_input, bool need_parameters)"
    " -> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_depthwise_weight,"
    " Tensor grad_depthwise_bias, Tensor grad_weight2, Tensor grad_bias2, Tensor grad_hidden_scale,"
    " Tensor grad_hidden_shift)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
