"""Folding of batch norms into the convolutions beside them, for inference; only where that changes no result."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_norms_(model: nn.Module) -> nn.Module:
    """Folds, in place, the batch norms of all layers in ``model`` that know which of theirs can be.

    With its running statistics a norm is an affine map of each channel. One behind a convolution goes into it, one in
    front of a convolution too if that pads nothing: padding comes after the norm, so that the borders would differ.
    Folded norms become ``torch.nn.Identity``, convolutions without a bias get one, and of a norm between a layer's own
    convolutions that cannot be folded its scale and shift are left; the keys of the state dict change accordingly.
    Folding again changes nothing.

    Args:
        model: in eval mode; layers with a method ``fold_norms_`` are asked, such as :class:`tersor.LadderBlock`'s.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model or a norm is in training mode, a norm has no running statistics, or there is no layer to
            ask; nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold_norms_: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"fold_norms_: model must be in eval mode, but {name or 'model'} is in training mode")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(f"fold_norms_: norms must have running statistics, but {name} has none")
    methods = [method for module in model.modules() if callable(method := getattr(module, "fold_norms_", None))]
    if not methods:
        raise ValueError(f"fold_norms_: model must hold a layer that can fold norms, got {type(model).__name__}")
    for method in methods:
        method()
    return model


class ChannelAffine(nn.Module):
    """What is left of a batch norm that cannot be folded: ``x * scale + shift`` of ``(B, C, H, W)``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name, tensor in zip(("scale", "shift"), norm_affine(norm), strict=True):
            self.register_buffer(name, tensor.to(norm.running_mean.dtype))  # type: ignore[arg-type]
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        return input * self.scale[:, None, None] + self.shift[:, None, None]


@torch.no_grad()
def fold_into_previous_(layers: nn.Sequential, conv_index: int, norm_index: int) -> None:
    """The norm at ``norm_index``, if it is still one, goes into the convolution at ``conv_index`` before it."""
    conv, norm = layers[conv_index], layers[norm_index]
    if isinstance(norm, nn.Identity):
        return
    assert isinstance(conv, nn.Conv2d)
    scale, shift = norm_affine(norm)
    bias = 0 if conv.bias is None else conv.bias.double()
    _replace(conv, conv.weight.double() * scale[:, None, None, None], bias * scale + shift)
    layers[norm_index] = nn.Identity().eval()


@torch.no_grad()
def fold_into_next_(layers: nn.Sequential, norm_index: int, conv: nn.Module) -> None:
    """The norm at ``norm_index``, if it is still one, goes into ``conv``, which comes after it and pads nothing."""
    norm = layers[norm_index]
    if isinstance(norm, nn.Identity):
        return
    assert isinstance(conv, nn.Conv2d)
    assert conv.groups == 1
    assert not any(conv.padding)
    scale, shift = norm_affine(norm)
    weight = conv.weight.double()
    bias = 0 if conv.bias is None else conv.bias.double()
    _replace(conv, weight * scale[:, None, None], weight.sum((2, 3)) @ shift + bias)
    layers[norm_index] = nn.Identity().eval()


@torch.no_grad()
def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel, in float64."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _replace(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    conv.weight.copy_(weight)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
