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
    tensors = torch.randn(batch, 2 * channels, height, width), torch.randn(6, channels, 3, 2), torch.linspace(1, 2, 6)
    return tuple(t.mul(2).round().to(device, dtype) for t in tensors)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    input, weight, scale = _inputs(size, dtype, device)
    window = [list(w) for w in WINDOW[:3]]
    if name.endswith("_forward"):
        return input, weight, scale, *window, 2
    output, *signs = torch.ops.tersor.binary_conv2d_forward(input, weight, scale, *window, 2)
    return torch.ones_like(output), *signs, scale, input.shape[1], *window, 2, False, True, True, True


SUBJECTS = [
    Subject(
        lambda input, weight, scale: binary_conv2d(input, weight, *WINDOW, scale=scale),
        lambda input, weight, scale: exact(input, weight, *WINDOW) * scale.view(-1, 1, 1),
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

    bits = (input.numel() + weight.numel()) * 4 // 16
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        binary_conv2d(input, weight, 1, 1)
    assert sum(kept) == bits
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        binary_conv2d(input, weight, 1, 1, scale=torch.rand(64, requires_grad=True))
    assert sum(kept) == bits + 64 * 4, "the sums are not kept for the scale's gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_scale(dtype: torch.dtype, last: bool, run: tuple[str, str]) -> None:
    if run == ("cpu", "triton") and dtype == torch.float64:
        pytest.skip("float64 goes to the reference")
    input, weight = (
        torch.randn(2, 20, 6, 5, device=run[0]).to(dtype),
        torch.randn(12, 10, 3, 3, device=run[0]).to(dtype),
    )
    input = input.contiguous(memory_format=torch.channels_last) if last else input
    for shape in ((12,), (1,), ()):
        tensors = input, weight, torch.rand(shape, device=run[0]).to(dtype)
        leaves = [t.clone().requires_grad_() for t in tensors]
        wide = [t.double().requires_grad_() for t in tensors]
        output = binary_conv2d(*leaves[:2], 2, 1, 1, 2, scale=leaves[2])
        expected = exact(*wide[:2], 2, 1, 1, 2) * wide[2].expand(12).view(-1, 1, 1)
        assert torch.equal(output, expected.to(dtype)) or dtype == torch.float64
        incoming = torch.randn_like(output)
        grads = torch.autograd.grad(output, leaves, incoming)
        for g, e in zip(grads, torch.autograd.grad(expected, wide, incoming.double()), strict=True):
            size = float(e.abs().max())
            torch.testing.assert_close(g.double(), e, rtol=0, atol=size * 1e-5)
        (alone,) = torch.autograd.grad(binary_conv2d(input, weight, 2, 1, 1, 2, scale=leaves[2]), leaves[2], incoming)
        torch.testing.assert_close(alone, grads[2])


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
        (
            (torch.zeros(1, 6, 4, 4), torch.zeros(4, 6, 3, 3), 1, 0, 1, 1, torch.zeros(3)),
            ValueError,
            r"scale must be \(4,\) or one number, got shape \(3,\)",
        ),
        (
            (torch.zeros(1, 6, 4, 4), torch.zeros(4, 6, 3, 3), 1, 0, 1, 1, torch.zeros(4).half()),
            TypeError,
            "scale must be torch.float32 on cpu like the input, got torch.float16",
        ),
        ((torch.zeros(1, 6, 4, 4).long(), torch.zeros(4, 6, 3, 3)), TypeError, "input must be float16"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        binary_conv2d(*arguments[:6], scale=arguments[6] if len(arguments) > 6 else None)


def test_bad_linear() -> None:
    with pytest.raises(ValueError, match=r"binary_linear: input must be \(..., I\) and weight \(O, I\)"):
        binary_linear(torch.zeros(2, 3), torch.zeros(4, 5))
