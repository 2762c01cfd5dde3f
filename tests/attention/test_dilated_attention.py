"""Dilated attention: what is special to it. Everything common to all operators is in test_conformance.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import nn

import tersor
from tersor._backends import running
from tersor.attention.dilated_attention import _reference, _reference_backward
from tersor.models.eager import dilated_attention_unfold

DILATION = (1, 2, 3)
OPERATORS = ("dilated_attention_forward", "dilated_attention_backward")
# (B, H, W, heads, head_dim): plain (no two sizes alike, or a dynamic graph ties them together); another size of image;
# an image smaller than the window; one row; a wide and deep one.
SIZES = [(2, 5, 6, 3, 4), (2, 7, 8, 3, 4), (1, 2, 3, 3, 5), (1, 1, 9, 3, 1), (1, 5, 37, 3, 24)]


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *options: Any) -> torch.Tensor:
    return dilated_attention_unfold(query, key, value, *options)


def _qkv(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(size, dtype=dtype, device=device) for _ in range(3))


def _packed(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    return (torch.randn((*size[:3], 3, *size[3:]), dtype=dtype, device=device),)


def _raw(name: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    qkv = _qkv(size, dtype, device)
    options = (3, list(DILATION), 0.5)
    if name == OPERATORS[0]:
        return (*qkv, *options)
    with torch.no_grad():
        output, logsumexp = torch.ops.tersor.dilated_attention_forward(*qkv, *options)
    return (torch.randn_like(output), *qkv, output, logsumexp, *options)


SUBJECTS = [
    Subject(tersor.dilated_attention, _exact, _qkv, (3, DILATION, None), OPERATORS, _raw, SIZES),
    Subject(
        tersor.dilated_attention_qkvpacked,
        lambda qkv, *options: _exact(*qkv.unbind(3), *options),
        _packed,
        (3, DILATION, None),
        OPERATORS,
        _raw,
        SIZES,
    ),
]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    dilation = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    odd = [1, 3, 5, 7]
    kernel_size = draw(st.sampled_from(odd if any(d % 2 for d in dilation) else [*odd, 2, 4]))
    return {
        "batch": draw(st.integers(0, 2)),
        "height": draw(st.integers(1, 19)),
        "width": draw(st.one_of(st.integers(1, 19), st.sampled_from([31, 32, 33, 64, 65]))),
        "heads": len(dilation) * draw(st.integers(1, 2)),
        "head_dim": draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 24, 33])),
        "kernel_size": kernel_size,
        "dilation": dilation,
        "scale": draw(st.sampled_from([None, 0, 0.3, -1.5])),
    }


@given(problem=problems(), data=st.integers(0, 2**31))
def test_sweep_of_shapes(problem: dict[str, Any], data: int) -> None:
    """float64 to rounding, float32 to 1e-5, on whatever the default backend is."""
    torch.manual_seed(data)
    p = problem
    size = (p["batch"], p["height"], p["width"], 3, p["heads"], p["head_dim"])
    options = (p["kernel_size"], p["dilation"], p["scale"])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        qkv = torch.randn(size, dtype=dtype, requires_grad=True)
        output = tersor.dilated_attention_qkvpacked(qkv, *options)
        grad = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, qkv, grad)
        scale = p["scale"] or p["head_dim"] ** -0.5
        exact = [t.detach().double() for t in qkv.unbind(3)]
        expected, logsumexp = _reference(*exact, p["kernel_size"], p["dilation"], scale)
        reference = (grad.double(), *exact, expected, logsumexp, p["kernel_size"], p["dilation"], scale)
        for given_, wanted in ((output, expected), (gradient, _reference_backward(*reference))):
            assert given_.shape == wanted.shape
            if wanted.numel():
                error = (given_.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
                assert error <= tolerance


def test_sweep_on_every_backend(run: tuple[str, str]) -> None:
    for size, kernel_size, dilation in (
        ((2, 7, 10, 6, 4), 3, [1, 2, 3]),
        ((1, 9, 6, 2, 7), 5, [1, 2]),
        ((1, 6, 5, 1, 3), 2, [2]),
        ((1, 4, 4, 2, 32), 1, [1]),
        ((1, 3, 2, 1, 8), 3, [50]),
        ((0, 3, 2, 1, 8), 3, [1]),
    ):
        q, k, v = (torch.randn(size, device=run[0], requires_grad=True) for _ in range(3))
        output = tersor.dilated_attention(q, k, v, kernel_size, dilation)
        wanted = dilated_attention_unfold(*(x.double() for x in (q, k, v)), kernel_size, dilation, None)
        grad = torch.randn_like(output)
        given_ = [output, *torch.autograd.grad(output, (q, k, v), grad)]
        expected = [wanted, *torch.autograd.grad(wanted, (q, k, v), grad.double())]
        for a, b in zip(given_, expected, strict=True):
            torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)


def test_logsumexp_counts_taps_outside() -> None:
    """A corner of a 3x3 window has five taps outside, each exp(0) of the sum."""
    q = torch.zeros(1, 1, 1, 1, 4)
    _, logsumexp = torch.ops.tersor.dilated_attention_forward(q, q, q, 3, [1], 1.0)
    assert logsumexp.item() == pytest.approx(torch.tensor(9.0).log().item())
    v = torch.ones(1, 2, 2, 1, 4)
    output = tersor.dilated_attention(torch.zeros_like(v), torch.zeros_like(v), v, dilation=1)
    torch.testing.assert_close(output, torch.full_like(output, 4 / 9))


def test_large_scores_do_not_overflow(run: tuple[str, str]) -> None:
    q, k, v = (torch.randn(1, 5, 6, 1, 8, device=run[0]) for _ in range(3))
    output = tersor.dilated_attention(100 * q, 100 * k, v, 3, 1, 1.0)
    expected = _reference(100 * q.double(), 100 * k.double(), v.double(), 3, [1], 1.0)[0]
    torch.testing.assert_close(output.double(), expected, atol=1e-3, rtol=1e-3)


def test_scale_of_zero_is_the_default() -> None:
    q, k, v = _qkv(SIZES[0], torch.float32, "cpu")
    assert torch.equal(tersor.dilated_attention(q, k, v, scale=0), tersor.dilated_attention(q, k, v))
    assert torch.equal(tersor.dilated_attention(q, k, v, scale=0.5), tersor.dilated_attention(q, k, v))  # 4 ** -0.5
    assert not torch.equal(tersor.dilated_attention(q, k, v, scale=1.0), tersor.dilated_attention(q, k, v))


def test_views_of_a_fused_projection_are_not_copied() -> None:
    """Peak memory of the forward pass is the two outputs, nothing of the inputs' size besides."""
    qkv = torch.randn(2, 64, 64, 3, 3, 24)
    query, key, value = qkv.unbind(3)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.tersor.dilated_attention_forward(query, key, value, 3, [1, 2, 3], 0.2)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    outputs = qkv.numel() // 3 * 4 + 2 * 3 * 64 * 64 * 4
    assert allocated == outputs


