"""Zeros where a packed mask has a 1, on GPUs: one pass, which does not read octets that are all frozen."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.freezing._octets import cases, check, launch, load_bytes, octets, unpack
from tersor.triton_kernels.quantization._fake_quantize import Case


@triton.jit(do_not_specialize=["size"])
def _kernel(input, frozen, output, size, VECTOR: tl.constexpr, OCTETS: tl.constexpr):
    start, offsets, present = octets(size, VECTOR, OCTETS)
    bytes = load_bytes(frozen, start, size, OCTETS)
    x = tl.load(input + start + offsets, mask=present & (bytes != 255)[:, None], other=0.0)
    tl.store(output + start + offsets, tl.where(unpack(bytes), tl.zeros_like(x), x), mask=present)


def zero_frozen(input: Tensor, frozen: Tensor) -> Tensor:
    """The operator ``tersor::zero_frozen`` for float16, bfloat16 and float32."""
    check("zero_frozen", input, frozen)
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    launch(_kernel, input.numel(), input.contiguous(), frozen.contiguous(), output)
    return output


def zero_in_place(tensor: Tensor, frozen: Tensor) -> None:
    """The same for a contiguous tensor of one's own."""
    launch(_kernel, tensor.numel(), tensor, frozen.contiguous(), tensor)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    yield from cases(_kernel, {"": {}}, {}, ["input", "output"])
