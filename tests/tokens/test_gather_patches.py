"""Patches by index: a patch embedding of the chosen ones is the convolution's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

OPERATORS = ("gather_patches_forward", "gather_patches_backward")
PATCH = 2


def _index(batch: int, patches: int, device: str = "cpu") -> Tensor:
    place = torch.arange(batch * max(1, patches // 2), device=device).view(batch, -1)
    return (place * 5 + 1) % patches


def _given(images: Any) -> tuple[Tensor, Tensor]:
    """Index and rows: images in reverse order, the last one of them twice."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        return torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    batch, _, height, width = images.shape
    rows = torch.arange(batch - 1, -2, -1, device=images.device).clamp(min=0)
    return _index(batch + 1, height // PATCH * (width // PATCH), str(images.device)), rows


def _function(images: Any) -> Tensor:
    index, rows = _given(images)
    return tersor.gather_patches(images, index, PATCH, rows)


def _plain(images: Any) -> Tensor:
    index, _ = _given(images)
    return tersor.gather_patches(images, index[:-1] if isinstance(images, Tensor) else index, PATCH)


def _unfold(images: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    columns = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    return torch.stack([columns[row, own] for row, own in zip(rows, index, strict=True)])


def _exact(images: Tensor) -> Tensor:
    return _unfold(images, *_given(images))


def _exact_plain(images: Tensor) -> Tensor:
    return _unfold(images, _given(images)[0][:-1], torch.arange(len(images), device=images.device))


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, dtype=dtype, device=device),)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    (images,) = _inputs(size, dtype, device)
    index, rows = _given(images)
    if name == OPERATORS[0]:
        return images, index, rows, PATCH
    grad = torch.randn((*index.shape, size[1] * PATCH**2), dtype=dtype, device=device)
    return grad, index, rows, PATCH, list(size)


def _raw_plain(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    first, index, _, *rest = _raw(name, size, dtype, device)
    batch = size[0]
    return first[:batch], index[:batch], None, *rest


SIZES = [(2, 3, 4, 6), (3, 2, 4, 6), (1, 1, 2, 2), (2, 5, 8, 8)]
SUBJECTS = [
    Subject(_plain, _exact_plain, _inputs, (), OPERATORS, _raw_plain, SIZES, autocast=False, name="gather_patches"),
    Subject(_function, _exact, _inputs, (), OPERATORS, _raw, SIZES, autocast=False, name="gather_patches_rows"),
]


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 20), st.booleans())
def test_embedding_of_the_chosen_patches(
    batch: int, channels: int, high: int, wide: int, patch: int, channels_last: bool
) -> None:
    images = torch.randn(batch, channels, high * patch, wide * patch, dtype=torch.float64)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    weight = torch.randn(4, channels, patch, patch, dtype=torch.float64)
    index = torch.randint(0, high * wide, (batch, 3))
    output = F.linear(tersor.gather_patches(images, index, patch), weight.flatten(1))
    tokens = F.conv2d(images, weight, stride=patch).flatten(2).transpose(1, 2)
    expected = torch.gather(tokens, 1, index[..., None].expand(-1, -1, 4))
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    given = torch.autograd.grad(output, images, grad)[0]
    torch.testing.assert_close(given, torch.autograd.grad(expected, images, grad)[0])


def test_out_of_range(run: tuple[str, str]) -> None:
    images = torch.randn(2, 1, 4, 4, device=run[0])
    index, rows = torch.tensor([[0, 4], [1, -1], [2, 3]], device=run[0]), torch.tensor([1, 0, 2], device=run[0])
    if run[0] == "cpu":
        with pytest.raises(ValueError, match="index must be from 0 to 3, got -1 to 4"):
            tersor.gather_patches(images, index, 2, rows.clamp(max=1))
        with pytest.raises(ValueError, match="rows must be from 0 to 1, got 0 to 2"):
            tersor.gather_patches(images, index.clamp(0, 3), 2, rows)
    output = torch.ops.tersor.gather_patches_forward(images, index, rows, 2)
    assert output[..., 0].isnan().tolist() == [[False, True], [False, True], [True, True]]
    grad = torch.ops.tersor.gather_patches_backward(torch.ones_like(output), index, rows, 2, [2, 1, 4, 4])
    assert grad[:, 0, ::2, ::2].flatten(1).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_bad_input() -> None:
    images, index = torch.randn(2, 3, 32, 32), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="H and W multiples of 16, got shape"):
        tersor.gather_patches(images[..., :30], index)
    with pytest.raises(ValueError, match="patch_size must be at least 1, got 0"):
        tersor.gather_patches(images, index, 0)
    with pytest.raises(TypeError, match="patch_size must be an int, got float"):
        tersor.gather_patches(images, index, 16.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"rows must be int64, got torch\.float32"):
        tersor.gather_patches(images, index, 16, torch.zeros(2))
    with pytest.raises(ValueError, match=r"rows must be \(M,\), got shape \(2, 1\)"):
        tersor.gather_patches(images, index, 16, index)
    with pytest.raises(ValueError, match=r"index must be \(B, m\) with B = 3"):
        tersor.gather_patches(images, index, 16, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"rows must be a torch\.Tensor, got list"):
        tersor.gather_patches(images, index, 16, [0, 1])  # type: ignore[arg-type]
