"""Bilinear resizing between corners: the published coordinates, in float32 for every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tersor


def _loop(row: Tensor, size: int) -> Tensor:
    """One row of pixels, from the formula, with float32 coordinates."""
    length, pixels = len(row), []
    step = torch.tensor(float(length - 1)) / max(1, size - 1)
    for t in range(size):
        place = t * step
        low = int(place)
        share = (place - low).double()
        pixels.append((1 - share) * row[low] + share * row[min(low + 1, length - 1)])
    return torch.stack(pixels)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_any_size(height: int, width: int, to_height: int, to_width: int) -> None:
    images = torch.randn(1, 2, height, width, dtype=torch.float64)
    wide = torch.stack([_loop(row, to_width) for row in images.flatten(0, 2)]).view(1, 2, height, to_width)
    columns = wide.transpose(2, 3).flatten(0, 2)
    expected = torch.stack([_loop(column, to_height) for column in columns]).view(1, 2, to_width, to_height)
    expected = expected.transpose(2, 3)
    torch.testing.assert_close(tersor.resize_align_corners(images, (to_height, to_width)), expected)
    given = tersor.resize_align_corners(images.float(), (to_height, to_width))
    torch.testing.assert_close(given, expected.float(), rtol=1e-5, atol=2e-6)


def test_gradient_and_other_types() -> None:
    images = torch.randn(2, 1, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tersor.resize_align_corners(x, 3), images)
    assert tersor.resize_align_corners(images, (6, 4)) is images
    for dtype in (torch.float16, torch.bfloat16):
        half = tersor.resize_align_corners(images.detach().to(dtype), 3)
        exact = tersor.resize_align_corners(images.detach().to(dtype).double(), 3)
        torch.testing.assert_close(half.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_the_larger_of_the_published_sizes() -> None:
    """448 to 224, where double coordinates would be off by 2e-4."""
    images = torch.randn(1, 1, 448, 448)
    ours = tersor.resize_align_corners(images.double(), 224)
    torch.testing.assert_close(tersor.resize_align_corners(images, 224).double(), ours, rtol=0, atol=3e-6)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got shape \(3, 4, 4\)"):
        tersor.resize_align_corners(torch.zeros(3, 4, 4), 2)
    with pytest.raises(ValueError, match="size must be an int or two ints of at least 1, got 0"):
        tersor.resize_align_corners(torch.zeros(1, 3, 4, 4), 0)
    with pytest.raises(TypeError, match="size must be an int or two ints, got float"):
        tersor.resize_align_corners(torch.zeros(1, 3, 4, 4), 2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images must be float16"):
        tersor.resize_align_corners(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 2)
