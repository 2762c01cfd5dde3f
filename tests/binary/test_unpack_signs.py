"""From bits to a map; what is packed is in test_pack_signs.py."""

from __future__ import annotations

from typing import Any

import torch
from subject import Subject
from torch import Tensor

from tersor.binary import PackedSigns, pack_signs, unpack_signs


def _words(size: Any, device: str) -> Tensor:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    words = pack_signs(torch.randn(size).round().to(device)).words
    torch.random.set_rng_state(state)
    return words


def _function(map: Any) -> Tensor:
    words = pack_signs(map).words
    return unpack_signs(PackedSigns(words, map.shape[1]), map.dtype, True)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return _words(size, device), size[1], dtype, False


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size).round().to(device, dtype),)


SUBJECTS = [
    Subject(
        _function, torch.sign, _inputs, (), ("unpack_signs",), _raw,
        [(2, 3, 4, 5), (3, 2, 5, 7), (1, 2, 1, 1), (2, 70, 9, 17)],
        differentiable=False, autocast=False, alike=False, skips=True, in_forward=False, name="unpack_signs",
    )
]  # fmt: skip


def test_zeros_stay_zeros(run: tuple[str, str]) -> None:
    x = torch.randn(2, 67, 4, 9).mul(2).round().to(run[0])
    for last in (False, True):
        for dtype in (torch.float32, torch.float16):
            map = unpack_signs(pack_signs(x), dtype, last)
            assert map.dtype == dtype
            assert torch.equal(map, torch.sign(x).to(dtype))
            assert map.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
