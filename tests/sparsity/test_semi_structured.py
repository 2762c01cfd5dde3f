"""Packed as torch's own conversion packs it, and back."""

from __future__ import annotations

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as torch_pack

from tersor.sparsity import pack_semi_structured, unpack_semi_structured

CASES = [
    (torch.float16, (32, 64)),
    (torch.float16, (96, 192)),
    (torch.bfloat16, (64, 128)),
    (torch.int8, (48, 256)),
    (torch.float32, (64, 96)),
]


def sparse(dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    """Some of its groups have fewer elements than they may."""
    group = 2 if dtype == torch.float32 else 4
    dense = torch.randint(-4, 5, shape).to(dtype)
    kept = torch.rand(shape[0], shape[1] // group, group).argsort(2) < group // 2
    return dense * kept.reshape(shape).to(dtype)


@pytest.mark.parametrize(("dtype", "shape"), CASES, ids=str)
def test_as_torch_packs_it(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    dense = sparse(dtype, shape)
    values, metadata = pack_semi_structured(dense)
    expected_values, expected_metadata = torch_pack(dense)
    assert torch.equal(values, expected_values)
    assert torch.equal(metadata, expected_metadata)
    assert torch.equal(unpack_semi_structured(values, metadata), dense)


@pytest.mark.parametrize("place", range(4))
def test_one_alone_in_its_group(place: int) -> None:
    dense = torch.zeros(32, 64, dtype=torch.float16)
    dense[:, place::4] = torch.randn(32, 16).half()
    values, metadata = pack_semi_structured(dense)
    assert torch.equal(metadata, torch_pack(dense)[1])
    assert torch.equal(unpack_semi_structured(values, metadata), dense)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at most 2 of every 4 elements that are not zero"):
        pack_semi_structured(torch.ones(32, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"multiples of 32 and 64 for torch\.float16, got shape \(32, 32\)"):
        pack_semi_structured(torch.zeros(32, 32, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"dense must be float16, bfloat16, float32 or int8, got torch\.float64"):
        pack_semi_structured(torch.zeros(32, 64, dtype=torch.float64))
    values, metadata = pack_semi_structured(torch.zeros(32, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"metadata must be torch\.int16 of shape \(32, 4\), got torch\.int32"):
        unpack_semi_structured(values, metadata.int())
    with pytest.raises(TypeError, match="values must be a matrix"):
        unpack_semi_structured(values.double(), metadata)
