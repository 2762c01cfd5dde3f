"""The layout in which torch's own semi-structured kernels take a 2:4 sparse matrix (1:2 for float32)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# By group element size: elements of a group, kept ones, groups in a word, the word's dtype.
_HALF = (4, 2, 4, torch.int16)
_KINDS = {
    torch.float16: _HALF,
    torch.bfloat16: _HALF,
    torch.int8: (4, 2, 8, torch.int32),
    torch.float32: (2, 1, 4, torch.int16),
}
_ROWS, _COLUMNS = {2: 32, 4: 32, 1: 16}, {2: 64, 4: 32, 1: 128}  # by bytes of an element: what sizes are multiples of


def pack_semi_structured(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of a 2:4 sparse matrix as ``torch.sparse.SparseSemiStructuredTensorCUTLASS`` keeps them.

    An element counts as there unless it is zero. Of a group with fewer than two of them zeros are kept as well.

    Args:
        dense: ``(rows, columns)``, contiguous; float16 or bfloat16 with rows and columns multiples of 32 and 64, int8
            (16 and 128), or float32 (32 and 32), of which one in every two is kept.

    Returns:
        Values ``(rows, columns / 2)``, and the metadata in int16, ``(rows, columns / 16)`` (float32: columns / 8), or
        for int8 in int32, ``(rows, columns / 32)``.

    Raises:
        TypeError: ``dense`` is not a tensor of these types.
        ValueError: its sizes are not such multiples, or a group has too many elements that are not zero.
    """
    name = "pack_semi_structured"
    group, kept, per_word, word = _kind(name, dense)
    rows, columns = dense.shape
    groups = dense.reshape(rows, columns // group, group)
    there = groups != 0
    if (there.sum(2) > kept).any():
        raise ValueError(f"{name}: dense must have at most {kept} of every {group} elements that are not zero")
    places = _places(there, group)
    values = groups.gather(2, places if group == 4 else places[..., :1]).reshape(rows, columns // 2)
    if group == 2:  # a group of two is one of four pairs: the first pair of places or the last
        first = there[..., 0]
        nibbles = torch.where(first, 0x4, 0xE)
    else:
        nibbles = places[..., 0] | places[..., 1] << 2
    shifts = torch.arange(per_word, device=dense.device) * 4
    words = (nibbles.reshape(rows, -1, per_word) << shifts).sum(2)
    limit = 1 << (4 * per_word - 1)
    words = torch.where(words >= limit, words - 2 * limit, words).to(word)
    return values, _reordered(words)


def unpack_semi_structured(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense matrix that :func:`pack_semi_structured` packed.

    Raises:
        TypeError, ValueError: the two do not belong together.
    """
    name = "unpack_semi_structured"
    if not isinstance(values, Tensor) or values.dtype not in _KINDS or values.dim() != 2:
        raise TypeError(f"{name}: values must be a matrix of {', '.join(map(str, _KINDS))}")
    group, _, per_word, word = _KINDS[values.dtype]
    rows, columns = values.shape[0], 2 * values.shape[1]
    if metadata.dtype != word or tuple(metadata.shape) != (rows, columns // group // per_word):
        raise ValueError(
            f"{name}: metadata must be {word} of shape {(rows, columns // group // per_word)}, "
            f"got {metadata.dtype} of shape {tuple(metadata.shape)}"
        )
    order = _order(rows, metadata.shape[1], word, metadata.device)
    flat = metadata.flatten()[order].reshape(rows, -1).long()
    nibbles = (flat[..., None] >> torch.arange(per_word, device=flat.device) * 4 & 15).reshape(rows, -1)
    dense = values.new_zeros(rows, columns // group, group)
    if group == 2:
        first = (nibbles == 0x4).to(values.dtype)
        dense[..., 0], dense[..., 1] = values * first, values * (1 - first)
        return dense.reshape(rows, columns)
    places = torch.stack([nibbles & 3, nibbles >> 2], dim=2)
    return dense.scatter(2, places, values.reshape(rows, -1, 2)).reshape(rows, columns)


def _kind(name: str, dense: Any) -> tuple[int, int, int, torch.dtype]:
    if not isinstance(dense, Tensor) or dense.dtype not in _KINDS:
        given = dense.dtype if isinstance(dense, Tensor) else type(dense).__name__
        raise TypeError(f"{name}: dense must be float16, bfloat16, float32 or int8, got {given}")
    size = dense.element_size()
    if dense.dim() != 2 or dense.shape[0] % _ROWS[size] or dense.shape[1] % _COLUMNS[size] or not dense.numel():
        raise ValueError(
            f"{name}: dense must have rows and columns that are multiples of {_ROWS[size]} and {_COLUMNS[size]} for "
            f"{dense.dtype}, got shape {tuple(dense.shape)}"
        )
    return _KINDS[dense.dtype]


def _places(there: Tensor, group: int) -> Tensor:
    """Of every group the two places that are kept, ascending; for pairs the one, twice."""
    if group == 2:
        place = torch.where(there[..., 0], 0, 1)
        return torch.stack([place, place], dim=2)
    count, first = there.sum(2), there.int().argmax(2)
    last = 3 - there.flip(2).int().argmax(2)
    # One alone goes with the last place, or, being at 2 or 3, like none with both last ones.
    low = torch.where(count == 2, first, torch.where((count == 1) & (first < 2), first, 2))
    high = torch.where(count == 2, last, torch.where((count == 1) & (first == 0), 2, 3))
    high = torch.where((count == 1) & (first == 1), 2, high)
    return torch.stack([low, high], dim=2)


def _order(rows: int, columns: int, word: torch.dtype, device: torch.device) -> Tensor:
    """Where in the flat array each word, row by row, goes."""
    r, c = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None, :]
    span, step = (32, 4) if word == torch.int16 else (16, 2)
    r = r // span * span + r % 8 * step + r % span // 8
    r, c = r.expand(rows, columns), c.expand(rows, columns)
    down, up = (r % 2 == 0) & (c % 2 == 1), (r % 2 == 1) & (c % 2 == 0)
    r, c = torch.where(down, r + 1, torch.where(up, r - 1, r)), torch.where(down, c - 1, torch.where(up, c + 1, c))
    return (c // 2 * 2 * rows + 2 * r + c % 2).flatten()


def _reordered(words: Tensor) -> Tensor:
    flat = torch.empty_like(words).flatten()
    flat[_order(words.shape[0], words.shape[1], words.dtype, words.device)] = words.flatten()
    return flat.reshape(words.shape)
