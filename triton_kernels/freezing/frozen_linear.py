"""The weight gradient of a linear layer in the listed tiles, on GPUs: that of a 1 x 1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.triton_kernels.freezing.frozen_conv2d import compute


def frozen_linear_backward(
    grad_output: Tensor, input: Tensor, frozen: Tensor | None, tiles: Tensor, tile_rows: int, tile_columns: int
) -> Tensor:
    """The operator ``tersor::frozen_linear_backward`` for float16, bfloat16 and float32."""
    if grad_output.dim() != 2 or input.dim() != 2 or len(grad_output) != len(input):
        given = f"shapes {tuple(grad_output.shape)} and {tuple(input.shape)}"
        raise ValueError(f"frozen_linear: grad_output and input must be (tokens, O) and (tokens, I), got {given}")
    grad_weight = torch.zeros((grad_output.shape[1], input.shape[1]), dtype=input.dtype, device=input.device)
    rows = grad_output.contiguous(), input.contiguous()
    compute("frozen_linear", *rows, frozen, tiles, (tile_rows, tile_columns), grad_weight)
    return grad_weight