def test_module_equals_its_parts() -> None:
    module = tersor.DilatedAttention(12, num_heads=3, qkv_bias=True)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
        "qkv.weight": (36, 12, 1, 1),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    x = torch.randn(2, 5, 4, 12)
    before = x.clone()
    qkv = nn.functional.conv2d(x.permute(0, 3, 1, 2), module.qkv.weight, module.qkv.bias).permute(0, 2, 3, 1)
    q, k, v = qkv.unflatten(3, (3, 3, 4)).unbind(3)
    expected = module.proj(tersor.dilated_attention(q, k, v).flatten(3))
    torch.testing.assert_close(module(x), expected)
    assert torch.equal(x, before), "the published code overwrites its input; this must not"
    assert "num_heads=3" in repr(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, r"kernel_size must be at least 1 and at most 1023, got 0"),
        ({"kernel_size": 1025}, r"kernel_size must be at least 1 and at most 1023, got 1025"),
        ({"kernel_size": 2}, r"dilation \* \(kernel_size - 1\) must be even.*got dilation 1 with kernel_size 2"),
        ({"dilation": ()}, r"at least one dilation"),
        ({"dilation": (1, 0, 2)}, r"every dilation must be at least 1, got \[1, 0, 2\]"),
        ({"dilation": (1, 2)}, r"heads \(3\) must be a positive multiple of the number of dilations \(2\)"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    q, k, v = _qkv((1, 3, 4, 3, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        tersor.dilated_attention(q, k, v, **options)
    with pytest.raises(ValueError, match=message):
        tersor.dilated_attention_qkvpacked(torch.stack([q, k, v], 3), **options)
    with pytest.raises(ValueError, match=message):
        tersor.DilatedAttention(12, 3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 3.0}, "kernel_size must be an int, got float"),
        ({"kernel_size": True}, "kernel_size must be an int, got bool"),
        ({"dilation": 1.5}, "dilation must be an int or a sequence of ints, got float"),
        ({"dilation": "123"}, "dilation must be an int or a sequence of ints, got str"),
        ({"dilation": (1, 2.0, 3)}, "dilation must be an int, got float"),
        ({"scale": "big"}, "scale must be a number or None, got str"),
    ],
)
def test_bad_option_types(options: dict[str, Any], message: str) -> None:
    q, k, v = _qkv((1, 3, 4, 3, 4), torch.float32, "cpu")
    with pytest.raises(TypeError, match=message):
        tersor.dilated_attention(q, k, v, **options)


