"""Blocks shared by the models, and loading of checkpoints.

Maps travel as ``(B, C, H, W)`` tensors in channels-last memory, so that the ``(B, H, W, C)`` view that norms, linear
layers and attention want costs nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._operator import is_autocast_enabled
from tersor.attention.layers import DropPath

Layer = Callable[..., nn.Module]  # what makes one, called like torch's own


def apply_linear(
    layer: nn.Module, input: Tensor, gelu: bool = False, residual: Tensor | None = None, outputs: slice | None = None
) -> Tensor:
    """``layer(input)[..., outputs]``, then the exact GELU if asked for, plus the residual if there is one.

    Of a plain ``torch.nn.Linear`` only the outputs that are wanted are computed. In float32 inference on the CPU it is
    one call of oneDNN, without passes of their own for what follows; MKL, which ``torch.nn.Linear`` calls there, is
    slower on AMD's processors.
    """
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        output = layer(input) if outputs is None else layer(input)[..., outputs]
        one_call = False
    else:
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        one_call = _is_one_call(input, weight, bias)
        if outputs is not None:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        if one_call and residual is not None and not gelu and residual.shape == (*input.shape[:-1], weight.shape[0]):
            return torch.ops.mkldnn._linear_pointwise.binary(input, residual.contiguous(), weight, bias, "add")
        if one_call:
            output = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "gelu" if gelu else "none", [], "none")
        else:
            output = F.linear(input, weight, bias)
    output = F.gelu(output) if gelu and not one_call else output
    return output if residual is None else residual + output


def _is_one_call(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether only numbers are wanted, of plain float32 tensors that fit, and this torch has the call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return bool(
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and type(weight) is nn.Parameter
        and input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and input.numel() > 0
        and not is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class Mlp(nn.Module):
    """Linear, exact GELU, linear over the last dimension: ``(..., dim)`` to ``(..., dim)``.

    ``linear`` is called like ``torch.nn.Linear``.
    """

    def __init__(self, dim: int, hidden_dim: int, linear: Layer = nn.Linear) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = linear(hidden_dim, dim)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """With ``residual`` the sum of both."""
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        hidden = apply_linear(self.fc1, input, gelu=True) if exact else self.act(self.fc1(input))
        return apply_linear(self.fc2, hidden, residual=residual)


class _Hardtanh(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input):
        return F.hardtanh(input)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_output):
        return torch.ops.aten.hardtanh_backward(grad_output, *ctx.saved_tensors, -1.0, 1.0)


def hardtanh(input: Tensor) -> Tensor:
    """``torch.nn.functional.hardtanh`` that keeps its result for the backward pass, not its input.

    This saves a map where the next layer keeps the result anyway, as a binary convolution does. The gradient is the
    same: it passes strictly between -1 and 1. (In place, torch keeps a copy of the input.)
    """
    return _Hardtanh.apply(input) if torch.is_grad_enabled() and input.requires_grad else F.hardtanh(input)


class Hardtanh(nn.Hardtanh):
    """:func:`hardtanh` as a module."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        return hardtanh(input)


class GlobalAttention(nn.Module):
    """Self-attention over all positions of a map: ``(B, H, W, dim)`` to ``(B, H, W, dim)``.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: heads.
        qkv_bias: whether the fused projection has a bias.
        qk_scale: factor on the scores; ``None`` or 0 means ``(dim // num_heads) ** -0.5``.
        linear: called like ``torch.nn.Linear``, for both projections.

    Raises:
        ValueError: ``dim`` is not a positive multiple of ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        linear: Layer = nn.Linear,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"GlobalAttention: dim ({dim}) must be a positive multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.scale = float(qk_scale or (dim // num_heads) ** -0.5)
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = linear(dim, dim)

    def forward(self, input: Tensor) -> Tensor:
        batch, height, width, dim = input.shape
        qkv = apply_linear(self.qkv, input).view(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, H * W, head_dim] each
        output = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return apply_linear(self.proj, output.transpose(1, 2).reshape(batch, height, width, dim))


class AttentionBlock(nn.Module):
    """Position convolution, attention and MLP, each a residual branch: ``(B, dim, H, W)`` to ``(B, dim, H, W)``.

    Args:
        dim: channels.
        attention: a module from ``(B, H, W, dim)`` to ``(B, H, W, dim)``.
        mlp_ratio: hidden channels of the MLP as a multiple of ``dim``.
        drop_path: stochastic-depth rate of the attention and MLP branches.
        position: whether the block has the depth-wise 3x3 convolution in front (conditional position encoding).
        eps: of the layer norms.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        position: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if position else None
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.pos_embed is None else input + self.pos_embed(input)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


def init_linear(module: nn.Module) -> None:
    """Linear weights from a normal distribution of deviation 0.02, biases 0; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)  # cut at +-2 absolute, as in DeiT: 100 deviations away
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def load_checkpoint(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], ema: bool = False) -> None:
    """Loads weights into ``model``, with every key accounted for, and runs no code from the file.

    Args:
        model: receives the weights in place.
        source: a ``.safetensors`` file, a file written by ``torch.save`` (read with ``weights_only=True``), or what
            such a file holds: a state dict, or a dict with one under ``"model"``, ``"state_dict"``
            or ``"model_ema"``. Keys may all begin with ``"module."``, as those of a ``DataParallel`` model do.
        ema: take the averaged weights under ``"model_ema"``; without it they are taken only if nothing else is there.

    Raises:
        TypeError: ``source`` is neither a path nor a mapping.
        ValueError: no state dict is found in ``source``.
        RuntimeError: keys or shapes do not match the model's.
    """
    model.load_state_dict(read_state_dict(source, ema), strict=True)


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any], ema: bool = False) -> Mapping[str, Tensor]:
    """What :func:`load_checkpoint` loads, which see."""
    if isinstance(source, (str, os.PathLike)):
        source = _read(os.fspath(source))
    if not isinstance(source, Mapping):
        raise TypeError(f"load_checkpoint: source must be a path or a dict, got {type(source).__name__}")
    if ema and "model_ema" not in source:
        raise ValueError("load_checkpoint: ema=True, but there is nothing under 'model_ema'")
    wrappers = ("model_ema",) if ema else ("model", "state_dict", "model_ema")
    name = next((key for key in wrappers if isinstance(source.get(key), Mapping)), None)
    state = source if name is None else source[name]
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            "load_checkpoint: source must be a state dict or hold one under 'model', 'state_dict' or 'model_ema', "
            f"got keys {', '.join(map(str, list(source)[:5])) or '(none)'}"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _read(path: str) -> Any:
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError('reading .safetensors files needs: pip install "tersor[demo]"') from None
        return load_file(path)
    # Training scripts store their options as a Namespace next to the weights: plain attributes, nothing is run.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)
