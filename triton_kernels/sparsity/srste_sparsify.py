"""The weight without the smallest elements of every group, on GPUs: one pass in each direction.

Forward 2 u bytes an element move, backward 3 u, and 1/8 for the mask. An element's rank among the M of its group says
whether it stays, at M comparisons an element.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.quantization._fake_quantize import Case
from tersor.triton_kernels.sparsity._groups import (
    IN_ORDER,
    Groups,
    cases,
    first_group,
    gather,
    load_words,
    places,
    spread,
    store_words,
)


@triton.jit(do_not_specialize=["size"])
def _forward_kernel(
    weight, output, mask, size,
    N: tl.constexpr,
    M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    first = first_group(GROUPS)
    start, offsets, present = places(first, size, M, WIDTH, GROUPS, INPUTS, TAPS)
    w = tl.load(weight + start + offsets, mask=present, other=0.0)
    key = tl.abs(w.to(tl.float32)).to(tl.int32, bitcast=True)  # in the order of the values
    key = tl.minimum(key, 0x7F800001)  # one NaN for all
    position = tl.arange(0, WIDTH)[None, :]
    rank = tl.zeros([GROUPS, WIDTH], tl.int32)
    for p in tl.static_range(M):
        other = tl.sum(tl.where(position == p, key, 0), axis=1)[:, None]
        rank += (other < key + (position > p).to(tl.int32)).to(tl.int32)  # of equal ones the lower index is before
    kept = present & (rank >= M - N)
    tl.store(output + start + offsets, tl.where(kept, w, tl.zeros_like(w)), mask=present)
    store_words(mask, gather(kept, WIDTH), first, size, M, WIDTH, GROUPS)


@triton.jit(do_not_specialize=["size", "decay"])
def _backward_kernel(
    grad_output, weight, mask, grad_weight, decay, size,
    M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    first = first_group(GROUPS)
    start, offsets, present = places(first, size, M, WIDTH, GROUPS, INPUTS, TAPS)
    kept = spread(load_words(mask, first, size, M, WIDTH, GROUPS), WIDTH)
    g = tl.load(grad_output + start + offsets, mask=present, other=0.0).to(tl.float32)
    w = tl.load(weight + start + offsets, mask=present, other=0.0).to(tl.float32)
    total = g + tl.where(kept, 0.0, decay * w)
    tl.store(grad_weight + start + offsets, total.to(grad_weight.dtype.element_ty), mask=present)


def srste_sparsify_forward(weight: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The operator ``tersor::srste_sparsify_forward`` for float16, bfloat16 and float32."""
    groups = Groups("srste_sparsify", weight, n, m)
    output, mask = torch.empty_like(groups.weight), groups.empty_mask()
    groups.launch(_forward_kernel, groups.weight, output, mask, N=n)
    return groups.returned(output), mask


def srste_sparsify_backward(grad_output: Tensor, weight: Tensor, mask: Tensor, m: int, decay: float) -> Tensor:
    """The operator ``tersor::srste_sparsify_backward`` for float16, bfloat16 and float32."""
    where = "srste_sparsify"
    groups = Groups(where, weight, 1, m)
    grad_weight = torch.empty_like(groups.weight)
    inputs = groups.like(where, grad_output), groups.weight, groups.mask(where, mask)
    groups.launch(_backward_kernel, *inputs, grad_weight, decay)
    return groups.returned(grad_weight)


def ahead_of_time_cases(layout: dict[str, int] = IN_ORDER) -> Iterator[Case]:
    """What the ahead-of-time test compiles: weights in the groups' order unless told otherwise."""
    shapes = [(2, 4), (4, 8), (1, 16)]
    variants = {f"{n}:{m}": (n, m, {"N": n}) for n, m in shapes}
    yield from cases(_forward_kernel, variants, {}, ["weight", "output"], layout)
    data = ["grad_output", "weight", "grad_weight"]
    yield from cases(_backward_kernel, {f":{m}": (1, m, {}) for _, m in shapes}, {"decay": "fp32"}, data, layout)
