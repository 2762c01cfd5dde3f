"""Shifted-window attention written out over all pairs of tokens, from the published rules for regions and indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def region(rolled: Tensor, size: int, window: int, shift: int) -> Tensor:
    """The published regions of rows (or columns) in rolled coordinates; a negative shift is PSLT's direction 0."""
    if shift > 0:
        return (rolled >= size - window).long() + (rolled >= size - shift).long()
    if shift < 0:
        return (rolled >= -shift).long() + (rolled >= window).long()
    return torch.zeros_like(rolled)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    table: Tensor,
    outside: Tensor | None = None,
) -> Tensor:
    """``(B, H, W, heads, head_dim)`` tensors; ``outside``, ``(B, H, W)``, is read in rolled coordinates."""
    height, width, _, head_dim = query.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = ((p.flatten() - s) % n for p, s, n in zip((rows, columns), shift, (height, width), strict=True))  # rolled
    same = (y // window[0])[:, None] == y // window[0]
    same &= (x // window[1])[:, None] == x // window[1]
    place = [p % n for p, n in zip((y, x), window, strict=True)]
    index = (place[0][:, None] - place[0] + window[0] - 1) * (2 * window[1] - 1)
    index = (index + place[1][:, None] - place[1] + window[1] - 1).masked_fill(~same, 0)
    areas = 3 * region(y, height, window[0], shift[0]) + region(x, width, window[1], shift[1])
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (query, key, value))  # [B, heads, L, head_dim]
    logits = q @ k.transpose(-1, -2) * head_dim**-0.5 + table[index].permute(2, 0, 1)
    logits = logits - 100.0 * (areas[:, None] != areas)
    if outside is not None:
        flat = outside.to(logits.dtype)[:, y, x]
        logits = logits - 100.0 * (flat[:, :, None] * flat[:, None, :])[:, None]
    output = logits.masked_fill(~same, -torch.inf).softmax(-1) @ v
    return output.transpose(1, 2).unflatten(1, (height, width))


def randomize(module: torch.nn.Module, deviation: float = 0.3) -> torch.nn.Module:
    """Random numbers in all parameters, away from the initialisation, and in the norms' running statistics."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=deviation)
    for name, buffer in module.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def error(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    return ((ours.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1)).item()


def check_gradients(module: torch.nn.Module, function, expected, *inputs: Tensor) -> None:
    """Outputs and gradients, of inputs and of all parameters, of two functions of the same module in float64."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    outputs = function(*inputs), expected(*inputs)
    assert error(*outputs) < 1e-11
    tensors = [*inputs, *module.parameters()]
    weights = torch.randn_like(outputs[0])
    both = [torch.autograd.grad((output * weights).sum(), tensors) for output in outputs]
    names = ["input", "value"][: len(inputs)] + [name for name, _ in module.named_parameters()]
    for name, ours, exact in zip(names, *both, strict=True):
        assert error(ours, exact) < 1e-9, name


def parameters_and_macs(build: Callable[[], torch.nn.Module], size: int) -> tuple[float, float]:
    """Millions, and giga multiply-adds of one image: convolutions, linear layers and both products of every attention.

    All on the meta device: nothing is computed.
    """

    def attention(query: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
        batch, height, width, heads, head_dim = query
        return 4 * batch * height * width * heads * head_dim * args[4][0] * args[4][1]

    def leff(input: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
        batch, height, width, channels = input
        hidden = args[0][0]
        return 2 * batch * height * width * hidden * (2 * channels + 9)

    with torch.device("meta"):
        model, image = build().eval(), torch.empty(1, 3, size, size)
    counts = {torch.ops.tersor.window_attention_forward: attention, torch.ops.tersor.leff_forward: leff}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9
