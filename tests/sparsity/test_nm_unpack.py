"""Packing and unpacking are inverse, the index is as documented, and nothing damaged is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_problem import PATTERNS, packed_weight
from subject import Subject
from torch import Tensor

import tersor
from tersor.sparsity import nm_pack, nm_unpack
from tersor.sparsity.nm_pack import check_index
from tersor.sparsity.nm_unpack import unpack_rows


def _index(rows: int, n: int, m: int) -> Tensor:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    index = packed_weight((rows, 7 * m), n, m)[2]
    torch.random.set_rng_state(generator)
    return index


def _subject(n: int, m: int) -> Subject:
    index = _index(11, n, m)

    def index_of(values: Any) -> Tensor:
        return index.to(values.device if isinstance(values, Tensor) else "cpu")

    def inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        return (torch.randn(11, *size, n).to(device, dtype),)

    return Subject(
        function=lambda values: nm_unpack(values, index_of(values), n, m),
        exact=lambda values: unpack_rows(values, index_of(values), n, m),
        inputs=inputs,
        options=(),
        operators=("nm_unpack",),
        raw=lambda name, size, dtype, device: (*inputs(size, dtype, device), index.to(device, copy=True), n, m),
        sizes=[(7,)],
        differentiable=False,
        autocast=False,
        alike=False,
        skips=True,
        name=f"nm_unpack_{n}of{m}",
    )


SUBJECTS = [_subject(2, 4), _subject(5, 12)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "{}of{}".format(*p))
def test_pack_and_unpack_are_inverse(pattern: tuple[int, int], run: tuple[str, str]) -> None:
    n, m = pattern
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for shape, kernel in (((37, 5 * m), None), ((7, 5 * m, 3, 2), (3, 2)), ((0, m), None), ((3, 0), None)):
            weight, values, index = (t.to(run[0]) for t in packed_weight(shape, n, m, dtype))
            assert torch.equal(nm_unpack(values, index, n, m, kernel), weight)
            again = nm_pack(weight, None, n, m)
            assert all(torch.equal(a, b) for a, b in zip(again, (values, index), strict=True))


def test_packed_masks_are_taken() -> None:
    """As the removal of scores returns them."""
    scores = torch.rand(6, 6)
    mask = tersor.sparsity.nm_remove_(scores, 5, 2, 4)
    weight = torch.randn(2, 12)
    kept = (scores != 0).float() @ tersor.sparsity.nm_combinations(2, 4) > 0
    assert torch.equal(nm_unpack(*nm_pack(weight, mask, 2, 4), 2, 4), torch.where(kept.view(2, 12), weight, 0))
    assert torch.equal(mask, tersor.sparsity.nm_mask(scores, 2, 4))


def test_index_is_as_documented() -> None:
    def index(row: list[float], n: int, m: int) -> list[int]:
        return nm_pack(torch.tensor([row]).float(), None, n, m)[1][0].tolist()

    assert index([0, 1, 1, 0], 1, 2) == [0b01]
    assert index([0, 0, 1, 0, 0, 1, 0, 0], 1, 4) == [2 | 1 << 2]
    assert index([0] * 9 + [1] + [0] * 22, 1, 16) == [9]
    assert index([0, 1, 0, 1, 1, 0, 1, 0], 2, 4) == [1 | 3 << 2 | 0 << 4 | 2 << 6]
    assert index([1, 0, 1, 1], 3, 4) == [0b1101]
    assert index([1, 0, 0, 1, 0, 0, 1, 1], 4, 8) == [0b11001001]
    assert index([1] + [0] * 9 + [1, 1], 3, 12) == [1, 0b1100]
    # Too few: the lowest free places.
    assert index([0, 0, 0, 5, 0, 0, 0, 0], 2, 4) == [0 | 3 << 2 | 0 << 4 | 1 << 6]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "{}of{}".format(*p))
def test_damaged_index(pattern: tuple[int, int]) -> None:
    """Is told from a right one by its codes, and touches no other memory."""
    n, m = pattern
    _, values, index = packed_weight((33, 7 * m), n, m)
    check_index("index", index, 7, n, m)
    for byte in (0, 255, 0b10110110):
        assert nm_unpack(values, torch.full_like(index, byte), n, m).shape == (33, 7 * m)
    if n > 1 or m in (3, 7):
        with pytest.raises(ValueError, match=f"index: .* groups do not have {n} places below {m}"):
            check_index("index", torch.full_like(index, 255), 7, n, m)


@pytest.mark.parametrize(
    ("weight", "mask", "pattern", "error", "message"),
    [
        (torch.ones(2, 6), None, (2, 4), ValueError, "multiple of m = 4"),
        (torch.ones(2, 6, 2, 2), None, (2, 4), ValueError, "multiple of m = 4"),
        (torch.ones(2, 8), None, (2, 4), ValueError, "at most 2 of every 4 elements must be kept, got a group with 4"),
        (torch.ones(2, 8), torch.ones(2, 8), (2, 4), TypeError, "mask must be a bool tensor"),
        (torch.ones(2, 8), torch.ones(8, 2).bool(), (2, 4), ValueError, "mask must have the shape"),
        (torch.ones(2, 8).long(), None, (2, 4), TypeError, "weight must be float16"),
        (torch.full((2, 8), float("nan")), None, (2, 4), ValueError, "weight must be finite, got 16"),
        (torch.ones(8), None, (2, 4), ValueError, r"weight must be \(O, I\)"),
        (torch.ones(2, 8), None, (0, 4), ValueError, "1 <= n < m"),
        (torch.ones(2, 32), None, (2, 32), ValueError, "m <= 16"),
    ],
)
def test_bad_packing(
    weight: Tensor, mask: Tensor | None, pattern: tuple[int, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nm_pack(weight, mask, *pattern)


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        ((3, 2), ValueError, "kernel_size must divide a row of 20 elements"),
        (("a", 1), TypeError, "kernel_size must be"),
    ],
)
def test_bad_unpacking(kernel: Any, error: type[Exception], message: str) -> None:
    _, values, index = packed_weight((3, 20), 2, 4)
    with pytest.raises(error, match=message):
        nm_unpack(values, index, 2, 4, kernel)
