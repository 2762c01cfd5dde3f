"""Launches the kernels of pack_signs and binary_packed_conv2d, for which rows are images of one pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.triton_kernels.binary.binary_packed_conv2d import binary_packed_conv2d
from tersor.triton_kernels.binary.pack_signs import pack_signs


def binary_packed_linear(input: Tensor, weight: Tensor, weight_sums: Tensor, affine: Tensor | None) -> Tensor:
    """The operator ``tersor::binary_packed_linear`` for float16, bfloat16 and float32."""
    channels, outputs = input.shape[-1], weight_sums.shape[0]
    signs = pack_signs(input.reshape(-1, channels, 1, 1), None, 1)
    sums = (signs, weight, weight_sums, channels, [1, 1], [0, 0], [1, 1])
    output = binary_packed_conv2d(*sums, None, False, "none", None, torch.float32, False).flatten(1)
    if affine is not None:
        output = affine[0] * output + affine[1]
    return output.to(input.dtype).reshape(*input.shape[:-1], outputs)
