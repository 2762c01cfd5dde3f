"""Binary layers for training, as functions: what the published networks compute, on the operators of this family."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tersor._checks import check_floating
from tersor.binary.binary_conv2d import binary_conv2d
from tersor.binary.binary_sign import binarize_activation, binary_sign
from tersor.binary.estimators import STE, Estimator, check_estimator, reste
from tersor.binary.recu_weight import recu_weight

Size = int | Sequence[int]


def binary_linear(input: Tensor, weight: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """scale times ``linear`` of sign(input) with sign(weight), see :func:`binary_conv2d`.

    Args:
        input: ``(..., I)``; floating point.
        weight: ``(O, I)``, of the input's dtype.
        scale: ``(O,)`` or of one element, of the input's dtype; None for 1.

    Returns:
        ``(..., O)``, differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    check_floating("binary_linear", input=input, weight=weight)
    if weight.dim() != 2 or not weight.numel() or input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            "binary_linear: input must be (..., I) and weight (O, I), not empty, got shape "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    rows = input.reshape(-1, input.shape[-1])
    output = binary_conv2d(rows[:, :, None, None], weight[:, :, None, None], scale=scale)
    return output.reshape(*input.shape[:-1], weight.shape[0])


def recu_conv2d(
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    tau: float | Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    training: bool = True,
) -> Tensor:
    """ReCU's convolution: alpha (conv2d(:func:`binarize_activation`, :func:`recu_weight`) + bias).

    Args:
        input: ``(N, C, H, W)``; floating point.
        weight: ``(O, C / groups, KH, KW)``.
        alpha: ``(O, 1, 1)``.
        tau: see :func:`recu_weight`.
        bias: ``(O,)``, inside the scaling.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``.
        training: see :func:`binarize_activation`.

    Returns:
        ``(N, O, H', W')``, differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2103.12369.
    """
    name = "recu_conv2d"
    _check_layer(name, input, weight, bias)
    check_floating(name, alpha=alpha)
    if alpha.shape != (weight.shape[0], 1, 1):
        raise ValueError(f"{name}: alpha must be ({weight.shape[0]}, 1, 1), got shape {tuple(alpha.shape)}")
    signs = binarize_activation(input, training), recu_weight(weight, tau)
    if bias is None:
        return binary_conv2d(*signs, stride, padding, dilation, groups, scale=alpha.flatten())
    return alpha * (binary_conv2d(*signs, stride, padding, dilation, groups) + bias[:, None, None])


def reste_conv2d(
    input: Tensor,
    weight: Tensor,
    o: float,
    o_a: float,
    t: float = 1.5,
    t_a: float = 1.5,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    act_bits32: bool = False,
) -> Tensor:
    """ReSTE's convolution: mean|weight| conv2d(sign(input), sign(weight)) + bias, with :func:`reste_sign`'s gradients.

    The factor is one number for the layer, through which the weights get a gradient as well. The sums of signs are
    whole numbers, so that one of 0 gives an output of exactly 0 (without a bias).

    Args:
        input: ``(N, C, H, W)``; floating point.
        weight: ``(O, C / groups, KH, KW)``.
        o, t: of the weight's sign, see :func:`reste_sign`.
        o_a, t_a: of the input's.
        bias: ``(O,)``, not scaled.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``.
        act_bits32: takes the input as it is.

    Returns:
        ``(N, O, H', W')``, differentiable once.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: arXiv 2308.06689.
    """
    name = "reste_conv2d"
    estimators = None if act_bits32 else check_estimator(name, reste(o_a, t_a)), check_estimator(name, reste(o, t))
    return scaled_conv2d(name, input, weight, bias, (stride, padding, dilation), groups, *estimators, "layer")


def scaled_conv2d(
    where: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: tuple[Size, Size, Size],
    groups: int,
    estimator: Estimator | None = STE,
    weight_estimator: Estimator = STE,
    scale: str | None = "layer",
) -> Tensor:
    """Convolution of signs times the mean of \\|weight\\|; an estimator of None takes the input as it is."""
    _check_layer(where, input, weight, bias)
    signs = binary_sign(weight, weight_estimator)
    factor = weight_scale(weight, scale)
    if estimator is None:
        signs = signs if factor is None else signs * factor.view(-1, 1, 1, 1)
        return F.conv2d(input, signs, bias, *window, groups)
    output = binary_conv2d(binary_sign(input, estimator), signs, *window, groups, scale=factor)
    return output if bias is None else output + bias[:, None, None]


def weight_scale(weight: Tensor, scale: str | None) -> Tensor | None:
    """The mean of \\|weight\\|: of the layer, ``(1,)``, or of each output channel, ``(O,)``."""
    if scale is None:
        return None
    return weight.abs().mean().view(1) if scale == "layer" else weight.abs().flatten(1).mean(1)


def _check_layer(where: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(where, input=input, weight=weight)
    if input.dim() != 4:
        raise ValueError(f"{where}: input must be (N, C, H, W), got shape {tuple(input.shape)}")
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(f"{where}: weight must be (O, C / groups, KH, KW), not empty, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_floating(where, bias=bias)
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"{where}: bias must be ({weight.shape[0]},), got shape {tuple(bias.shape)}")
