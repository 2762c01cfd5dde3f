"""What the kernels over weights with a packed mask share: tiles of whole mask bytes.

An octet is the eight elements whose bits share a byte of the mask. A program owns OCTETS of them, ``[OCTETS, 8]`` in a
kernel, so that it reads and writes bytes that no other program touches. What is skipped for being frozen is skipped by
whole octets: in float32 these are the 32 bytes that the memory moves at a time, and a mask of single elements would
make 16-byte loads single ones. The frozen elements of an octet that is not all frozen are written back as they were.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.freezing.mask import check_mask
from tersor.triton_kernels.quantization._fake_quantize import ELEMENTS, OPTIONS, SUMS, WORD, Case

OCTETS = ELEMENTS // 8  # 16 elements a thread, as the fake-quantisers have


@triton.jit
def octets(size, VECTOR: tl.constexpr, OCTETS: tl.constexpr):
    """Where this program's elements start, their offsets from there, and which exist; VECTOR divides ``size``."""
    start = tl.program_id(0).to(tl.int64) * (OCTETS * 8)
    offsets = tl.arange(0, OCTETS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return start, offsets, start + offsets < size // VECTOR * VECTOR  # whole vectors exist or do not


@triton.jit
def load_bytes(frozen, start, size, OCTETS: tl.constexpr):
    """The octets' bytes of the mask, ``[OCTETS]``; 255 beyond the end, where there is nothing to load either."""
    octet = tl.arange(0, OCTETS)
    return tl.load(frozen + start // 8 + octet, mask=start + octet * 8 < size, other=255).to(tl.int32)


@triton.jit
def store_bytes(frozen, start, size, bytes, OCTETS: tl.constexpr):
    octet = tl.arange(0, OCTETS)
    tl.store(frozen + start // 8 + octet, bytes.to(tl.uint8), mask=start + octet * 8 < size)


@triton.jit
def unpack(bytes):
    """Which elements are frozen, ``[OCTETS, 8]``."""
    return ((bytes[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def pack(elements):
    """The bytes, ``[OCTETS]``."""
    return tl.sum(elements.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)


def launch(kernel: Any, size: int, *arguments: Any, programs: int | None = None, **constants: Any) -> None:
    """Launches ``kernel(*arguments, size, **constants, VECTOR, OCTETS)`` over all octets; none, no launch."""
    programs = triton.cdiv(size, ELEMENTS) if programs is None else programs
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, size, **constants, **_tile(size), **OPTIONS)


def whole_words(size: int) -> int:
    """The programs over ``size`` elements, so many that what they leave is read by whole words."""
    return triton.cdiv(triton.cdiv(size, ELEMENTS), WORD) * WORD


def _tile(size: int) -> dict[str, int]:
    return {"VECTOR": math.gcd(size, 8), "OCTETS": OCTETS}


@contextlib.contextmanager
def in_place(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """The tensors for a kernel that changes them, contiguous; where that takes a copy, it is copied back.

    Neither counts as a change for autograd, which the operators' callers see to.
    """
    own = [None if t is None else t.contiguous() for t in tensors]
    yield own
    for tensor, changed in zip(tensors, own, strict=True):
        if tensor is not None and changed is not None and changed is not tensor:
            tensor.data.copy_(changed)


def check(where: str, first: Tensor, frozen: Tensor, **others: Tensor | None) -> None:
    """What a kernel would answer with a read outside a tensor, or not at all."""
    if first.dtype not in SUMS:
        raise TypeError(f"{where}: the Triton kernels take float16, bfloat16 and float32, got {first.dtype}")
    check_mask(where, frozen, first.shape, first.device)
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != first.shape:
            raise ValueError(f"{where}: {name} must have shape {tuple(first.shape)}, got {tuple(tensor.shape)}")


def cases(
    kernel: Any, variants: dict[str, dict[str, Any]], kinds: dict[str, str], data: Sequence[str]
) -> Iterator[Case]:
    """The ahead-of-time cases of a kernel over octets.

    Args:
        variants: values of the kernel's own constants, by label.
        kinds: of its arguments, where they are none of ``data``.
        data: its tensors of the weight's dtype.
    """
    for label, own in variants.items():
        for name in ("fp16", "bf16", "fp32"):
            constants = own | {k: v for k, v in _tile(1 << 20).items() if k in kernel.arg_names}
            known = dict.fromkeys(data, f"*{name}:16") | {"frozen": "*u8:16", "size": "i32"} | kinds
            signature = {a: known[a] for a in kernel.arg_names if a not in constants}
            yield kernel, f"{label} {name}".strip(), signature, constants, OPTIONS


def ahead_of_time_cases() -> Iterator[Case]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
