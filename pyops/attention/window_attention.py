"""Shifted-window attention by index arithmetic: Swin (arXiv 2103.14030), Uformer (2106.03106), PSLT (2304.03481)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, one_by_one, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating, check_pair, check_same
from tersor._operator import autocast_tensors, call_function, operator


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    r"""Attention within the windows of a map that may be shifted cyclically, without rolling or partitioning it.

    With :math:`(s_y, s_x)` = ``shift``, the windows tile the map whose position :math:`(r, c)` holds the token
    :math:`((r + s_y) \bmod H, (c + s_x) \bmod W)`, that is, the map rolled by ``-shift``. Within a window, for a query
    :math:`a` and a key :math:`b` at the places :math:`(y, x)` in it,

    .. math:: o_a = \sum_b \mathrm{softmax}_b(l_{ab}) \, v_b, \qquad
        l_{ab} = \mathrm{scale} \cdot \langle q_a, k_b \rangle
        + \mathrm{bias}[(y_a - y_b + h - 1) (2 w - 1) + x_a - x_b + w - 1]
        + m \cdot (\mathrm{cut}_{ab} + \mathrm{mask}_{ab})

    where :math:`h, w` is the window's size and :math:`m` is ``mask_value``. :math:`\mathrm{cut}_{ab}` is 1 where the
    shift has carried one of the two tokens round an edge of the map and not the other (Swin's mask; for a negative
    shift that of PSLT's other direction), else 0.

    Args:
        query, key, value: ``(B, H, W, heads, head_dim)``, float16, bfloat16, float32 or float64, same shape, dtype and
            device. Any strides: views of a fused projection need no copy.
        window_size: rows and columns of a window (one int for both); H and W must be multiples of them.
        shift: rows and columns (one int for both), each nearer to 0 than the window's size; positive as Swin's
            ``shift_size``, negative the other way round.
        position_bias: ``((2 h - 1) * (2 w - 1), heads)``, any floating dtype, trainable; its gradient is summed in an
            order that depends on the shapes alone.
        mask: bool, either of tokens, ``(1 or B, H, W)`` in the map's own order, where a pair counts as masked if
            **both** its tokens are True (Uformer's rule: True is outside of the picture); or of pairs,
            ``(1 or B, windows, h * w, h * w)`` with windows in row-major order of the rolled map, queries first.
        mask_value: what a cut and a mask add to the logit, each; finite, so that rows that are masked as a whole stay
            as they are.
        scale: factor on the scores; ``None`` means ``head_dim ** -0.5``.

    Returns:
        ``(B, H, W, heads, head_dim)``, contiguous, in the inputs' dtype (under autocast: the autocast dtype).
        Accumulation and softmax are in float32 (float64 for float64). Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type, or the dtypes differ or are not floating point.
        ValueError: shapes or devices differ, H or W is not a multiple of the window, or a shift reaches the window's
            size.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030.
    """
    name = "window_attention"
    check_floating(name, query=query, key=key, value=value)
    if query.dim() != 5:
        raise ValueError(f"{name}: query must be (B, H, W, heads, head_dim), got shape {tuple(query.shape)}")
    check_same(name, query=query, key=key, value=value)
    return _attend(name, [1, 1, 1], (query, key, value), window_size, shift, position_bias, mask, mask_value, scale)


def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`window_attention` of a fused projection, whose gradient is written in place of three to be stacked.

    Args:
        qkv: ``(B, H, W, 3, heads, head_dim)`` with query, key and value along dimension 3.
        window_size, shift, position_bias, mask, mask_value, scale: as for :func:`window_attention`.

    Returns:
        ``(B, H, W, heads, head_dim)``.

    Raises:
        TypeError, ValueError: as :func:`window_attention`, and if dimension 3 of ``qkv`` is not of size 3.
    """
    name = "window_attention_qkvpacked"
    _check_packed(name, qkv=qkv, parts=3)
    return _attend(name, [3], (qkv, None, None), window_size, shift, position_bias, mask, mask_value, scale)


def window_attention_qkpacked(
    qk: Tensor,
    value: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`window_attention` with a fused projection of query and key, and given values, as in PSLT's ladder.

    Args:
        qk: ``(B, H, W, 2, heads, head_dim)`` with query and key along dimension 3.
        value: ``(B, H, W, heads, head_dim)``.
        window_size, shift, position_bias, mask, mask_value, scale: as for :func:`window_attention`.

    Returns:
        ``(B, H, W, heads, head_dim)``.

    Raises:
        TypeError, ValueError: as :func:`window_attention`, and if dimension 3 of ``qk`` is not of size 2.
    """
    name = "window_attention_qkpacked"
    _check_packed(name, qk=qk, parts=2)
    check_floating(name, value=value)
    check_same(name, query=qk.select(3, 0), value=value)
    return _attend(name, [2, 1], (qk, value, None), window_size, shift, position_bias, mask, mask_value, scale)


def window_attention_kvpacked(
    query: Tensor,
    kv: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = (0, 0),
    position_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask_value: float = -100.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`window_attention` with a fused projection of key and value, as in Uformer.

    Args:
        query: ``(B, H, W, heads, head_dim)``.
        kv: ``(B, H, W, 2, heads, head_dim)`` with key and value along dimension 3.
        window_size, shift, position_bias, mask, mask_value, scale: as for :func:`window_attention`.

    Returns:
        ``(B, H, W, heads, head_dim)``.

    Raises:
        TypeError, ValueError: as :func:`window_attention`, and if dimension 3 of ``kv`` is not of size 2.
    """
    name = "window_attention_kvpacked"
    check_floating(name, query=query)
    _check_packed(name, kv=kv, parts=2)
    check_same(name, query=query, key=kv.select(3, 0))
    return _attend(name, [1, 2], (query, kv, None), window_size, shift, position_bias, mask, mask_value, scale)


def _check_packed(name: str, *, parts: int, **argument: Tensor) -> None:
    check_floating(name, **argument)
    ((argument_name, tensor),) = argument.items()
    if tensor.dim() != 6 or tensor.shape[3] != parts:
        raise ValueError(
            f"{name}: {argument_name} must be (B, H, W, {parts}, heads, head_dim), got shape {tuple(tensor.shape)}"
        )


def _attend(
    name: str,
    packs: list[int],
    tensors: tuple[Tensor | None, ...],
    window_size: int | Sequence[int],
    shift: int | Sequence[int],
    position_bias: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
    scale: float | None,
) -> Tensor:
    """The checks that are common to all packings, and the call; of each pack, ``packs`` says how many it holds."""
    query = tensors[0]
    assert query is not None
    shape = query.shape if packs[0] == 1 else (*query.shape[:3], *query.shape[4:])  # no view: autograd would record it
    window_size, shift = check_window_options(name, shape, window_size, shift)
    for option, number in (("mask_value", mask_value), ("scale", scale)):
        if number is None and option == "scale":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name}: {option} must be a number, got {type(number).__name__}")
        if not abs(number) < math.inf:  # math.isfinite cannot be traced
            raise ValueError(f"{name}: {option} must be finite, got {number}")
    if position_bias is not None:
        _check_bias(name, position_bias, shape[3], query.device, window_size)
    if mask is not None:
        _check_mask(name, mask, shape, query.device, window_size)
    floating = [t for t in (*tensors, position_bias) if t is not None]
    cast = iter(autocast_tensors(query.device.type, *floating))
    first, second, third, bias = (None if t is None else next(cast) for t in (*tensors, position_bias))
    scale = shape[-1] ** -0.5 if scale is None else float(scale)
    options = (window_size, shift, float(mask_value), scale, packs)
    return call_function(_WindowAttention, first, second, third, bias, mask, *options)[0]


def check_window_options(
    name: str, shape: Sequence[int], window_size: int | Sequence[int], shift: int | Sequence[int]
) -> tuple[list[int], list[int]]:
    """Both as two ints that fit a map of shape ``(B, H, W, heads, head_dim)``."""
    window = check_pair(name, "window_size", window_size, 1)
    if isinstance(shift, (str, bytes)) or not isinstance(shift, (int, Sequence)):
        raise TypeError(f"{name}: shift must be an int or two ints, got {type(shift).__name__}")
    shifts = [as_int(name, shift=s) for s in ([shift, shift] if isinstance(shift, int) else shift)]
    if len(shifts) != 2 or any(abs(s) >= w for s, w in zip(shifts, window, strict=True)):
        raise ValueError(
            f"{name}: shift must be an int or two ints nearer to 0 than the window's size {tuple(window)}, got {shift}"
        )
    for axis, size in zip(("H", "W", "heads", "head_dim"), shape[1:], strict=True):
        if size < 1:
            raise ValueError(f"{name}: {axis} must be at least 1, got shape {tuple(shape)}")
    for axis, size, extent in zip(("H", "W"), shape[1:3], window, strict=True):
        if size % extent:
            raise ValueError(f"{name}: {axis} ({size}) must be a multiple of the window's size ({extent})")
    return window, shifts


def _check_bias(name: str, position_bias: Tensor, heads: int, device: torch.device, window: Sequence[int]) -> None:
    check_floating(name, position_bias=position_bias)
    expected = ((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    if tuple(position_bias.shape) != expected:
        raise ValueError(
            f"{name}: position_bias must be ((2 h - 1) * (2 w - 1), heads) = {expected} for a window of "
            f"{window[0]} x {window[1]}, got shape {tuple(position_bias.shape)}"
        )
    if position_bias.device != device:
        raise ValueError(f"{name}: position_bias must be on the device of query {device}, got {position_bias.device}")


def _check_mask(name: str, mask: Tensor, shape: Sequence[int], device: torch.device, window: Sequence[int]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: mask must be a bool tensor, got {got}")
    batch, height, width = shape[:3]
    tokens = window[0] * window[1]
    expected = (height, width) if mask.dim() == 3 else (height * width // tokens, tokens, tokens)
    if mask.dim() not in (3, 4) or mask.shape[0] not in (1, batch) or tuple(mask.shape[1:]) != expected:
        raise ValueError(
            f"{name}: mask must be (1 or {batch}, {height}, {width}) or (1 or {batch}, "
            f"{height * width // tokens}, {tokens}, {tokens}), got shape {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"{name}: mask must be on the device of query {device}, got {mask.device}")


def _unpack(tensors: Sequence[Tensor | None], packs: Sequence[int]) -> list[Tensor]:
    """Query, key and value as views of the packs that hold them."""
    parts: list[Tensor] = []
    for tensor, count in zip(tensors, packs, strict=False):
        assert tensor is not None
        parts += [tensor] if count == 1 else tensor.unbind(3)
    return parts


def _pack(flat: Tensor, like: Tensor, packs: Sequence[int]) -> list[Tensor]:
    """The three gradients in the packs' own shapes, as views of the backward operator's flat result."""
    tensors, start = [], 0
    for count in packs:
        part = flat.narrow(0, start, count * like.numel())
        shape = like.shape if count == 1 else (*like.shape[:3], count, *like.shape[3:])
        tensors.append(part.view(shape))
        start += count * like.numel()
    return tensors


def _partition(tensor: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """``(B, H, W, ...)`` to ``(B, windows, h * w, ...)`` of the map rolled by ``-shift``."""
    rolled = tensor.roll((-shift[0], -shift[1]), (1, 2))
    height, width = tensor.shape[1:3]
    tiles = rolled.unflatten(2, (width // window[1], window[1])).unflatten(1, (height // window[0], window[0]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _merge(windows: Tensor, height: int, width: int, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """The inverse of :func:`_partition`."""
    tiles = windows.unflatten(2, tuple(window)).unflatten(1, (height // window[0], width // window[1]))
    return tiles.transpose(2, 3).flatten(3, 4).flatten(1, 2).roll((shift[0], shift[1]), (1, 2))


def bias_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Row of the bias table for each query and key of a window: ``(h * w, h * w)``, int64."""
    y, x = (torch.arange(size, device=device) for size in window)
    rows = (y[:, None] - y + window[0] - 1) * (2 * window[1] - 1)  # [h, h]
    columns = x[:, None] - x + window[1] - 1  # [w, w]
    return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(window[0] * window[1], -1)


def _wrapped(size: int, shift: int, device: torch.device) -> Tensor:
    """Which positions of the rolled map hold a token that came round its edge."""
    places = torch.arange(size, device=device) + shift
    return (places < 0) | (places >= size)


def _added(
    query: Tensor, mask: Tensor | None, window: Sequence[int], shift: Sequence[int], mask_value: float
) -> Tensor | float:
    """What cuts and masks add to the logits, ``(1 or B, windows, 1, h * w, h * w)``; 0 where there are none."""
    height, width = query.shape[1:3]
    added: Tensor | float = 0.0
    if any(shift):
        rows, columns = (_wrapped(n, s, query.device) for n, s in zip((height, width), shift, strict=True))
        region = (2 * rows[:, None].long() + columns)[None]  # [1, H, W]
        region = _partition(region, window, (0, 0))  # [1, windows, N]
        added = added + mask_value * (region[..., :, None] != region[..., None, :])
    if mask is not None:
        if mask.dim() == 3:
            outside = _partition(mask, window, shift)
            mask = outside[..., :, None] & outside[..., None, :]
        added = added + mask_value * mask
    return added.unsqueeze(2) if isinstance(added, Tensor) else added


def _logits(
    query: Tensor,
    key: Tensor,
    position_bias: Tensor | None,
    added: Tensor | float,
    window: Sequence[int],
    scale: float,
) -> Tensor:
    """``(B, windows, heads, queries, keys)`` from partitioned query and key ``(B, windows, heads, N, head_dim)``."""
    logits = scale * (query @ key.transpose(-1, -2))
    if position_bias is not None:
        index = bias_index(window, query.device)
        logits = logits + position_bias.to(logits.dtype)[index].permute(2, 0, 1)
    return logits + added


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    mask: Tensor | None,
    window_size: Sequence[int],
    shift: Sequence[int],
    mask_value: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    height, width = query.shape[1:3]
    exact = accumulate_dtype(query.dtype)
    q, k, v = (_partition(t.to(exact), window_size, shift).transpose(2, 3) for t in (query, key, value))
    added = _added(query, mask, window_size, shift, mask_value)
    logits = _logits(q, k, position_bias, added, window_size, scale)
    largest = logits.amax(-1)  # torch.logsumexp would give inf where softmax gives NaN
    logsumexp = largest + (logits - largest.unsqueeze(-1)).exp().sum(-1).log()
    output = _merge((logits.softmax(-1) @ v).transpose(2, 3), height, width, window_size, shift)
    logsumexp = _merge(logsumexp.transpose(2, 3), height, width, window_size, shift)
    return output.to(query.dtype).contiguous(), logsumexp.permute(0, 3, 1, 2).contiguous()


def _reference_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_bias: Tensor | None,
    mask: Tensor | None,
    logsumexp: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int],
    mask_value: float,
    scale: float,
    packs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    height, width = query.shape[1:3]
    exact = accumulate_dtype(query.dtype)
    tensors = (grad_output, query, key, value)
    g, q, k, v = (_partition(t.to(exact), window_size, shift).transpose(2, 3) for t in tensors)
    lse = _partition(logsumexp.permute(0, 2, 3, 1), window_size, shift).transpose(2, 3)
    added = _added(query, mask, window_size, shift, mask_value)
    weights = (_logits(q, k, position_bias, added, window_size, scale) - lse.unsqueeze(-1)).exp()
    grad_weights = g @ v.transpose(-1, -2)
    # The sum is <grad_output, output>, but the output has been rounded.
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    parts = (scale * grad_logits @ k, scale * grad_logits.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g)
    maps = [_merge(part.transpose(2, 3), height, width, window_size, shift) for part in parts]
    packed, taken = [], 0
    for count in packs:
        packed.append(torch.stack(maps[taken : taken + count], 3).to(query.dtype).reshape(-1))
        taken += count
    if position_bias is None:
        return torch.cat(packed), query.new_empty(0)
    table = grad_logits.new_zeros(position_bias.shape)
    each = grad_logits.sum((0, 1)).permute(1, 2, 0).flatten(0, 1)  # [N * N, heads]
    table.index_add_(0, bias_index(window_size, query.device).flatten(), each)
    return torch.cat(packed), table.to(position_bias.dtype)


def _fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(
        (batch, heads, height, width), dtype=accumulate_dtype(query.dtype)
    )


def _fake_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    table = query.new_empty(0) if position_bias is None else position_bias.new_empty(position_bias.shape)
    return query.new_empty(3 * query.numel()), table


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    if in_dims[3] is not None or in_dims[4] is not None:
        return one_by_one(_WindowAttention.apply, info, in_dims, args)
    tensors = [None if t is None else fold(t, d, info.batch_size) for t, d in zip(args[:3], in_dims[:3], strict=True)]
    mask = args[4]
    if mask is not None and mask.shape[0] > 1:
        mask = fold(mask, None, info.batch_size)
    output, logsumexp = _WindowAttention.apply(*tensors, args[3], mask, *args[5:])
    return (unfold(output, info), unfold(logsumexp, info)), (0, 0)


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return one_by_one(_forward.overload, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return one_by_one(_backward.overload, info, in_dims, args)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(first, second, third, position_bias, mask, window_size, shift, mask_value, scale, packs):
        query, key, value = _unpack((first, second, third), packs)
        return _forward(query, key, value, position_bias, mask, window_size, shift, mask_value, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, window_size, shift, mask_value, scale, packs = inputs
        ctx.options, ctx.packs = (window_size, shift, mask_value, scale), packs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad_output, _):
        *packed, position_bias, mask, logsumexp = ctx.saved_tensors
        qkv = _unpack(packed, ctx.packs)
        flat, table = _backward(grad_output, *qkv, position_bias, mask, logsumexp, *ctx.options, ctx.packs)
        gradients: list[Tensor | None] = [*_pack(flat, qkv[0], ctx.packs), None, None]
        return *gradients[:3], None if position_bias is None else table, None, None, None, None, None, None

    vmap = staticmethod(_vmap)


def _derivative(*args: Any) -> tuple[Tensor, Tensor]:
    return _WindowAttention.apply(*args, [1, 1, 1])


_forward = operator(
    "window_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? position_bias, Tensor? mask,"
    " int[] window_size, int[] shift, float mask_value, float scale) -> (Tensor output, Tensor logsumexp)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap_forward,
    derivative=_derivative,
    autocast=True,
)
_backward = operator(
    "window_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? position_bias,"
    " Tensor? mask, Tensor logsumexp, int[] window_size, int[] shift, float mask_value, float scale,"
    " int[] packs) -> (Tensor grad_qkv, Tensor grad_position_bias)",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
