"""Window attention: what is special to it. Everything common to all operators is in test_conformance.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject

import tersor
from tersor._backends import running
from tersor.attention.window_attention import _reference, _reference_backward, bias_index
from tersor.models.eager_attention import window_attention_partition, window_attention_sdpa

OPERATORS = ("window_attention_forward", "window_attention_backward")
WINDOW, SHIFT = (2, 3), (1, -2)
# (B, H, W, heads, head_dim): plain (no two sizes alike, or a dynamic graph ties them together); another size of map, of
# few windows, as each takes Triton's interpreter 0.1 s; one window; a single head and channel; a wide and deep one.
SIZES = [(2, 4, 6, 3, 5), (2, 2, 9, 3, 5), (1, 2, 3, 1, 8), (3, 4, 3, 2, 1), (1, 6, 15, 3, 24)]
OPTIONS = ([*WINDOW], [*SHIFT], -100.0, 0.5)


def _table(heads: int, window: tuple[int, int] = WINDOW, **like: Any) -> torch.Tensor:
    return torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, **like)


def _inputs(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    qkv = [torch.randn(size, dtype=dtype, device=device) for _ in range(3)]
    return (*qkv, _table(size[3], dtype=dtype, device=device))


def _packed(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    qkv = torch.randn((*size[:3], 3, *size[3:]), dtype=dtype, device=device)
    return (qkv, _table(size[3], dtype=dtype, device=device))


def _biased(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return tersor.window_attention(query, key, value, WINDOW, SHIFT, table)


def _biased_packed(qkv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return tersor.window_attention_qkvpacked(qkv, WINDOW, SHIFT, table)


def _exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return window_attention_partition(query, key, value, WINDOW, SHIFT, table)


def _raw(name: str, size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    *qkv, table = _inputs(size, dtype, device)
    mask = torch.rand(size[:3], device=device) < 0.3
    if name == OPERATORS[0]:
        return (*qkv, table, mask, *OPTIONS)
    with torch.no_grad():
        output, logsumexp = torch.ops.tersor.window_attention_forward(*qkv, table, mask, *OPTIONS)
    return (torch.randn_like(output), *qkv, table, mask, logsumexp, *OPTIONS, [1, 2])


SUBJECTS = [
    Subject(_biased, _exact, _inputs, (), OPERATORS, _raw, SIZES, alike=False, name="window_attention"),
    Subject(
        _biased_packed,
        lambda qkv, table: _exact(*qkv.unbind(3), table),
        _packed,
        (),
        OPERATORS,
        _raw,
        SIZES,
        alike=False,
        name="window_attention_qkvpacked",
    ),
]


def _grads(output: torch.Tensor, tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return [output, *torch.autograd.grad(output, tensors, grad)]


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    window = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9])] * 2))
    batch = draw(st.integers(0, 2))
    return {
        "window": window,
        "shift": tuple(draw(st.integers(1 - w, w - 1)) for w in window),
        "size": (batch, window[0] * draw(st.integers(1, 3)), window[1] * draw(st.integers(1, 3))),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 24, 32, 33, 40])),
        "bias": draw(st.booleans()),
        "mask": draw(st.sampled_from([None, "tokens", "tokens of each", "pairs", "pairs of each"])),
        "mask_value": draw(st.sampled_from([-100.0, -3.0, 0.5])),
        "scale": draw(st.sampled_from([None, 0.3, -1.5, 0])),
    }


def make_mask(kind: str | None, batch: int, height: int, width: int, window: tuple[int, int]) -> torch.Tensor | None:
    if kind is None:
        return None
    images = batch if kind.endswith("of each") else 1
    tokens = window[0] * window[1]
    shape = (height, width) if kind.startswith("tokens") else (height * width // tokens, tokens, tokens)
    return torch.rand(images, *shape) < 0.4


@given(problem=problems(), data=st.integers(0, 2**31))
def test_sweep_of_shapes(problem: dict[str, Any], data: int) -> None:
    """float64 to rounding, float32 to 1e-5, on whatever the default backend is."""
    torch.manual_seed(data)
    p = problem
    batch, height, width = p["size"]
    mask = make_mask(p["mask"], batch, height, width, p["window"])
    scale = p["head_dim"] ** -0.5 if p["scale"] is None else p["scale"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        qkv = torch.randn(batch, height, width, 3, p["heads"], p["head_dim"], dtype=dtype, requires_grad=True)
        bias = _table(p["heads"], p["window"], dtype=dtype, requires_grad=True) if p["bias"] else None
        output = tersor.window_attention_qkvpacked(
            qkv, p["window"], p["shift"], bias, mask, p["mask_value"], p["scale"]
        )
        grad = torch.randn_like(output)
        tensors = [qkv] if bias is None else [qkv, bias]
        ours = _grads(output, tensors, grad)
        exact = [t.detach().double() for t in qkv.unbind(3)]
        table = None if bias is None else bias.detach().double()
        options = (p["window"], p["shift"], p["mask_value"], scale)
        expected, logsumexp = _reference(*exact, table, mask, *options)
        flat, table_grad = _reference_backward(grad.double(), *exact, table, mask, logsumexp, *options, [3])
        wanted = [expected, flat.view(qkv.shape), table_grad]
        for given_, right in zip(ours, wanted, strict=False):
            assert given_.shape == right.shape
            if right.numel():
                error = (given_.double() - right).abs().max() / right.abs().max().clamp(min=1)
                assert error <= tolerance, f"{dtype} {error}"


@pytest.mark.parametrize("peer", [window_attention_partition, window_attention_sdpa])
@pytest.mark.parametrize("mask", [None, "tokens of each", "pairs"])
def test_published_ways_give_the_same(peer: Any, mask: str | None, run: tuple[str, str]) -> None:
    for window, shift, size in (
        ((7, 7), (3, 3), (1, 14, 7, 2, 4)),
        ((4, 4), (-2, -2), (2, 8, 12, 1, 6)),
        ((8, 4), (0, 3), (1, 8, 8, 1, 5)),
        ((2, 5), (-1, 0), (1, 4, 5, 2, 3)),
        ((9, 9), (4, -2), (1, 9, 18, 1, 20)),  # 81, 49 and 17 tokens leave one query that fills no vector
        ((1, 17), (0, 5), (2, 3, 17, 2, 3)),
    ):
        tensors = [torch.randn(size, device=run[0], requires_grad=True) for _ in range(3)]
        tensors.append(_table(size[3], window, device=run[0]).requires_grad_())
        given_mask = make_mask(mask, *size[:3], window)
        given_mask = given_mask if given_mask is None else given_mask.to(run[0])
        output = tersor.window_attention(*tensors[:3], window, shift, tensors[3], given_mask)
        grad = torch.randn_like(output)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        expected = peer(*wide[:3], window, shift, wide[3], given_mask)
        for a, b in zip(_grads(output, tensors, grad), _grads(expected, wide, grad.double()), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_every_packing_gives_the_same_gradients(run: tuple[str, str]) -> None:
    qkv = torch.randn(2, 4, 6, 3, 2, 5, device=run[0], requires_grad=True)
    table = _table(2, device=run[0]).requires_grad_()
    grad = torch.randn(2, 4, 6, 2, 5, device=run[0])
    query, key, value = qkv.unbind(3)
    expected = _grads(tersor.window_attention(query, key, value, WINDOW, SHIFT, table), [qkv, table], grad)
    calls = {
        "qkv": lambda: tersor.window_attention_qkvpacked(qkv, WINDOW, SHIFT, table),
        "qk": lambda: tersor.window_attention_qkpacked(qkv[:, :, :, :2], qkv[:, :, :, 2], WINDOW, SHIFT, table),
        "kv": lambda: tersor.window_attention_kvpacked(qkv[:, :, :, 0], qkv[:, :, :, 1:], WINDOW, SHIFT, table),
    }
    for call in calls.values():
        for e, g in zip(expected, _grads(call(), [qkv, table], grad), strict=True):
            assert torch.equal(e, g)


def test_shift_is_a_roll_and_a_mask() -> None:
    """The windows of a shifted call hold the tokens of the rolled map; across the cut nobody attends."""
    value = torch.zeros(1, 4, 4, 1, 1)
    value[0, 0, 0] = 1.0  # the corner, which a shift by (1, 1) puts alone into the last window
    zeros = torch.zeros_like(value)
    output = tersor.window_attention(zeros, zeros, value, 2, 1, mask_value=-1000.0)
    assert output[0, 0, 0].item() == 1.0, "its window's other tokens are cut off"
    assert output.sum().item() == 1.0
    whole = tersor.window_attention(zeros, zeros, value, 2, 1, mask_value=0.0)
    for y, x in ((0, 0), (0, 3), (3, 0), (3, 3)):
        assert whole[0, y, x].item() == 0.25


def test_masks_add_up() -> None:
    """A pair that is cut and masked has twice the mask's value; a query with nothing left attends to everything."""
    query, key, value = (torch.randn(1, 4, 4, 1, 3) for _ in range(3))
    everything = torch.ones(1, 4, 4, dtype=torch.bool)
    unmasked = tersor.window_attention(query, key, value, 4)
    torch.testing.assert_close(tersor.window_attention(query, key, value, 4, mask=everything), unmasked)
    shifted = tersor.window_attention(query, key, value, 4, 2, mask_value=-2.0)
    both = tersor.window_attention(query, key, value, 4, 2, mask=everything, mask_value=-2.0)
    torch.testing.assert_close(both, shifted)  # one more for all pairs changes nothing
    cut = window_attention_partition(query, key, value, (4, 4), (2, 2), None, everything, -2.0)
    torch.testing.assert_close(both, cut)


