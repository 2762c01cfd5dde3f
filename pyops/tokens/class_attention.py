"""Self-attention that also tells how much the class token attends to every other one, without the matrix in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._batching import fold, unfold
from tersor._checks import accumulate_dtype, check_floating, check_same, check_share
from tersor._operator import operator
from tersor.attention.window_attention import window_attention, window_attention_qkvpacked


def class_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    r"""Self-attention over a sequence that begins with a class token, and that token's attention to the others.

    .. math:: A_h = \mathrm{softmax}(\mathrm{scale} \cdot Q_h K_h^T), \quad O_h = A_h V_h, \quad
        s_j = \frac{1}{H} \sum_h A_h[0, 1 + j]

    Args:
        query, key, value: ``(B, n, heads, head_dim)``, float16, bfloat16, float32 or float64, any strides; n >= 2.
        scale: factor on the scores; None means ``head_dim ** -0.5``.

    Returns:
        ``(B, n, heads, head_dim)``, and the scores s, ``(B, n - 1)``, float32 (float64 for float64), heads added up in
        ascending order. The output is differentiable once on the CPU; the scores carry no gradient.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices differ, or n is less than 2.

    Source: the token choice of Liang et al., EViT, arXiv 2202.07800, and of Lin et al., SuperViT, arXiv 2205.11397.
    """
    name = "class_attention"
    _check(name, query=query, key=key, value=value)
    return _attend(query, key, value, scale), _checked_scores(name, query, key, None, 0.0, scale)


def class_attention_ema(
    query: Tensor, key: Tensor, value: Tensor, average: Tensor | None, decay: float = 0.99, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""As :func:`class_attention`, with the scores averaged over layers: ``decay * average + (1 - decay) * s``.

    Args:
        query, key, value, scale: as for :func:`class_attention`.
        average: ``(B, n - 1)``, what the layer before returned; None stands for zeros.
        decay: from 0 to 1.

    Returns:
        The attention output and the new average.

    Raises:
        TypeError, ValueError: as :func:`class_attention`; ``average`` or ``decay`` does not fit.

    Source: Chen et al., "CF-ViT", arXiv 2203.03821 (global class attention).
    """
    name = "class_attention_ema"
    _check(name, query=query, key=key, value=value)
    scores = _checked_scores(name, query, key, average, decay, scale)
    return _attend(query, key, value, scale), scores


def class_attention_qkvpacked(
    qkv: Tensor, average: Tensor | None = None, decay: float = 0.0, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`class_attention_ema` of a fused projection ``(B, n, 3, heads, head_dim)``, by default without averaging.

    Raises:
        TypeError, ValueError: as :func:`class_attention_ema`, and if dimension 2 of ``qkv`` is not of size 3.
    """
    name = "class_attention_qkvpacked"
    check_floating(name, qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{name}: qkv must be (B, n, 3, heads, head_dim), got shape {tuple(qkv.shape)}")
    query, key, value = qkv.unbind(2)
    _check(name, query=query, key=key, value=value)
    scores = _checked_scores(name, query, key, average, decay, scale)
    return attend_qkvpacked(qkv, scale), scores


def class_scores(
    query: Tensor, key: Tensor, average: Tensor | None = None, decay: float = 0.0, scale: float | None = None
) -> Tensor:
    """The scores of :func:`class_attention_ema` alone, for an attention that is computed elsewhere.

    Args:
        query, key: ``(B, n, heads, head_dim)``; of ``query`` only the class token's row is read.
        average, decay, scale: as for :func:`class_attention_ema`.

    Returns:
        ``(B, n - 1)``, float32 (float64 for float64), without a gradient.

    Raises:
        TypeError, ValueError: as :func:`class_attention_ema`.

    Source: Chen et al., arXiv 2203.03821.
    """
    name = "class_scores"
    _check(name, query=query, key=key)
    return _checked_scores(name, query, key, average, decay, scale)


def _checked_scores(
    name: str, query: Tensor, key: Tensor, average: Tensor | None, decay: float, scale: float | None
) -> Tensor:
    check_share(name, decay=decay)
    if average is not None:
        check_floating(name, average=average)
        shape, dtype = (query.shape[0], query.shape[1] - 1), accumulate_dtype(query.dtype)
        if average.shape != shape:
            raise ValueError(f"{name}: average must be {shape} for this query, got shape {tuple(average.shape)}")
        if average.dtype != dtype:
            raise TypeError(f"{name}: average must be {dtype} for this query, got {average.dtype}")
        if average.device != query.device:
            raise ValueError(f"{name}: average must be on the device of query {query.device}, got {average.device}")
        average = average.detach()
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    return _scores.without_gradient(query.detach()[:, 0], key.detach(), average, scale, float(decay))


def mean_heads(rows: Tensor) -> Tensor:
    """``(B, heads, n)`` to ``(B, n)``: heads are added in ascending order, then divided, which decides equality."""
    total = rows[:, 0]
    for head in range(1, rows.shape[1]):
        total = total + rows[:, head]
    return total / rows.shape[1]


def _check(name: str, **tensors: Tensor) -> None:
    check_floating(name, **tensors)
    (first_name, first), *_ = tensors.items()
    if first.dim() != 4 or first.shape[1] < 2 or min(first.shape[2:]) < 1:
        raise ValueError(
            f"{name}: {first_name} must be (B, n, heads, head_dim) with n of at least 2, got shape {tuple(first.shape)}"
        )
    check_same(name, **tensors)


def attend_qkvpacked(qkv: Tensor, scale: float | None = None) -> Tensor:
    """The output of :func:`class_attention_qkvpacked` alone, where no scores are needed."""
    if _by_window(qkv):
        return window_attention_qkvpacked(qkv[:, None], (1, qkv.shape[1]), scale=scale)[:, 0]
    query, key, value = qkv.unbind(2)
    return _attend(query, key, value, scale)


def _by_window(query: Tensor) -> bool:
    return query.device.type != "cuda"


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """On the CPU the whole sequence as one window, which is faster than torch's; on a GPU torch's own."""
    if _by_window(query):
        rows = query[:, None], key[:, None], value[:, None]
        return window_attention(*rows, (1, query.shape[1]), scale=scale)[:, 0]
    heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)


def _reference(query: Tensor, key: Tensor, average: Tensor | None, scale: float, decay: float) -> Tensor:
    dtype = accumulate_dtype(query.dtype)
    # Not a matrix product, whose arguments and result autocast would round.
    products = (query.to(dtype)[:, None] * scale * key.to(dtype)).sum(3).transpose(1, 2)
    now = mean_heads(torch.softmax(products, 2)[..., 1:])
    if average is None:
        return ((1 - decay) * now).contiguous()
    return (decay * average + (1 - decay) * now).contiguous()


def _fake(query: Tensor, key: Tensor, average: Any, scale: float, decay: float) -> Tensor:
    return key.new_empty((key.shape[0], key.shape[1] - 1), dtype=accumulate_dtype(key.dtype))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    query, key, average = (
        None if t is None else fold(t, d, info.batch_size) for t, d in zip(args[:3], in_dims[:3], strict=True)
    )
    return unfold(_scores.overload(query, key, average, *args[3:]), info), 0


_scores = operator(
    "class_scores(Tensor query, Tensor key, Tensor? average, float scale, float decay) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
