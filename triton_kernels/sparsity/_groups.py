"""What the kernels over groups of M share: tiles of whole groups, and their bits in a packed mask.

Groups are runs of M elements in the order (O, KH, KW, I), and the mask's bits lie in that order. Eight groups fill M
bytes whatever M is, so a program that owns GROUPS, a multiple of eight, shares no byte of the mask with another. A tile
is ``[GROUPS, WIDTH]``, WIDTH the power of two from M on. A group's bits are its word, an int32.

Where the weight lies in the groups' order (a matrix, or channels last) a group is one piece of memory. Where it lies
channel by channel its elements are KH KW apart: single loads, whose other bytes the neighbours take from the caches,
and which move less than a copy in each direction would.
"""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.freezing.mask import check_mask
from tersor.sparsity.nm_pattern import _combinations, check_groups, check_pattern, combination_dtype
from tersor.sparsity.nm_sparsify import check_combinations
from tersor.triton_kernels.quantization._fake_quantize import NUM_WARPS, OPTIONS, SUMS, Case

ELEMENTS = NUM_WARPS * 32 * 8  # of twice as many, with their scores, some kernels spill, and others take 255 registers
CHUNK = 16  # combinations that are read at once: of 70, 80 lanes
# Constants, since the compiler then divides by multiplying: a run-time division is about 20 instructions, and there are
# three an element. A network has few pairs of them (ResNet-50: four).
IN_ORDER = {"INPUTS": 1, "TAPS": 1}


@triton.jit
def first_group(GROUPS: tl.constexpr):
    return tl.program_id(0).to(tl.int64) * GROUPS