@pytest.mark.parametrize("axis", ["H", "W", "head_dim"])
def test_empty_axes(axis: str) -> None:
    shape = {"B": 1, "H": 3, "W": 4, "heads": 3, "head_dim": 4, axis: 0}
    q, k, v = _qkv(tuple(shape.values()), torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"{axis} must be at least 1"):
        tersor.dilated_attention(q, k, v)
    with pytest.raises(ValueError, match="heads"):
        tersor.dilated_attention(*_qkv((1, 3, 4, 0, 4), torch.float32, "cpu"))


def test_empty_batch(run: tuple[str, str]) -> None:
    qkv = torch.randn(0, 3, 4, 3, 3, 4, device=run[0], requires_grad=True)
    output = tersor.dilated_attention_qkvpacked(qkv)
    output.sum().backward()
    assert output.shape == (0, 3, 4, 3, 4)
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 10, "num_heads": 3}, r"dim \(10\) must be a positive multiple of num_heads \(3\)"),
        ({"dim": 12, "num_heads": 0}, "must be a positive multiple"),
        ({"dim": 12, "num_heads": 3, "attn_drop": 0.1}, "attn_drop must be 0"),
    ],
)
def test_bad_module_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tersor.DilatedAttention(**arguments)


def test_packed_needs_three_parts() -> None:
    with pytest.raises(ValueError, match=r"qkv must be \(B, H, W, 3, heads, head_dim\), got shape"):
        tersor.dilated_attention_qkvpacked(torch.randn(1, 3, 4, 2, 3, 4))


@pytest.mark.skipif(running(OPERATORS[0], "cpu") != "native", reason="the C++ library was not built here")
def test_window_too_large_for_memory_is_an_error_not_a_crash() -> None:
    qkv = torch.randn(1, 200, 200, 3, 1, 4, requires_grad=True)
    output = tersor.dilated_attention_qkvpacked(qkv, 101, 1)
    with pytest.raises(RuntimeError, match="MiB of working memory a thread"):
        output.sum().backward()


@pytest.mark.skipif(running(OPERATORS[0], "cpu") != "native", reason="the C++ library was not built here")
def test_direct_call_with_bad_sizes_is_an_error_not_a_crash() -> None:
    """torch.ops has no Python checks in front: the C++ kernel itself guards its memory."""
    q, k, v = _qkv((1, 3, 4, 3, 4), torch.float32, "cpu")
    output, logsumexp = torch.ops.tersor.dilated_attention_forward(q, k, v, 3, [1, 2, 3], 0.5)
    backward = torch.ops.tersor.dilated_attention_backward
    with pytest.raises(RuntimeError):
        torch.ops.tersor.dilated_attention_forward(q, k[:, :2], v, 3, [1, 2, 3], 0.5)
    with pytest.raises(RuntimeError):
        torch.ops.tersor.dilated_attention_forward(q, k, v.double(), 3, [1, 2, 3], 0.5)
    with pytest.raises(RuntimeError):
        backward(output[:, :, :2], q, k, v, output, logsumexp, 3, [1, 2, 3], 0.5)
    with pytest.raises(RuntimeError):
        backward(output, q, k, v, output, logsumexp[:, :1], 3, [1, 2, 3], 0.5)
    with pytest.raises(RuntimeError):
        torch.ops.tersor.dilated_attention_forward(q, k, v, 0, [1, 2, 3], 0.5)
    without_heads = _qkv((1, 3, 4, 0, 4), torch.float32, "cpu")
    with pytest.raises(RuntimeError):
        torch.ops.tersor.dilated_attention_forward(*without_heads, 3, [1], 0.5)
