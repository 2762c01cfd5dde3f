"""What the kernels over words of 64 signs share: how many bits are set, and 32 bits made one number.

A thread's counting of bits is one instruction of the GPU, which Triton has no name for; the interpreter, and a GPU
of another maker, count by arithmetic.
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

WORD = 64  # channels
HALF = 32
MOST = 2**31 - 4096  # positions of an image, so that those of a program that has its last one are int32 too


@triton.jit
def count_bits(words, ASSEMBLY: tl.constexpr):
    """The set bits of each int64."""
    if ASSEMBLY:
        counts = tl.inline_asm_elementwise("popc.b64 $0, $1;", "=r,l", [words], dtype=tl.int32, is_pure=True, pack=1)
    else:
        counts = count_bits_by_arithmetic(words)
    return counts


@triton.jit
def count_bits_by_arithmetic(words):
    """In pairs, fours and eights of bits, which a multiplication then adds up in the topmost eight."""
    pairs = words - ((words >> 1) & 0x5555555555555555)
    fours = (pairs & 0x3333333333333333) + ((pairs >> 2) & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((eights * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def pack_bits(bits, lane):
    """Of ``[ROWS, COLUMNS]`` bits a number for each row, with the bit of a column at its ``lane``."""
    return tl.sum(bits.to(tl.int32) << lane[None, :], axis=1)


def use_assembly() -> bool:
    """Whether a launch of now compiles for a GPU that has the instruction."""
    return torch.version.cuda is not None and not triton.knobs.runtime.interpret


def check_words(where: str, signs: Tensor) -> None:
    """What a kernel would answer with a read outside a tensor."""
    if signs.dim() == 6 and signs.shape[2] * signs.shape[3] > MOST:
        raise ValueError(f"{where}: signs must have at most {MOST} positions an image, got {tuple(signs.shape)}")
    if signs.dtype != torch.int64 or signs.dim() != 6 or signs.shape[0] != 2:
        raise ValueError(
            f"{where}: signs must be int64 (2, N, H, W, groups, words), got {signs.dtype} of {tuple(signs.shape)}"
        )


def ahead_of_time_cases() -> Iterator[Case]:
    """None of its own: what is here is compiled with the kernels that call it."""
    return iter(())