@triton.jit
def places(
    first, size,
    M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Where the groups' elements lie, as a start and offsets ``[GROUPS, WIDTH]`` from there, and which exist."""
    group = tl.arange(0, GROUPS)[:, None]
    position = tl.arange(0, WIDTH)[None, :]
    present = (first + group < size // M) & (position < M)
    start = first * M
    offsets = group * M + position
    if TAPS != 1:
        element = (start + offsets).to(size.dtype)  # the GPU has no 64-bit division
        within = element % (INPUTS * TAPS)
        offsets = element - within + within % INPUTS * TAPS + within // INPUTS
        start = start * 0
    return start, offsets, present


@triton.jit
def spread(words, WIDTH: tl.constexpr):
    """Which positions the words keep, ``[GROUPS, WIDTH]``."""
    return ((words[:, None] >> tl.arange(0, WIDTH)[None, :]) & 1) != 0


@triton.jit
def gather(kept, WIDTH: tl.constexpr):
    """The words, of positions that are False from M on."""
    return tl.sum(kept.to(tl.int32) << tl.arange(0, WIDTH)[None, :], axis=1)


@triton.jit
def _shifted(bits, left):
    """``bits << left``, to the right where negative; what is moved by 31 or more is none of a byte or a word."""
    return tl.where(
        left >= 0, bits << tl.minimum(tl.maximum(left, 0), 31), bits >> tl.minimum(tl.maximum(-left, 0), 31)
    )


@triton.jit
def _bytes(first, size, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The places of M bytes for each eight groups, ``[GROUPS / 8, WIDTH]``, and which exist."""
    byte = tl.arange(0, WIDTH)[None, :]
    offsets = tl.arange(0, GROUPS // 8)[:, None] * M + byte
    start = first // 8 * M
    return start, offsets, (start + offsets < (size + 7) // 8) & (byte < M)


@triton.jit
def load_words(mask, first, size, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """The words of the packed mask, ``[GROUPS]``, each bit of a group that does not exist being 0."""
    start, offsets, present = _bytes(first, size, M, WIDTH, GROUPS)
    bytes = tl.load(mask + start + offsets, mask=present, other=0).to(tl.int32)
    left = tl.arange(0, WIDTH)[None, None, :] * 8 - tl.arange(0, 8)[None, :, None] * M
    words = tl.sum(_shifted(bytes[:, None, :], left) & ((1 << M) - 1), axis=2)  # [GROUPS / 8, 8]
    return tl.where(first + tl.arange(0, GROUPS) < size // M, tl.reshape(words, [GROUPS]), 0)


@triton.jit
def store_words(mask, words, first, size, M: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """Packs the words; those of groups that do not exist must be 0."""
    start, offsets, present = _bytes(first, size, M, WIDTH, GROUPS)
    left = tl.arange(0, 8)[None, None, :] * M - tl.arange(0, WIDTH)[None, :, None] * 8
    bytes = tl.sum(_shifted(tl.reshape(words, [GROUPS // 8, 1, 8]), left) & 255, axis=2)  # [GROUPS / 8, WIDTH]
    tl.store(mask + start + offsets, bytes.to(tl.uint8), mask=present)


@triton.jit
def kept_by(numbers, patterns, first, j, there, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """The words of the groups' j-th combinations: ``[1, CHUNK]`` where each has all, else ``[GROUPS, CHUNK]``."""
    if numbers is None:
        words = tl.load(patterns + j)[None, :]
    else:
        own = tl.arange(0, GROUPS)[:, None] * COUNT + j[None, :]
        number = tl.load(numbers + first * COUNT + own, mask=there, other=0).to(tl.int32)
        words = tl.load(patterns + (number & 4095))  # inside the table, whatever the number
    return words


class Groups:
    """A weight as its kernels take it: in the groups' order, or channel by channel, else a copy that is."""

    def __init__(self, where: str, weight: Tensor, n: int, m: int) -> None:
        check_pattern(where, n, m)
        check_groups(where, weight.shape, m)
        if weight.dtype not in SUMS:
            raise TypeError(f"{where}: the Triton kernels take float16, bfloat16 and float32, got {weight.dtype}")
        self.given, self.m = weight, m
        self.weight = weight if _in_order(weight) else weight.contiguous()
        self.ordered = _in_order(self.weight)
        self.layout = IN_ORDER if self.ordered else {"INPUTS": weight.shape[1], "TAPS": math.prod(weight.shape[2:])}

    def like(self, where: str, tensor: Tensor) -> Tensor:
        """Another tensor of the weight's shape, in its layout."""
        if tensor.shape != self.weight.shape or tensor.dtype != self.weight.dtype:
            given, own = f"{tensor.dtype} {tuple(tensor.shape)}", f"{self.weight.dtype} {tuple(self.weight.shape)}"
            raise ValueError(f"{where}: grad_output must be as weight, {own}, got {given}")
        if _in_order(tensor) if self.ordered else tensor.is_contiguous():
            return tensor
        return torch.empty_like(self.weight).copy_(tensor)

    def scores(self, where: str, scores: Tensor, n: int, combinations: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Those of the weight's groups, and their numbers if compact; contiguous."""
        check_triton_scores(where, scores, self.weight.numel() // self.m, n, self.m, combinations)
        return scores.contiguous(), None if combinations is None else combinations.contiguous()

    def mask(self, where: str, mask: Tensor) -> Tensor:
        check_mask(where, mask, self.weight.shape, self.weight.device)
        return mask.contiguous()

    def empty_mask(self) -> Tensor:
        return self.weight.new_empty(((self.weight.numel() + 7) // 8,), dtype=torch.uint8)

    def returned(self, result: Tensor) -> Tensor:
        """The result with the strides of the weight that was given."""
        return result if self.weight is self.given else torch.empty_like(self.given).copy_(result)

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """``kernel(*arguments, size, **constants, M, WIDTH, GROUPS, INPUTS, TAPS)`` over the groups, if any."""
        tile, size = tile_of(self.m) | self.layout, self.weight.numel()
        programs = triton.cdiv(size // self.m, tile["GROUPS"])
        if programs:
            with torch.cuda.device_of(self.weight):
                kernel[(programs,)](*arguments, size, **constants, **tile, **OPTIONS)


def check_triton_scores(
    where: str, scores: Tensor, groups: int | str, n: int, m: int, combinations: Tensor | None
) -> None:
    """Raises unless the scores, and the numbers of compact ones, have the shapes and dtypes of n:m's."""
    count = math.comb(m, n)
    if combinations is None:
        fit = scores.dim() == 2 and scores.shape[1] == count
    else:
        fit = scores.dim() == 2 and 1 <= scores.shape[1] <= count
    if scores.dtype != torch.float32 or not fit or (groups != "G" and len(scores) != groups):
        expected = f"({groups}, {count if combinations is None else f'1 to {count}'})"
        given = f"{scores.dtype} {tuple(scores.shape)}"
        raise ValueError(f"{where}: scores must be float32 of shape {expected}, got {given}")
    if combinations is not None:
        check_combinations(where, combinations, scores, combination_dtype(n, m))


def _in_order(tensor: Tensor) -> bool:
    """Whether memory has the elements in the order (O, KH, KW, I), without gaps."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).is_contiguous()


def tile_of(m: int) -> dict[str, int]:
    """The constants of a kernel over groups of ``m``."""
    width = triton.next_power_of_2(m)
    return {"M": m, "WIDTH": width, "GROUPS": ELEMENTS // width}


def chunks(count: int) -> dict[str, int]:
    """How many scores a group has, and how many are read at once."""
    return {"COUNT": count, "CHUNK": min(triton.next_power_of_2(count), CHUNK)}


def stored_counts(n: int, m: int, compact: bool) -> tuple[int, ...]:
    """How many scores a group has in the ahead-of-time cases: all, or an odd number and one that makes vectors."""
    count = math.comb(m, n)
    return (count // 3 | 1, 1 << (count // 2).bit_length() - 1) if compact else (count,)


@functools.cache
def patterns(n: int, m: int, device: torch.device) -> Tensor:
    """The positions that each combination keeps as the bits of an int32, with zeros to what its number could be."""
    words = (_combinations(n, m).to(torch.int64) << torch.arange(m)).sum(1)
    padded = torch.zeros(4096, dtype=torch.int32)
    padded[: len(words)] = words
    return padded.to(device)


def cases(
    kernel: Any,
    variants: dict[str, tuple[int, int, dict[str, Any]]],
    kinds: dict[str, str],
    data: Sequence[str],
    layout: dict[str, int],
) -> Iterator[Case]:
    """The ahead-of-time cases of a kernel over groups.

    Args:
        variants: n, m and the kernel's own constants, by label.
        kinds: of its arguments, where they are none of ``data``.
        data: its tensors of the weight's dtype.
        layout: of the weight, as INPUTS and TAPS.
    """
    for label, (_, m, own) in variants.items():
        for name in ("fp16", "bf16", "fp32"):
            constants = own | tile_of(m) | layout
            known = dict.fromkeys(data, f"*{name}:16") | {"mask": "*u8:16", "size": "i32"} | kinds
            signature = {a: known[a] for a in kernel.arg_names if a not in constants}
            yield kernel, f"{label} {name}", signature, constants, OPTIONS


def ahead_of_time_cases() -> Iterator[Case]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
