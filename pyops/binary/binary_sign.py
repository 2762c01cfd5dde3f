"""The sign with a chosen gradient, and ReCU's scaling of the samples in front of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import accumulate_dtype, check_floating
from tersor._operator import call_function, operator
from tersor._window import is_channels_last
from tersor.binary.estimators import APPROX, Estimator, check_estimator, reste
from tersor.freezing.mask import pack_mask, unpack_mask

EPS = 1e-5


def binary_sign(input: Tensor, estimator: str | Estimator = "ste") -> Tensor:
    r"""sign(x): -1, 0 or 1, with the gradient of an :class:`Estimator` of the binary networks' literature.

    .. math:: grad\_input = grad\_output \cdot d(|x|)

    sign(0) = 0, and the sign of NaN is 0.

    For the backward pass ``"ste"`` keeps one bit per element, the others keep ``input`` itself.

    Args:
        input: any shape and strides; float16, bfloat16, float32 or float64.
        estimator: ``"ste"``, ``"approx"``, ``"reste"``, or an :class:`Estimator` with its numbers.

    Returns:
        The shape and dtype of ``input``, in its memory format if it is contiguous or channels-last. Differentiable
        once.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "binary_sign"
    check_floating(name, input=input)
    if isinstance(estimator, Estimator) and isinstance(estimator.o, Tensor):  # of a layer that is being compiled
        return _ResteSign.apply(input, estimator.o, estimator.t, estimator.interval)
    return call_function(_BinarySign, _dense(input), *check_estimator(name, estimator), False)[0]


def ste_sign(input: Tensor, clip: float = 1.0) -> Tensor:
    """:func:`binary_sign` with the straight-through gradient ``g [abs(x) <= clip]``. Source: arXiv 1602.02830."""
    return binary_sign(input, Estimator("ste", t=clip))


def approx_sign(input: Tensor) -> Tensor:
    """:func:`binary_sign` with the triangular gradient ``g max(0, 2 - 2 abs(x))``. Source: arXiv 1808.00278."""
    return binary_sign(input, APPROX)


def reste_sign(input: Tensor, o: float, t: float = 1.5, interval: float = 0.1) -> Tensor:
    r""":func:`binary_sign` with the gradient of the power function ``sign(x) abs(x)^(1/o)``, rectified.

    .. math:: d(a) = \begin{cases} \mathrm{interval}^{1/o} / \mathrm{interval} & a \le \mathrm{interval} \\
        \frac1o a^{(1 - o) / o} & \mathrm{interval} < a \le t \\ 0 & a > t \end{cases}

    Args:
        input: as for :func:`binary_sign`.
        o: at least 1, finite; see :func:`reste_o`.
        t, interval: 0 < interval < t.

    Source: Wu et al., "Estimator Meets Equilibrium Perspective", arXiv 2308.06689.
    """
    return binary_sign(input, reste(o, t, interval))


def binarize_activation(input: Tensor, training: bool = True) -> Tensor:
    r"""ReCU's activation: the sign of samples divided by their deviation, with :func:`approx_sign`'s gradient.

    .. math:: a = x / \sqrt{\mathrm{var}(x_i) + 10^{-5}}, \quad h = g \cdot \max(0, 2 - 2 |a|), \quad
        grad\_input = \frac{h}{\sigma} - (x - \mathrm{mean}(x_i)) \frac{\sum_i h x}{(M - 1)\, \sigma^3}

    with the unbiased variance of sample i over its M = C H W elements and sigma the root above. The scaling does not
    change the sign; a sample with NaN or an infinity has no deviation, and its signs are all 0 and its gradients NaN.
    In evaluation a = x, and grad_input = h.

    Args:
        input: ``(N, C, H, W)``, N of at least 1, in training C H W of at least 2; float16, bfloat16, float32 or
            float64; any strides.
        training: whether the samples are scaled.

    Returns:
        The shape and dtype of ``input``. Differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: Xu et al., "ReCU: Reviving the Dead Weights in Binary Neural Networks", arXiv 2103.12369.
    """
    name = "binarize_activation"
    check_floating(name, input=input)
    if input.dim() != 4 or not input.shape[0]:
        raise ValueError(f"{name}: input must be (N, C, H, W) with N of at least 1, got shape {tuple(input.shape)}")
    if training and input.shape[1] * input.shape[2] * input.shape[3] < 2:
        raise ValueError(
            f"{name}: input must have at least 2 elements a sample in training, got shape {tuple(input.shape)}"
        )
    return call_function(_BinarySign, _dense(input), *APPROX, bool(training))[0]


def _is_channels_last(input: Tensor) -> bool:
    return input.dim() == 4 and is_channels_last(input)


def _dense(input: Tensor) -> Tensor:
    """As the operator takes it: contiguous or channels-last."""
    return input if _is_channels_last(input) else input.contiguous()


def _as_laid_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """With its dimensions in the order of memory."""
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor


