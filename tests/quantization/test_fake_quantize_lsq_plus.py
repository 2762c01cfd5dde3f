"""What is special to LSQ+."""

from __future__ import annotations

import functools

import pytest
import straight_through
import torch
from quantizers import subject

from tersor.quantization import fake_quantize_lsq_plus, lsq_plus_parameters


def _subject(bits: int, along: str = ""):
    function = functools.partial(fake_quantize_lsq_plus, bits=bits, grad_factor=0.5)
    exact = functools.partial(straight_through.lsq_plus, levels=2**bits - 1, grad_factor=0.5)
    parameters = [(0.25, 0.0625), (-0.625, -0.125)]
    return subject(function, exact, "fake_quantize_lsq_plus", parameters, (), (2**bits - 1, 0.5), along)


SUBJECTS = [_subject(3), _subject(2, "_per_channel")]


def test_first_parameters() -> None:
    scale, offset = lsq_plus_parameters(torch.tensor([[-1.0, 2.0], [0.5, 0.0]]), 2)
    assert (scale.tolist(), offset.tolist()) == ([1.0], [-1.0])


def test_bad_parameters(run: tuple[str, str]) -> None:
    x, good = torch.randn(3), torch.ones(1)
    with pytest.raises(ValueError, match="scale must be finite and greater than 0"):
        fake_quantize_lsq_plus(x, -good, good, 4)
    with pytest.raises(ValueError, match="offset must be finite"):
        fake_quantize_lsq_plus(x, good, good / 0, 4)
