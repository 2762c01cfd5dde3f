"""What operators that slide a window over an image share: the output's sizes and its memory format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def output_sizes(
    input: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Rows and columns of the output for an input of shape ``(N, C, H, W)``; below 1 where the window does not fit."""
    windows = zip(input[2:], kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in windows]


def check_fits(
    where: str,
    input: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Raises where the window is larger than the image."""
    if min(output_sizes(input, kernel, stride, padding, dilation)) < 1:
        raise ValueError(
            f"{where}: input must be at least as large as the window, got input {tuple(input)} for kernel "
            f"{tuple(kernel)}, padding {tuple(padding)} and dilation {tuple(dilation)}"
        )


def is_channels_last(input: Tensor) -> bool:
    """And not contiguous as well, which is asked first as it is quick. Within vmap torch does not say."""
    if input.is_contiguous():
        return False
    _, channels, height, width = input.shape
    expected = (height * width * channels, 1, width * channels, channels)
    return all(n == 1 or s == e for n, s, e in zip(input.shape, input.stride(), expected, strict=True))


def empty_output(input: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised output with the input's dtype and device."""
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)