def _reference(
    input: Tensor, estimator: str, o: float, t: float, interval: float, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output, exact = torch.sign(input), input.to(accumulate_dtype(input.dtype))
    inside, statistics = input.new_empty(0, dtype=torch.uint8), exact.new_empty(0)
    if scaled:
        variance, mean = torch.var_mean(exact.flatten(1), dim=1)
        rstd = (variance + EPS).rsqrt()
        statistics = torch.stack([mean, rstd], dim=1)
        output = torch.where((rstd > 0).view(-1, 1, 1, 1), output, 0)
    elif estimator == "ste":
        near = exact.abs() <= torch.tensor(t, dtype=input.dtype, device=input.device).to(exact.dtype)
        inside = pack_mask(_as_laid_out(near, _is_channels_last(input)))
    return _dense(output), inside, statistics


def _reference_backward(
    grad_output: Tensor,
    input: Tensor | None,
    inside: Tensor | None,
    statistics: Tensor | None,
    channels_last: bool,
    estimator: str,
    o: float,
    t: float,
    interval: float,
) -> Tensor:
    format = torch.channels_last if channels_last else torch.contiguous_format
    if input is None:
        assert inside is not None
        shape = _as_laid_out(grad_output, channels_last).shape
        mask = unpack_mask(inside, shape)
        mask = mask.permute(0, 3, 1, 2) if channels_last else mask
        return torch.where(mask, grad_output, 0).contiguous(memory_format=format)
    rule = Estimator(estimator, o, t, interval)
    dtype = accumulate_dtype(input.dtype)
    grad, exact = (t.to(dtype).contiguous(memory_format=format) for t in (grad_output, input))
    if statistics is None:  # compared in the input's own dtype
        rounded = [torch.tensor(v, dtype=input.dtype).item() for v in (t, interval)]
        slope = rule._replace(t=rounded[0], interval=rounded[1]).derivative(exact.abs())
        if estimator == "reste":  # the chord is of the interval as given
            slope = torch.where(exact.abs() <= rounded[1], rule.chord, slope)
        return (grad * slope).to(input.dtype).contiguous(memory_format=format)
    mean, rstd = (s.view(-1, 1, 1, 1) for s in statistics.unbind(1))
    slope = grad * rule.derivative((exact * rstd).abs())
    total = (slope * exact).sum((1, 2, 3), keepdim=True)
    size = input[0].numel()
    result = slope * rstd - (exact - mean) * (total * rstd**3 / (size - 1))
    return result.to(input.dtype).contiguous(memory_format=format)


def _empty(input: Tensor, channels_last: bool) -> Tensor:
    """Within a trace, strides follow the flag."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(input.shape, dtype=input.dtype, device=input.device, memory_format=format)


def _fake(
    input: Tensor, estimator: str, o: float, t: float, interval: float, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = _empty(input, _is_channels_last(input))
    bits = (input.numel() + 7) // 8 if estimator == "ste" and not scaled else 0
    dtype = accumulate_dtype(input.dtype)
    statistics = input.new_empty((input.shape[0], 2) if scaled else (0,), dtype=dtype)
    return output, input.new_empty((bits,), dtype=torch.uint8), statistics


def _fake_backward(
    grad_output: Tensor, input: Any, inside: Any, statistics: Any, channels_last: bool, *a: Any
) -> Tensor:
    return _empty(grad_output, channels_last)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_binary_sign, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward.overload, info, in_dims, args)


class _BinarySign(torch.autograd.Function):
    @staticmethod
    def forward(input, estimator, o, t, interval, scaled):
        return _forward(input, estimator, o, t, interval, scaled)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *ctx.rule, scaled = inputs
        _, inside, statistics = output
        ctx.mark_non_differentiable(inside, statistics)
        ctx.set_materialize_grads(False)
        ctx.channels_last = _is_channels_last(input)
        bits = ctx.rule[0] == "ste" and not scaled
        ctx.save_for_backward(None if bits else input, inside if bits else None, statistics if scaled else None)

    @staticmethod
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 6
        return _backward(grad_output, *ctx.saved_tensors, ctx.channels_last, *ctx.rule), *(None,) * 5

    vmap = staticmethod(_vmap)


class _ResteSign(torch.autograd.Function):
    """:func:`reste_sign` in plain torch with o in a tensor, since for another number torch would compile anew."""

    @staticmethod
    def forward(input, o, t, interval):
        return torch.sign(input)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, o, *ctx.numbers = inputs
        ctx.save_for_backward(input, o)

    @staticmethod
    def backward(ctx, grad_output):
        input, o = ctx.saved_tensors
        dtype = accumulate_dtype(input.dtype)
        magnitude = input.abs().to(dtype)
        # Compared as the input's own dtype rounds them, see _reference_backward.
        t, interval = (torch.tensor(v, dtype=input.dtype, device=input.device).to(dtype) for v in ctx.numbers)
        power = magnitude.clamp(min=interval).pow((1 - o) / o) / o
        chord = ctx.numbers[1] ** (1 / o) / ctx.numbers[1]
        slope = torch.where(magnitude <= interval, chord, torch.where(magnitude <= t, power, 0))
        return (grad_output.to(dtype) * slope).to(input.dtype), None, None, None


def _binary_sign(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _BinarySign.apply(*args)


_forward = operator(
    "binary_sign_forward(Tensor input, str estimator, float o, float t, float interval, bool scaled)"
    " -> (Tensor output, Tensor inside, Tensor statistics)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_binary_sign,
)
_backward = operator(
    "binary_sign_backward(Tensor grad_output, Tensor? input, Tensor? inside, Tensor? statistics, bool channels_last,"
    " str estimator, float o, float t, float interval) -> Tensor grad_input",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
