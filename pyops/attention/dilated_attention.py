"""Multi-scale dilated sliding-window attention (MSDA) of DilateFormer, arXiv 2302.01791."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._batching import fold, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating, check_same
from tersor._operator import autocast_tensors, call_function, operator


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int = 3,
    dilation: int | Sequence[int] = (1, 2, 3),
    scale: float | None = None,
) -> Tensor:
    r"""Attention of each position to a dilated ``kernel_size`` x ``kernel_size`` grid of keys around itself.

    The heads are divided into ``len(dilation)`` equal groups of consecutive heads; head :math:`h` uses
    ``dilation[h // (heads // len(dilation))]``. For a query at :math:`n` and the tap offsets
    :math:`\delta_t \in \{-p, -p + d, \dots, p\}^2` with :math:`p = d (K - 1) / 2`,

    .. math:: o_n = \sum_t \frac{\exp(s_t)}{\sum_u \exp(s_u)} \, v_{n + \delta_t},
        \qquad s_t = \mathrm{scale} \cdot \langle q_n, k_{n + \delta_t} \rangle .

    Taps outside the image have :math:`k = v = 0`: their score is 0 and **they take part in the softmax**, as in the
    published model. (Masking them out, or moving the window inwards, computes a different function.)

    Args:
        query, key, value: ``(B, H, W, heads, head_dim)``, float16, bfloat16, float32 or float64, same shape, dtype
            and device. Any strides: views of one fused ``(B, H, W, 3, heads, head_dim)`` projection need no copy.
        kernel_size: taps per axis, from 1 to 1023. Working memory grows with its square; where a window would need
            more than 2 GiB a thread, the CPU kernel raises a RuntimeError instead.
        dilation: distance between taps, one per group of heads (or one int for all);
            ``dilation * (kernel_size - 1)`` must be even.
        scale: factor on the scores; ``None`` or 0 means ``head_dim ** -0.5``.

    Returns:
        ``(B, H, W, heads, head_dim)``, contiguous, in the inputs' dtype (under autocast: the autocast dtype).
        Accumulation and softmax are in float32 (float64 for float64). Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type, or the dtypes differ or are not floating point.
        ValueError: shapes or devices differ, a size is zero where it must not be, or the heads, dilations and
            kernel size do not fit each other.

    Source: Jiao et al., "DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition", arXiv 2302.01791.
    """
    _check_tensors(query=query, key=key, value=value)
    kernel_size, dilation, scale = _check_options(query.shape, kernel_size, dilation, scale)
    query, key, value = autocast_tensors(query.device.type, query, key, value)
    return call_function(_DilatedAttention, query, key, value, kernel_size, dilation, scale)[0]


def dilated_attention_qkvpacked(
    qkv: Tensor,
    kernel_size: int = 3,
    dilation: int | Sequence[int] = (1, 2, 3),
    scale: float | None = None,
) -> Tensor:
    """:func:`dilated_attention` of a fused projection, whose gradient is written in place of three to be stacked.

    Args:
        qkv: ``(B, H, W, 3, heads, head_dim)`` with query, key and value along dimension 3.
        kernel_size, dilation, scale: as for :func:`dilated_attention`.

    Returns:
        ``(B, H, W, heads, head_dim)``.

    Raises:
        TypeError, ValueError: as :func:`dilated_attention`, and if dimension 3 of ``qkv`` is not of size 3.
    """
    check_floating("dilated_attention_qkvpacked", qkv=qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(
            f"dilated_attention_qkvpacked: qkv must be (B, H, W, 3, heads, head_dim), got shape {tuple(qkv.shape)}"
        )
    kernel_size, dilation, scale = _check_options(qkv.select(3, 0).shape, kernel_size, dilation, scale)
    (qkv,) = autocast_tensors(qkv.device.type, qkv)
    return call_function(_DilatedAttentionPacked, qkv, kernel_size, dilation, scale)[0]


class DilatedAttention(nn.Module):
    """Self-attention block with :func:`dilated_attention` between a fused projection and an output projection.

    The parameters carry the names and shapes of the published model: ``qkv`` is a 1x1 convolution
    (``qkv.weight``: ``(3 * dim, dim, 1, 1)``), ``proj`` a linear layer with bias.

    Args:
        dim: channels C.
        num_heads: heads, a multiple of ``len(dilation)`` and a divisor of ``dim``.
        qkv_bias: whether the fused projection has a bias.
        qk_scale: factor on the scores; ``None`` or 0 means ``(dim // num_heads) ** -0.5``.
        attn_drop: must be 0, as in all published models: the fused kernels keep no attention matrix to drop from.
        proj_drop: dropout after the output projection.
        kernel_size, dilation: as for :func:`dilated_attention`.

    Shape:
        input and output ``(B, H, W, dim)``; the input is left as it is.

    Raises:
        TypeError, ValueError: the options do not fit each other.

    Source: Jiao et al., arXiv 2302.01791.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernel_size: int = 3,
        dilation: int | Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        dim, num_heads = as_int("DilatedAttention", dim=dim), as_int("DilatedAttention", num_heads=num_heads)
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"DilatedAttention: dim ({dim}) must be a positive multiple of num_heads ({num_heads})")
        if attn_drop != 0:
            raise ValueError(f"DilatedAttention: attn_drop must be 0 (no attention matrix is kept), got {attn_drop}")
        self.num_heads = num_heads
        self.kernel_size, self.dilation, self.scale = _check_options(
            (1, 1, 1, num_heads, dim // num_heads), kernel_size, dilation, qk_scale
        )
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        batch, height, width, dim = input.shape
        qkv = F.linear(input, self.qkv.weight.flatten(1), self.qkv.bias)
        qkv = qkv.view(batch, height, width, 3, self.num_heads, dim // self.num_heads)
        output = dilated_attention_qkvpacked(qkv, self.kernel_size, self.dilation, self.scale)
        return self.proj_drop(self.proj(output.flatten(3)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_floating("dilated_attention", query=query, key=key, value=value)
    if query.dim() != 5:
        raise ValueError(f"dilated_attention: query must be (B, H, W, heads, head_dim), got shape {tuple(query.shape)}")
    check_same("dilated_attention", query=query, key=key, value=value)


def _check_options(
    shape: Sequence[int], kernel_size: int, dilation: int | Sequence[int], scale: float | None
) -> tuple[int, list[int], float]:
    """The options as the operators take them: whole numbers, a list of dilations, the scale written out."""
    name = "dilated_attention"
    _, height, width, heads, head_dim = shape
    kernel_size = as_int(name, kernel_size=kernel_size)
    if isinstance(dilation, (str, bytes)) or not isinstance(dilation, (int, Sequence)):
        raise TypeError(f"{name}: dilation must be an int or a sequence of ints, got {type(dilation).__name__}")
    dilation = [as_int(name, dilation=d) for d in ([dilation] if isinstance(dilation, int) else dilation)]
    if not 1 <= kernel_size <= 1023:  # a million taps: far beyond use, and within 32-bit arithmetic
        raise ValueError(f"{name}: kernel_size must be at least 1 and at most 1023, got {kernel_size}")
    if not dilation:
        raise ValueError(f"{name}: dilation must name at least one dilation, got none")
    for d in dilation:
        if d < 1:
            raise ValueError(f"{name}: every dilation must be at least 1, got {dilation}")
        if d * (kernel_size - 1) % 2:
            raise ValueError(
                f"{name}: dilation * (kernel_size - 1) must be even so that the window has a centre, "
                f"got dilation {d} with kernel_size {kernel_size}"
            )
    if heads < 1 or heads % len(dilation):
        raise ValueError(
            f"{name}: heads ({heads}) must be a positive multiple of the number of dilations ({len(dilation)})"
        )
    for axis, size in (("H", height), ("W", width), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name}: {axis} must be at least 1, got shape {tuple(shape)}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"{name}: scale must be a number or None, got {type(scale).__name__}")
    return kernel_size, dilation, float(scale or head_dim**-0.5)


def _taps(padded: Tensor, kernel_size: int, dilation: int, height: int, width: int) -> Tensor:
    """The ``(taps, B, H, W, heads, head_dim)`` neighbours of every position in a zero-padded map."""
    offsets = [i * dilation for i in range(kernel_size)]
    return torch.stack([padded[:, y : y + height, x : x + width] for y in offsets for x in offsets])


def _reference(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    height, width = query.shape[1:3]
    exact = accumulate_dtype(query.dtype)
    outputs, logsumexps = [], []
    groups = (tensor.to(exact).chunk(len(dilation), dim=3) for tensor in (query, key, value))
    for q, k, v, d in zip(*groups, dilation, strict=True):
        p = d * (kernel_size - 1) // 2
        k, v = (_taps(F.pad(x, (0, 0, 0, 0, p, p, p, p)), kernel_size, d, height, width) for x in (k, v))
        scores = scale * (q * k).sum(-1)
        largest = scores.amax(0)  # torch.logsumexp would give inf where softmax gives NaN
        logsumexps.append(largest + (scores - largest).exp().sum(0).log())
        outputs.append((scores.softmax(0).unsqueeze(-1) * v).sum(0))
    logsumexp = torch.cat(logsumexps, dim=3).permute(0, 3, 1, 2).contiguous()
    return torch.cat(outputs, dim=3).to(query.dtype), logsumexp


def _reference_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    kernel_size: int,
    dilation: Sequence[int],
    scale: float,
) -> Tensor:
    height, width = query.shape[1:3]
    exact = accumulate_dtype(query.dtype)
    gradients = []
    groups = (t.to(exact).chunk(len(dilation), dim=3) for t in (query, key, value, grad_output, output))
    lse = logsumexp.permute(0, 2, 3, 1).chunk(len(dilation), dim=3)
    for q, k, v, g, o, l, d in zip(*groups, lse, dilation, strict=True):
        p = d * (kernel_size - 1) // 2
        k, v = (_taps(F.pad(x, (0, 0, 0, 0, p, p, p, p)), kernel_size, d, height, width) for x in (k, v))
        weights = (scale * (q * k).sum(-1) - l).exp()
        grad_scores = scale * weights * ((g * v).sum(-1) - (g * o).sum(-1))
        grad_key = _taps_transposed(grad_scores.unsqueeze(-1) * q, kernel_size, d)
        grad_value = _taps_transposed(weights.unsqueeze(-1) * g, kernel_size, d)
        gradients.append(torch.stack([(grad_scores.unsqueeze(-1) * k).sum(0), grad_key, grad_value], dim=3))
    return torch.cat(gradients, dim=4).to(query.dtype)


def _taps_transposed(taps: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """The adjoint of padding and :func:`_taps`: what every tap gives, summed at the position it came from."""
    _, batch, height, width, heads, head_dim = taps.shape
    p = dilation * (kernel_size - 1) // 2
    padded = taps.new_zeros(batch, height + 2 * p, width + 2 * p, heads, head_dim)
    for t, tap in enumerate(taps):
        y, x = t // kernel_size * dilation, t % kernel_size * dilation
        padded[:, y : y + height, x : x + width] += tap
    return padded[:, p : p + height, p : p + width]


def _fake(
    query: Tensor, key: Tensor, value: Tensor, kernel_size: int, dilation: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    batch, height, width, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(
        (batch, heads, height, width), dtype=accumulate_dtype(query.dtype)
    )


def _fake_backward(grad_output: Tensor, query: Tensor, *args: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], 3, *query.shape[3:]))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    tensors = [fold(a, d, info.batch_size) for a, d in zip(args[:3], in_dims[:3], strict=True)]
    output, logsumexp = _DilatedAttention.apply(*tensors, *args[3:])
    return (unfold(output, info), unfold(logsumexp, info)), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    tensors = [fold(a, d, info.batch_size) for a, d in zip(args[:6], in_dims[:6], strict=True)]
    return unfold(_backward.overload(*tensors, *args[6:]), info), 0


def _vmap_packed(info: Any, in_dims: Any, qkv: Tensor, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    output, logsumexp = _DilatedAttentionPacked.apply(fold(qkv, in_dims[0], info.batch_size), *args)
    return (unfold(output, info), unfold(logsumexp, info)), (0, 0)


class _DilatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, kernel_size, dilation, scale):
        return _forward(query, key, value, kernel_size, dilation, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, *output)

    @staticmethod
    def backward(ctx, grad_output, _):
        return *_backward(grad_output, *ctx.saved_tensors, *ctx.options).unbind(3), None, None, None

    vmap = staticmethod(_vmap)


class _DilatedAttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(qkv, kernel_size, dilation, scale):
        return _forward(*qkv.unbind(3), kernel_size, dilation, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(qkv, *output)

    @staticmethod
    def backward(ctx, grad_output, _):
        qkv, output, logsumexp = ctx.saved_tensors
        return _backward(grad_output, *qkv.unbind(3), output, logsumexp, *ctx.options), None, None, None

    vmap = staticmethod(_vmap_packed)


_forward = operator(
    "dilated_attention_forward(Tensor query, Tensor key, Tensor value, int kernel_size, int[] dilation, float scale)"
    " -> (Tensor output, Tensor logsumexp)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_DilatedAttention.apply,
    autocast=True,
)
_backward = operator(
    "dilated_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output,"
    " Tensor logsumexp, int kernel_size, int[] dilation, float scale) -> Tensor grad_qkv",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
