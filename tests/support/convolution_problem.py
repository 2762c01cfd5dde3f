"""Arguments for the integer convolution's tests."""

from __future__ import annotations

from typing import Any

import torch


def problem(
    batch: int = 2,
    channels: int = 5,
    outputs: int = 6,
    size: tuple[int, int] = (9, 7),
    kernel: tuple[int, int] = (3, 3),
    groups: int = 1,
    bits: int = 4,
    bounds: tuple[float, float] = (-1.3, 2.0),
    per_sample: bool = False,
    zero: int | None = 3,
    per_channel: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of quantized_conv2d: the tensors and bits, and the options."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(outputs if per_channel else 1, generator=generator) + 0.1
    lower, upper = (torch.tensor([b]) for b in bounds)
    if per_sample:
        lower, upper = (b + 0.1 * torch.rand(batch, 1, 1, 1, generator=generator) for b in (lower, upper))
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most + 1, (outputs, channels // groups, *kernel), generator=generator)
    tensors = {
        "input": 2 * torch.randn(batch, channels, *size, generator=generator).to(dtype),
        "weight": codes.clamp(max=127).to(torch.int8),
        "weight_scale": scale,
        "weight_zero": None if zero is None else torch.full_like(scale, zero),
        "lower": lower,
        "upper": upper,
        "bias": torch.randn(outputs, generator=generator) if bias else None,
    }
    tensors = {name: None if t is None else t.to(device) for name, t in tensors.items()}
    return {**tensors, "bits": bits}, {**options, "groups": groups}
