"""What is special to the sum of two quantised tensors."""

from __future__ import annotations

import functools

import pytest
import torch
from quantizers import subject, values
from straight_through import ddtb

from tersor.quantization import fake_quantize_add, fake_quantize_bounds


def _exact(x, other, lower, upper, other_lower, other_upper, bits):
    return ddtb(x, lower, upper, bits) + ddtb(other, other_lower, other_upper, bits)


def _subject(bits: int, along: str = ""):
    function, exact = (functools.partial(f, bits=bits) for f in (fake_quantize_add, _exact))
    parameters = [(-0.75, -0.05), (1.5, 0.1), (-1.1, -0.07), (0.9, 0.03)]
    constants = (bits, "half", 1.0)
    return subject(function, exact, "fake_quantize_add", parameters, (), constants, along, inputs=2)


SUBJECTS = [_subject(2), _subject(4, "_per_sample")]


def test_equals_its_parts(run: tuple[str, str]) -> None:
    x, other = values((2, 3, 4, 5), torch.float32, run[0]), values((2, 3, 4, 5), torch.float32, run[0], 5.0)
    bounds = [torch.tensor([b], device=run[0]) for b in (-0.7, 1.1)]
    per_sample = [torch.tensor([[[[b]]], [[[2 * b]]]], device=run[0]) for b in (-0.4, 0.6)]
    for first, second in ((bounds, per_sample), (per_sample, bounds)):
        fused, parts = [], []
        for results, fuse in ((fused, True), (parts, False)):
            tensors = [t.clone().requires_grad_() for t in (x, other, *first, *second)]
            if fuse:
                output = fake_quantize_add(*tensors, 3)
            else:
                a, b, *limits = tensors
                output = fake_quantize_bounds(a, *limits[:2], 3) + fake_quantize_bounds(b, *limits[2:], 3)
            results += [output, *torch.autograd.grad(output.square().sum(), tensors)]
        assert torch.equal(fused[0], parts[0])
        for a, b in zip(fused[1:], parts[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_bad_arguments() -> None:
    x, low, high = torch.randn(2, 3), torch.tensor([-1.0]), torch.tensor([1.0])
    with pytest.raises(ValueError, match=r"other must have the shape of input \(2, 3\), got \(3, 2\)"):
        fake_quantize_add(x, x.T, low, high, low, high, 4)
    with pytest.raises(ValueError, match=r"\(other\): lower must be less than upper, got lower 1\.0 and upper -1\.0"):
        fake_quantize_add(x, x, low, high, high, low, 4)
    assert torch.equal(fake_quantize_add(x, x, low, high, low, high, 32), x + x)
