"""ReCU's weight: standardised filters whose tails get no gradient, and their signs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import accumulate_dtype, check_floating
from tersor._operator import call_function, operator

EPS = 1e-5
SCALE = 2 * math.sqrt(2)  # of a Laplace distribution with b = 2 and deviation 2 sqrt 2


def recu_weight(weight: Tensor, tau: float | Tensor) -> Tensor:
    r"""The signs of standardised filters; those further out than a quantile get no gradient of their own.

    With the mean and unbiased variance of filter o over its K = I KH KW weights,

    .. math:: v = w - \mathrm{mean}(w_o), \quad \sigma_o = \sqrt{\mathrm{var}(w_o) + 10^{-5}}, \quad
        u = 2 \sqrt2\, v / \sigma_o, \quad Q = -\mathrm{mean}|u| \ln(2 - 2 \tau), \quad
        output = \mathrm{sign}(\mathrm{clamp}(u, -Q, Q))

    where the mean of Q is over all filters. The gradient passes the sign as it is, is zero where \|u\| > Q, and then
    goes through the standardisation; Q is a constant. tau = 1 has no clamp. sign(0) = 0.

    Args:
        weight: ``(O, I, KH, KW)`` or ``(O, I)``, with at least 2 weights a filter; float16, bfloat16, float32 or
            float64.
        tau: quantile, above 0.5 and at most 1; a number or a tensor of one element, which a GPU reads without waiting.
            See :func:`recu_tau`.

    Returns:
        The shape and dtype of ``weight``, contiguous: -1, 0 (of a filter whose weights are all equal) or 1.
        Differentiable once.

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: a shape or ``tau`` is not as stated; or, on the CPU, a weight is NaN or infinite.

    Source: Xu et al., "ReCU: Reviving the Dead Weights in Binary Neural Networks", arXiv 2103.12369.
    """
    name = "recu_weight"
    check_floating(name, weight=weight)
    # Asking weight[0], a view that autograd keeps a node for, costs 7 us.
    if weight.dim() not in (2, 4) or not weight.numel() or weight.numel() < 2 * weight.shape[0]:
        raise ValueError(
            f"{name}: weight must be (O, I, KH, KW) or (O, I) with at least 2 weights a filter, "
            f"got shape {tuple(weight.shape)}"
        )
    output, _, bound = call_function(_RecuWeight, weight, as_tau(name, tau, weight.device))
    known = weight.is_cpu and not torch.compiler.is_compiling() and not _is_wrapped(bound)
    if known and not math.isfinite(bound.item()) and not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}: weight must be finite, got NaN or infinity")
    return output


def _is_wrapped(tensor: Tensor) -> bool:
    """Without values of its own: within vmap, or a fake tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or type(tensor) is not Tensor


def as_tau(where: str, tau: Any, device: torch.device) -> Tensor:
    """A float32 tensor without dimensions; its value is checked unless it lies on a GPU."""
    if isinstance(tau, Tensor):
        if tau.numel() != 1 or not tau.is_floating_point():
            raise ValueError(
                f"{where}: tau must be a number or a floating-point tensor of one element, "
                f"got {tau.dtype} of shape {tuple(tau.shape)}"
            )
        known = tau.is_cpu and not torch.compiler.is_compiling() and not _is_wrapped(tau)
        if known:
            check_tau(where, tau.item())
        return tau.detach().reshape(()).to(device, torch.float32)
    return torch.scalar_tensor(check_tau(where, tau), dtype=torch.float32, device=device)


def check_tau(where: str, tau: Any) -> float:
    """The quantile as a float; raises unless it is a number above 0.5 and at most 1."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"{where}: tau must be a number, got {type(tau).__name__}")
    if not 0.5 < tau <= 1:
        raise ValueError(f"{where}: tau must be above 0.5 and at most 1, got {tau}")
    return float(tau)


def _centred(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Filters less their means ``(O, K)``, the means, and the reciprocals of the deviations, ``(O, 1)``."""
    exact = weight.to(accumulate_dtype(weight.dtype)).flatten(1)
    mean = exact.mean(1, keepdim=True)
    centred = exact - mean
    return centred, mean, (centred.square().sum(1, keepdim=True) / (exact.shape[1] - 1) + EPS).rsqrt()


def _reference(weight: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centred, mean, rstd = _centred(weight)
    average = (SCALE * centred * rstd).abs().mean()
    bound = torch.where(tau < 1, -average * torch.log(2 - 2 * tau.to(average.dtype)), torch.inf)
    bound = torch.where(average.isfinite(), bound, average)
    output = torch.where(bound > 0, torch.sign(centred), 0).to(weight.dtype).reshape(weight.shape).contiguous()
    return output, torch.cat([mean, rstd], dim=1), bound


def _reference_backward(grad_output: Tensor, weight: Tensor, statistics: Tensor, bound: Tensor) -> Tensor:
    exact = weight.to(statistics.dtype).flatten(1)
    mean, rstd = statistics[:, :1], statistics[:, 1:]
    centred = exact - mean
    passed = (SCALE * centred * rstd).abs() <= bound
    grad = torch.where(passed, grad_output.to(exact.dtype).flatten(1), 0)
    along = (grad * centred).sum(1, keepdim=True) * rstd.square() / (exact.shape[1] - 1)
    inner = SCALE * rstd * (grad - centred * along)
    return (inner - inner.mean(1, keepdim=True)).to(weight.dtype).reshape(weight.shape).contiguous()


def _fake(weight: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(weight.dtype)
    statistics = weight.new_empty((weight.shape[0], 2), dtype=dtype)
    return weight.new_empty(weight.shape), statistics, weight.new_empty((), dtype=dtype)


def _fake_backward(grad_output: Tensor, weight: Tensor, statistics: Tensor, bound: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_recu_weight, info, in_dims, args)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_backward.overload, info, in_dims, args)


class _RecuWeight(torch.autograd.Function):
    @staticmethod
    def forward(weight, tau):
        return _forward(weight, tau)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, statistics, bound = output
        ctx.mark_non_differentiable(statistics, bound)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], statistics, bound)

    @staticmethod
    def backward(ctx, grad_output, *_):
        return None if grad_output is None else _backward(grad_output, *ctx.saved_tensors), None

    vmap = staticmethod(_vmap)


def _recu_weight(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _RecuWeight.apply(*args)


_forward = operator(
    "recu_weight_forward(Tensor weight, Tensor tau) -> (Tensor output, Tensor statistics, Tensor bound)",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
    derivative=_recu_weight,
)
_backward = operator(
    "recu_weight_backward(Tensor grad_output, Tensor weight, Tensor statistics, Tensor bound) -> Tensor grad_weight",
    reference=_reference_backward,
    fake=_fake_backward,
    vmap=_vmap_backward,
)