def test_large_logits_do_not_overflow(run: tuple[str, str]) -> None:
    for window, shift, size in ((WINDOW, SHIFT, (1, 4, 6, 1, 8)), ((7, 7), (3, 0), (1, 7, 14, 1, 8))):
        query, key, value = (torch.randn(size, device=run[0]) for _ in range(3))
        output = tersor.window_attention(100 * query, 100 * key, value, window, shift, scale=1.0)
        wide = [t.double() for t in (100 * query, 100 * key, value)]
        expected = _reference(*wide, None, None, window, shift, -100.0, 1.0)[0]
        torch.testing.assert_close(output.double(), expected, atol=1e-3, rtol=1e-3)


def test_what_is_not_finite_stays_in_its_query(run: tuple[str, str]) -> None:
    """A NaN or an infinity in the first or the last query of a window of 7 x 7 spoils that query's output alone."""
    for place in (0, 48):
        for bad in (math.nan, math.inf):
            query, key, value = (torch.randn(1, 7, 14, 2, 8, device=run[0]) for _ in range(3))
            query[0, place // 7, place % 7, 1] = bad
            output = tersor.window_attention(query, key, value, 7)
            spoilt = output.isnan().all(-1).nonzero().tolist()
            assert spoilt == [[0, place // 7, place % 7, 1]]
            assert int(output.isnan().sum()) == 8


def test_bias_of_another_dtype(run: tuple[str, str]) -> None:
    """Half activations with a float32 table, whose gradient is float32."""
    half = torch.float16
    query, key, value = (torch.randn(1, 4, 6, 2, 8, device=run[0], dtype=half) for _ in range(3))
    table = _table(2, device=run[0]).requires_grad_()
    output = tersor.window_attention(query, key, value, WINDOW, SHIFT, table)
    output.sum().backward()
    assert output.dtype == half
    assert table.grad is not None
    assert table.grad.dtype == torch.float32
    expected = _reference(
        *(t.double() for t in (query, key, value)), table.detach(), None, WINDOW, SHIFT, -100.0, 8**-0.5
    )
    torch.testing.assert_close(output.double(), expected[0], atol=2e-3, rtol=2e-3)


def test_views_of_a_fused_projection_are_not_copied() -> None:
    qkv = torch.randn(2, 56, 56, 3, 3, 32)
    query, key, value = qkv.unbind(3)
    table = _table(3, (7, 7))
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.tersor.window_attention_forward(query, key, value, table, None, [7, 7], [3, 3], -100.0, 0.2)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    outputs = qkv.numel() // 3 * 4 + 2 * 3 * 56 * 56 * 4
    assert allocated == outputs


def test_bias_index_is_the_published_one() -> None:
    index = bias_index((2, 3))
    assert index.shape == (6, 6)
    assert index[0].tolist() == [7, 6, 5, 2, 1, 0]  # the first query: keys to the right and below
    assert index.diagonal().unique().tolist() == [7]  # a token and itself: the middle of 15 entries


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, r"window_size must be an int or two ints of at least 1, got 0"),
        ({"window_size": (2, 3, 4)}, r"window_size must be an int or two ints of at least 1"),
        ({"window_size": (3, 3)}, r"H \(4\) must be a multiple of the window's size \(3\)"),
        ({"window_size": (2, 4)}, r"W \(6\) must be a multiple of the window's size \(4\)"),
        (
            {"shift": (2, 0)},
            r"shift must be an int or two ints nearer to 0 than the window's size \(2, 3\), got \(2, 0\)",
        ),
        ({"shift": -2}, r"nearer to 0 than the window's size"),
        ({"shift": (0, 0, 0)}, r"shift must be an int or two ints"),
        ({"mask_value": float("-inf")}, "mask_value must be finite, got -inf"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        (
            {"position_bias": torch.zeros(14, 3)},
            r"position_bias must be .* = \(15, 3\) for a window of 2 x 3, got shape",
        ),
        ({"position_bias": torch.zeros(15, 3, device="meta")}, "position_bias must be on the device of query"),
        ({"mask": torch.zeros(2, 4, 5, dtype=torch.bool)}, r"mask must be \(1 or 2, 4, 6\) or \(1 or 2, 4, 6, 6\)"),
        ({"mask": torch.zeros(3, 4, 6, dtype=torch.bool)}, r"mask must be \(1 or 2, 4, 6\)"),
        ({"mask": torch.zeros(1, 4, 6, device="meta", dtype=torch.bool)}, "mask must be on the device of query"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    qkv = torch.randn(2, 4, 6, 3, 3, 5)
    query, key, value = qkv.unbind(3)
    arguments = {"window_size": WINDOW} | options
    for call in (
        lambda: tersor.window_attention(query, key, value, **arguments),
        lambda: tersor.window_attention_qkvpacked(qkv, **arguments),
        lambda: tersor.window_attention_qkpacked(qkv[:, :, :, :2], value, **arguments),
        lambda: tersor.window_attention_kvpacked(query, qkv[:, :, :, 1:], **arguments),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 2.0}, "window_size must be an int or two ints, got float"),
        ({"window_size": "2"}, "window_size must be an int or two ints, got str"),
        ({"window_size": (2, True)}, "window_size must be an int, got bool"),
        ({"shift": 1.0}, "shift must be an int or two ints, got float"),
        ({"shift": (1, 1.0)}, "shift must be an int, got float"),
        ({"mask_value": "big"}, "mask_value must be a number, got str"),
        ({"mask_value": None}, "mask_value must be a number, got NoneType"),
        ({"scale": True}, "scale must be a number, got bool"),
        ({"position_bias": torch.zeros(15, 3).long()}, "position_bias must be float16, bfloat16, float32 or float64"),
        ({"mask": torch.zeros(1, 4, 6)}, r"mask must be a bool tensor, got torch\.float32"),
        ({"mask": [[True]]}, "mask must be a bool tensor, got list"),
    ],
)
def test_bad_option_types(options: dict[str, Any], message: str) -> None:
    query, key, value = (torch.randn(2, 4, 6, 3, 5) for _ in range(3))
    with pytest.raises(TypeError, match=message):
        tersor.window_attention(query, key, value, **{"window_size": WINDOW} | options)


def test_bad_packs() -> None:
    packed, plain = torch.randn(1, 4, 6, 2, 3, 5), torch.randn(1, 4, 6, 3, 5)
    with pytest.raises(ValueError, match=r"qkv must be \(B, H, W, 3, heads, head_dim\), got shape"):
        tersor.window_attention_qkvpacked(packed, WINDOW)
    with pytest.raises(ValueError, match=r"qk must be \(B, H, W, 2, heads, head_dim\), got shape"):
        tersor.window_attention_qkpacked(plain, plain, WINDOW)
    with pytest.raises(ValueError, match="value must have the shape of query"):
        tersor.window_attention_qkpacked(packed, plain[:, :2], WINDOW)
    with pytest.raises(TypeError, match="key must have the dtype of query"):
        tersor.window_attention_kvpacked(plain, packed.double(), WINDOW)
    with pytest.raises(ValueError, match=r"query must be \(B, H, W, heads, head_dim\), got shape"):
        tersor.window_attention(packed, packed, packed, WINDOW)


@pytest.mark.parametrize("axis", ["H", "W", "heads", "head_dim"])
def test_empty_axes(axis: str) -> None:
    shape = {"B": 1, "H": 4, "W": 6, "heads": 3, "head_dim": 4, axis: 0}
    query, key, value = (torch.randn(tuple(shape.values())) for _ in range(3))
    with pytest.raises(ValueError, match=f"{axis} must be at least 1"):
        tersor.window_attention(query, key, value, WINDOW)


def test_empty_batch(run: tuple[str, str]) -> None:
    qkv = torch.randn(0, 4, 6, 3, 3, 4, device=run[0], requires_grad=True)
    table = _table(3, device=run[0]).requires_grad_()
    output = tersor.window_attention_qkvpacked(qkv, WINDOW, SHIFT, table)
    output.sum().backward()
    assert output.shape == (0, 4, 6, 3, 4)
    assert qkv.grad is not None
    assert qkv.grad.shape == qkv.shape
    assert table.grad is not None
    assert table.grad.abs().sum().item() == 0


@pytest.mark.skipif(running(OPERATORS[0], "cpu") != "native", reason="the C++ library was not built here")
def test_direct_call_with_bad_sizes_is_an_error_not_a_crash() -> None:
    """torch.ops has no Python checks in front: the C++ kernel itself guards its memory."""
    forward, backward = (getattr(torch.ops.tersor, name) for name in OPERATORS)
    query, key, value, table = _inputs((1, 4, 6, 3, 5), torch.float32, "cpu")
    output, logsumexp = forward(query, key, value, table, None, *OPTIONS)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    for arguments in (
        (query, key[:, :2], value, table, None, *OPTIONS),
        (query, key, value.double(), table, None, *OPTIONS),
        (query, key, value, table[:3], None, *OPTIONS),
        (query, key, value, table.long(), None, *OPTIONS),
        (query, key, value, table, mask[:, :2], *OPTIONS),
        (query, key, value, table, mask.float(), *OPTIONS),
        (query, key, value, table, None, [3, 3], [1, 1], -100.0, 0.5),
        (query, key, value, table, None, [2, 3], [2, 1], -100.0, 0.5),
        (query, key, value, table, None, [0, 3], [0, 1], -100.0, 0.5),
        (query, key, value, table, None, [2], [0, 1], -100.0, 0.5),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments)
    for arguments in (
        (output[:, :2], query, key, value, table, None, logsumexp, *OPTIONS, [3]),
        (output, query, key, value, table, None, logsumexp[:, :1], *OPTIONS, [3]),
        (output, query, key, value, table, None, logsumexp, *OPTIONS, [2, 2]),
        (output, query, key, value, table, None, logsumexp, *OPTIONS, [3, 1, -1]),
    ):
        with pytest.raises(RuntimeError):
            backward(*arguments)
