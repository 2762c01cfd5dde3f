"""Packing of codes: the round trip, the layout, the size, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.quantization.pack_codes import pack_codes, packed_size, unpack_codes


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(1, 8))
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 2**bits, shape).to(dtype), bits


@given(problem=problems())
def test_round_trip(problem: tuple[torch.Tensor, int]) -> None:
    codes, bits = problem
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(codes.numel() * bits / 8),) == (packed_size(codes.numel(), bits),)
    result = unpack_codes(packed, bits, codes.shape)
    assert result.dtype == torch.uint8
    assert result.shape == codes.shape
    assert torch.equal(result.long(), codes.long())


@given(problem=problems())
def test_layout(problem: tuple[torch.Tensor, int]) -> None:
    """One stream of bits, each code's lowest first, and zeros at the end: numpy packs the same."""
    codes, bits = problem
    stream = (codes.flatten().long().numpy()[:, None] >> np.arange(bits)) & 1
    expected = np.packbits(stream.flatten().astype(np.uint8), bitorder="little")
    assert pack_codes(codes, bits).numpy().tolist() == expected.tolist()


def test_strides_and_sizes() -> None:
    codes = torch.arange(4 * 6).reshape(4, 6) % 4
    assert torch.equal(unpack_codes(pack_codes(codes.T, 2), 2, (6, 4)).long(), codes.T)
    weights = torch.zeros(64, 64, 3, 3, dtype=torch.uint8)
    assert pack_codes(weights, 2).numel() * 16 == weights.numel() * 4  # a sixteenth of float32


@pytest.mark.parametrize(
    ("codes", "bits", "error", "message"),
    [
        (torch.tensor([4]), 2, ValueError, r"codes must lie from 0 to 3 for bits 2, got 4 to 4"),
        (torch.tensor([-1, 1]), 8, ValueError, r"codes must lie from 0 to 255 for bits 8, got -1 to 1"),
        (torch.tensor([1.0]), 2, TypeError, r"codes must be a tensor of uint8.*got torch\.float32"),
        ([1], 2, TypeError, "codes must be a tensor of uint8.*got list"),
        (torch.tensor([1]), 0, ValueError, "bits must be 1 to 8, got 0"),
        (torch.tensor([1]), 9, ValueError, "bits must be 1 to 8, got 9"),
        (torch.tensor([1]), 2.0, TypeError, "bits must be an int, got float"),
    ],
)
def test_bad_codes(codes: object, bits: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="pack_codes: " + message):
        pack_codes(codes, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("packed", "bits", "shape", "error", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), 2, (3,), ValueError, r"packed must have shape \(1,\).*got \(2,\)"),
        (torch.zeros(1, 1, dtype=torch.uint8), 2, (3,), ValueError, r"packed must have shape \(1,\).*got \(1, 1\)"),
        (torch.zeros(1, dtype=torch.uint8), 2, (-1, 3), ValueError, "packed must have shape"),
        (torch.zeros(1), 2, (3,), TypeError, r"packed must be a tensor of uint8, got torch\.float32"),
        (torch.zeros(1, dtype=torch.uint8), 2, (1.5,), TypeError, "shape must be an int, got float"),
        (torch.zeros(1, dtype=torch.uint8), 9, (1,), ValueError, "bits must be 1 to 8, got 9"),
    ],
)
def test_bad_packed(packed: object, bits: object, shape: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="unpack_codes: " + message):
        unpack_codes(packed, bits, shape)  # type: ignore[arg-type]
