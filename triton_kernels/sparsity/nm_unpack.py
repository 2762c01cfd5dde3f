"""A packed N:M matrix with its zeros again, on GPUs: expanded in registers as for :mod:`nm_matmul`, and written."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.sparsity.nm_pack import check_packed
from tersor.triton_kernels.quantization._fake_quantize import Case
from tersor.triton_kernels.sparsity.nm_matmul import OPTIONS, _columns, _expand, _few_tile, _load_packed


@triton.jit(do_not_specialize=["outputs", "groups", "index_row"])
def _unpack_kernel(
    values, index, weight, outputs, groups, index_row, VECTOR: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    OUTPUTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    begin = tl.program_id(1) * GROUPS
    groups = groups // VECTOR[0] * VECTOR[0]  # which tells the compiler what divides it
    index_row = index_row // VECTOR[1] * VECTOR[1]
    kept, bytes = _load_packed(values, index, output, begin, outputs, groups, index_row, N, BITS, GROUPS)
    column, present = _columns(begin, groups, M, WIDTH, GROUPS)
    place = weight + (output * groups * M)[:, None] + column[None, :]
    elements = _expand(kept, bytes, N, M, WIDTH, BITS, GROUPS)
    tl.store(place, elements, mask=(output < outputs)[:, None] & present[None, :])


def nm_unpack(values: Tensor, index: Tensor, n: int, m: int) -> Tensor:
    """The operator ``tersor::nm_unpack`` for float16, bfloat16 and float32."""
    n, m = check_packed("nm_unpack", values, index, n, m)
    outputs, groups = values.shape[:2]
    weight = values.new_empty(outputs, groups * m)
    if weight.numel():
        tile = _tile(n, m, values.element_size())
        vector = math.gcd(16, groups), math.gcd(16, index.shape[1])
        grid = triton.cdiv(outputs, tile["OUTPUTS"]), triton.cdiv(groups, tile["GROUPS"])
        tensors = values.contiguous(), index.contiguous(), weight
        with torch.cuda.device_of(values):
            _unpack_kernel[grid](*tensors, outputs, groups, index.shape[1], vector, **tile, **OPTIONS)
    return weight


def _tile(n: int, m: int, itemsize: int) -> dict[str, int]:
    tile = _few_tile(1, n, m, itemsize)
    return {name: size for name, size in tile.items() if name != "ROWS"}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    for name, itemsize in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
        types = {"values": f"*{name}:16", "weight": f"*{name}:16", "index": "*u8:16"}
        for n, m in ((2, 4), (1, 4), (4, 8), (1, 16)):
            constants = {"VECTOR": (16, 16)} | _tile(n, m, itemsize)
            signature = {a: types.get(a, "i32") for a in _unpack_kernel.arg_names if a not in constants}
            yield _unpack_kernel, f"{n}:{m} {name}", signature, constants, OPTIONS
