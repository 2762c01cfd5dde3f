"""Convolution of signs in training: exact sums, gradients of conv2d at the signs, bits kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor import _backends
from tersor.binary import binary_conv2d, binary_linear

native = _backends._introspection()


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def exact(input: Tensor, weight: Tensor, *window: Any) -> Tensor:
    return F.conv2d(_Through.apply(input), _Through.apply(weight), None, *window)


WINDOW = ((2, 1), (1, 2), (1, 2), 2)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    batch, channels, height, width = size
    tensors = torch.randn(batch, 2 * channels, height, width), torch.randn(6, channels, 3, 2)
    return tuple(t.mul(2).round().to(device, dtype) for t in tensors)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    input, weight = _inputs(size, dtype, device)
    window = [list(w) for w in WINDOW[:3]]
    if name.endswith("_forward"):
        return input, weight, *window, 2
    output, *signs = torch.ops.tersor.binary_conv2d_forward(input, weight, *window, 2)
    return torch.ones_like(output), *signs, input.shape[1], *window, 2, False, True, True


SUBJECTS = [
    Subject(
        lambda input, weight: binary_conv2d(input, weight, *WINDOW),
        lambda input, weight: exact(input, weight, *WINDOW),
        _inputs, (), ("binary_conv2d_forward", "binary_conv2d_backward"), _raw,
        [(4, 5, 7, 9), (5, 4, 13, 11), (1, 2, 3, 4), (2, 66, 6, 5)],
        surrogate=True, alike=False, skips=True, data=2, name="binary_conv2d",
    )
]  # fmt: skip


@given(
    sizes=st.tuples(
        st.integers(0, 3), st.sampled_from([1, 3, 16, 63, 64, 65, 130]), st.integers(1, 9), st.integers(1, 9)
    ),
    outputs=st.sampled_from([1, 4, 7, 8, 17]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 2)),
    groups=st.sampled_from([1, 1, 2]),
    zeros=st.booleans(),
    last=st.booleans(),
    level=st.sampled_from(native.cpu_isa_supported() if native else ["none"]),
)
def test_any_shape_at_every_level(
    sizes: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, int],
    window: tuple[int, int, int],
    groups: int,
    zeros: bool,
    last: bool,
    level: str,
) -> None:
    batch, channels, height, width = sizes
    if min(s + 2 * window[1] - window[2] * (k - 1) for s, k in zip((height, width), kernel, strict=True)) < 1:
        return
    input = torch.randn(batch, channels * groups, height, width)
    weight = torch.randn(outputs * groups, channels, *kernel)
    if zeros:
        input, weight = input.round(), weight.mul(2).round()
    input = input.contiguous(memory_format=torch.channels_last) if last else input
    before = native.cpu_isa() if native else "none"
    try:
        if native:
            native.set_cpu_isa(level)
        output = binary_conv2d(input, weight, *window, groups)
    finally:
        if native:
            native.set_cpu_isa(before)
    assert torch.equal(output, F.conv2d(input.sign(), weight.sign(), None, *window, groups))
    assert output.stride() == F.conv2d(input, weight, None, *window, groups).stride() or not last


def test_gradients_are_those_at_the_signs(run: tuple[str, str]) -> None:
    for last in (False, True):
        input = torch.randn(2, 6, 9, 8, device=run[0]).mul(2).round()
        input = input.contiguous(memory_format=torch.channels_last) if last else input
        weight = torch.randn(4, 3, 3, 3, device=run[0]).requires_grad_()
        input.requires_grad_()
        output = binary_conv2d(input, weight, 2, 1, 1, 2)
        incoming = torch.randn_like(output)
        given = torch.autograd.grad(output, (input, weight), incoming)
        expected = torch.autograd.grad(exact(input, weight, 2, 1, 1, 2), (input, weight), incoming)
        for g, e in zip(given, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)


def test_bits_are_kept_for_the_backward_pass() -> None:
    input = torch.randn(2, 64, 8, 8, requires_grad=True)
    weight = torch.randn(64, 64, 3, 3, requires_grad=True)
    kept = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        binary_conv2d(input, weight, 1, 1)
    assert sum(kept) == (input.numel() + weight.numel()) * 4 // 16


@given(rows=st.lists(st.integers(0, 4), max_size=2), inputs=st.integers(1, 200), outputs=st.integers(1, 20))
def test_linear(rows: list[int], inputs: int, outputs: int) -> None:
    input, weight = (torch.randn(*s).requires_grad_() for s in ((*rows, inputs), (outputs, inputs)))
    output = binary_linear(input, weight)
    expected = F.linear(_Through.apply(input), _Through.apply(weight))
    assert torch.equal(output, expected)
    incoming = torch.randn_like(output)
    pairs = [torch.autograd.grad(o, (input, weight), incoming) for o in (output, expected)]
    for g, e in zip(*pairs, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(6, 4, 4), torch.zeros(4, 6, 3, 3)), ValueError, r"input must be \(N, C, H, W\)"),
        ((torch.zeros(1, 6, 4, 4), torch.zeros(4, 5, 3, 3)), ValueError, r"weight must be \(O, 6, KH, KW\)"),
        ((torch.zeros(1, 6, 4, 4), torch.zeros(4, 3, 3, 3), 1, 0, 1, 4), ValueError, "groups must divide the input"),
        ((torch.zeros(1, 6, 4, 4), torch.zeros(5, 3, 3, 3), 1, 0, 1, 2), ValueError, "with O a multiple of 2"),
        ((torch.zeros(1, 6, 2, 2), torch.zeros(4, 6, 3, 3)), ValueError, "input must be at least as large"),
        ((torch.zeros(1, 6, 4, 4), torch.zeros(4, 6, 3, 3), 0), ValueError, "stride must be an int or two ints"),
        ((torch.zeros(1, 6, 4, 4), torch.zeros(4, 6, 3, 3).double()), TypeError, "weight must have the dtype of input"),
        ((torch.zeros(1, 6, 4, 4).long(), torch.zeros(4, 6, 3, 3)), TypeError, "input must be float16"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        binary_conv2d(*arguments)


def test_bad_linear() -> None:
    with pytest.raises(ValueError, match=r"binary_linear: input must be \(..., I\) and weight \(O, I\)"):
        binary_linear(torch.zeros(2, 3), torch.zeros(4, 5))
