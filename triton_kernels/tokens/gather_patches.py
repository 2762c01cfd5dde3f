"""Patches of images by index on GPUs: one launch in each direction.

Forward, a program copies part of some patches from their pixels. Backward, one owns part of some patches of an image,
finds their copies in the index, and adds these up in ascending order: no atomics, and zeros are stored by the same
launch.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false, disable-error-code=assignment

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.tokens._rank import (
    BLOCK_N,
    ITEMSIZES,
    OPTIONS,
    Case,
    block_of,
    check,
    check_index,
    find,
    launch,
    plan,
    rows,
    signature_of,
)

ELEMENTS, PART = 2048, 256  # of a tile, and of a patch: one channel of 16 x 16 pixels

_SIZES = [
    "images_b", "images_c", "images_y", "index_m", "index_j", "which_m", "grad_m", "grad_j", "batch", "lists", "count",
    "patches", "across", "blocks",
]  # fmt: skip


@triton.jit
def _pixels(patch, e, across, images_c, images_y, images_x, PATCH: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets in an image of elements ``e`` of patches, ``[PATCHES, ELEMENTS]``; two strides count VECTOR elements."""
    y, x = patch // across * PATCH, patch % across * PATCH
    corner = y.to(tl.int64) * images_y * VECTOR + x.to(tl.int64) * images_x
    channel = (e // (PATCH * PATCH)).to(tl.int64) * images_c * VECTOR
    inner = (e // PATCH % PATCH).to(tl.int64) * images_y * VECTOR + (e % PATCH).to(tl.int64) * images_x
    return corner[:, None] + (channel + inner)[None, :]


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    images, index, which, output, images_b, images_c, images_y, images_x, index_m, index_j, which_m,
    batch, count, patches, across, blocks,
    LENGTH: tl.constexpr, PATCH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_E elements of BLOCK_T of the ``count`` patches that a row of the index names."""
    m = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    image = m
    if which is not None:
        image = tl.load(which + m * which_m)
    patch = tl.load(index + m * index_m + j.to(tl.int64) * index_j, mask=j < count, other=-1)
    patch = tl.where((image >= 0) & (image < batch), patch, -1)
    valid = (patch >= 0) & (patch < patches)
    patch = tl.where(valid, patch, 0).to(tl.int32)
    place = image * images_b * VECTOR + _pixels(patch, e, across, images_c, images_y, images_x, PATCH, VECTOR)
    inside = (e < LENGTH)[None, :]
    value = tl.load(images + place, mask=valid[:, None] & inside, other=float("nan"))
    tl.store(rows(output, m * count, j, LENGTH, LENGTH, e, 1), value, mask=(j < count)[:, None] & inside)


@triton.jit
def _add_row(
    total, grad_output, index, m, patch, present, e, grad_m, grad_j, index_m, index_j, count,
    LENGTH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds what row ``m`` of the index names of these patches."""
    entries = index + m * index_m + tl.arange(0, 1)
    every = tl.arange(0, 1) == 0
    wanted = patch.to(tl.int64)
    place, copies = find(entries, index_j, wanted, patch * 0 - 1, every, count, BLOCK_N)
    most = tl.max(tl.where(present, copies, 0), axis=0)
    for copy in range(most):
        mask = (present & (place < count))[:, None] & (e < LENGTH)[None, :]
        source = rows(grad_output, m, place, grad_m, grad_j, e, VECTOR)
        total += tl.load(source, mask=mask, other=0.0).to(tl.float32)
        if copy + 1 < most:
            place, _rest = find(entries, index_j, wanted, place, every, count, BLOCK_N)
    return total


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    grad_output, index, which, grad_images, grad_m, grad_j, images_b, images_c, images_y, images_x,
    index_m, index_j, which_m, lists, count, patches, across, blocks,
    LENGTH: tl.constexpr, PATCH: tl.constexpr, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_E elements of BLOCK_T of the ``patches`` of an image; the index has ``lists`` rows."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    present = patch < patches
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if which is None:
        total = _add_row(
            total, grad_output, index, image, patch, present, e, grad_m, grad_j, index_m, index_j, count,
            LENGTH, VECTOR, BLOCK_N,
        )  # fmt: skip
    else:
        one = tl.arange(0, 1)
        m, copies = find(which + one, which_m, one + image, one - 1, one == 0, lists, BLOCK_N)
        for _copy in range(tl.max(copies, axis=0)):
            total = _add_row(
                total, grad_output, index, tl.max(m, axis=0).to(tl.int64), patch, present, e,
                grad_m, grad_j, index_m, index_j, count, LENGTH, VECTOR, BLOCK_N,
            )  # fmt: skip
            m, _rest = find(which + one, which_m, one + image, m, one == 0, lists, BLOCK_N)
    place = image * images_b * VECTOR + _pixels(patch, e, across, images_c, images_y, images_x, PATCH, VECTOR)
    mask = present[:, None] & (e < LENGTH)[None, :]
    tl.store(grad_images + place, total.to(grad_images.dtype.element_ty), mask=mask)


def gather_patches_forward(images: Tensor, index: Tensor, rows: Tensor | None, patch_size: int) -> Tensor:
    """The operator ``tersor::gather_patches_forward`` for float16, bfloat16 and float32."""
    patches, across, length = _check(images, images.shape, index, rows, patch_size)
    output = images.new_empty((*index.shape, length))
    sizes = (index.shape[1], patches, across)
    strides = [0 if n == 1 else s for n, s in zip(images.shape[:3], images.stride()[:3], strict=True)]
    last = images.stride(3)
    vector = math.gcd(16 // images.element_size(), patch_size, *strides) if last == 1 else 1
    constants = _constants(length, patch_size, vector)
    blocks = triton.cdiv(index.shape[1], constants["BLOCK_T"])
    numbers = [s // vector for s in strides] + [last, *index.stride(), 0 if rows is None else rows.stride(0)]
    grid = (index.shape[0] * blocks, triton.cdiv(length, constants["BLOCK_E"]))
    arguments = (images, index, rows, output, *numbers, images.shape[0], *sizes, blocks)
    launch(_forward_kernel, grid, constants, OPTIONS, *arguments)
    return output


def gather_patches_backward(
    grad_output: Tensor, index: Tensor, rows: Tensor | None, patch_size: int, shape: Sequence[int]
) -> Tensor:
    """The operator ``tersor::gather_patches_backward`` for float16, bfloat16 and float32; no atomics."""
    patches, across, length = _check(grad_output, shape, index, rows, patch_size)
    check("gather_patches", grad_output, grad_output=(grad_output, (*index.shape, length)))
    grad_images = grad_output.new_empty(tuple(shape))
    (source,), strides, vector = plan(grad_output.element_size(), grad_output)
    whole = math.gcd(vector, patch_size)
    strides = [s * (vector // whole) for s in strides]
    strides += [s // whole for s in (math.prod(shape[1:]), shape[2] * shape[3], shape[3])]
    constants = _constants(length, patch_size, whole) | {"BLOCK_N": BLOCK_N}
    blocks = triton.cdiv(patches, constants["BLOCK_T"])
    numbers = [*strides, 1, *index.stride(), 0 if rows is None else rows.stride(0), *index.shape]
    grid = (shape[0] * blocks, triton.cdiv(length, constants["BLOCK_E"]))
    arguments = (source, index, rows, grad_images, *numbers, patches, across, blocks)
    launch(_backward_kernel, grid, constants, OPTIONS, *arguments)
    return grad_images


def _check(
    tensor: Tensor, shape: Sequence[int], index: Tensor, rows: Tensor | None, patch_size: int
) -> tuple[int, int, int]:
    """How many patches an image has, how many of them side by side, and how many elements each."""
    name = "gather_patches"
    check(name, tensor)
    if len(shape) != 4 or patch_size < 1 or shape[2] % patch_size or shape[3] % patch_size or index.dim() != 2:
        raise ValueError(
            f"{name}: images must be (B, C, H, W) of whole patches and index (M, m), "
            f"got shapes {tuple(shape)} and {tuple(index.shape)}"
        )
    check_index(name, (shape[0] if rows is None else rows.shape[0], index.shape[1]), index=index)
    if rows is not None:
        check_index(name, (index.shape[0],), rows=rows)
    high, wide = shape[2] // patch_size, shape[3] // patch_size
    return high * wide, wide, shape[1] * patch_size**2


def _constants(length: int, patch_size: int, vector: int) -> dict[str, Any]:
    block = block_of(length, PART)
    return {"LENGTH": length, "PATCH": patch_size, "VECTOR": vector, "BLOCK_T": ELEMENTS // block, "BLOCK_E": block}


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles, see ``resplit_tokens.py``."""
    for name in ("fp16", "fp32"):
        kinds = dict.fromkeys(("images", "output", "grad_output", "grad_images"), f"*{name}:16")
        kinds |= dict.fromkeys(("index", "which"), "*i64:16")
        for kernel in (_forward_kernel, _backward_kernel):
            own = _constants(768, 16, 16 // ITEMSIZES[name]) | {"images_x": 1}
            own |= {"BLOCK_N": BLOCK_N} if kernel is _backward_kernel else {}
            yield kernel, f"{name} 16 pixels", signature_of(kernel, own, kinds), own, OPTIONS
