"""Convolution with a packed N:M weight: the same as with the dense one, on every backend, level and pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from packed_problem import ACTIVATIONS, ERRORS, PATTERNS, packed_weight
from subject import Subject
from torch import Tensor

from tersor import _backends
from tersor.sparsity import nm_packed_conv2d
from tersor.sparsity.nm_pattern import from_groups
from tersor.sparsity.nm_unpack import unpack_rows

native = _backends._introspection()


def _subject(n: int, m: int) -> Subject:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    _, values, index = packed_weight((10, m, 3, 3), n, m)
    torch.random.set_rng_state(generator)

    def function(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        device = input.device if isinstance(input, Tensor) else "cpu"
        return nm_packed_conv2d(input, values, index.to(device), n, m, 3, bias, padding=1, groups=2, activation="relu")

    def exact(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = from_groups(unpack_rows(values, index.to(values.device), n, m), (10, m, 3, 3))
        return torch.relu(F.conv2d(input, weight, bias, padding=1, groups=2))

    def inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        batch, height, width = size
        tensors = torch.randn(batch, 2 * m, height, width), values, torch.linspace(-1, 1, 10)
        return tuple(t.to(device, dtype, copy=True) for t in tensors)

    def raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        input, own, bias = inputs(size, dtype, device)
        window = [3, 3], [1, 1], [1, 1], [1, 1]
        return input, own, index.to(device, copy=True), bias, n, m, *window, 2, "relu", False

    return Subject(
        function=function,
        exact=exact,
        inputs=inputs,
        options=(),
        operators=("nm_packed_conv2d",),
        raw=raw,
        sizes=[(11, 7, 6), (5, 12, 13), (4, 5, 21)],
        float64=False,
        differentiable=False,
        alike=False,
        skips=True,
        name=f"nm_packed_conv2d_{n}of{m}",
    )


SUBJECTS = [_subject(2, 4), _subject(1, 16)]


def layouts(x: Tensor) -> list[Tensor]:
    return [
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], dim=-1)[..., 0],
        torch.cat([x, x], dim=1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
    ]


def check(input: Tensor, packed: tuple[Tensor, ...], n: int, m: int, activation: str = "none", **options: Any) -> None:
    """Against the dense convolution in float64."""
    weight, values, index = packed
    bias = options.pop("bias", None)
    kernel = tuple(weight.shape[2:])
    output = nm_packed_conv2d(input, values, index, n, m, kernel, bias, activation=activation, **options)
    own = torch.zeros(weight.shape[0]).to(input.device) if bias is None else bias
    exact = ACTIVATIONS[activation](F.conv2d(input.double(), weight.double(), own.double(), **options))
    terms = F.conv2d(input.abs().double(), weight.abs().double(), own.abs().double(), **options)
    assert (output.shape, output.dtype) == (exact.shape, input.dtype)
    assert ((output.double() - exact).abs() <= ERRORS[input.dtype] * (terms + 0.5)).all()
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    assert output.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


CASES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": (2, 0), "stride": (2, 1)},
    {"padding": 2, "stride": 3, "dilation": 2},
    {"padding": 5, "dilation": (1, 2)},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "{}of{}".format(*p))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pattern(pattern: tuple[int, int], case: dict[str, Any], run: tuple[str, str]) -> None:
    n, m = pattern
    packed = tuple(t.to(run[0]) for t in packed_weight((18, m, 3, 3), n, m))
    input = torch.randn(2, 2 * m, 9, 11).to(run[0])
    check(input, packed, n, m, groups=2, bias=torch.randn(18).to(run[0]), activation="relu", **case)
    one = tuple(t.to(run[0]) for t in packed_weight((7, 3 * m, 1, 1), n, m))
    points = torch.randn(3, 3 * m, 5, 7).to(run[0]).contiguous(memory_format=torch.channels_last)
    check(points, one, n, m, activation="gelu", **case)


def check_levels(dtype: torch.dtype) -> None:
    for n, m in PATTERNS:
        packed = packed_weight((20, 2 * m, 3, 3), n, m, dtype)
        for x in layouts(torch.randn(2, 2 * m, 8, 10).to(dtype)):
            check(x, packed, n, m, padding=1)
            check(x, packed, n, m, padding=1, stride=2, activation="gelu")


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("level", native.cpu_isa_supported() if native else ["none"])
def test_every_level(level: str, dtype: torch.dtype) -> None:
    before = native.cpu_isa()
    native.set_cpu_isa(level)
    try:
        check_levels(dtype)
    finally:
        native.set_cpu_isa(before)


@given(
    pattern=st.sampled_from(PATTERNS),
    groups=st.sampled_from([1, 1, 2, 3]),
    outputs=st.integers(1, 20),
    channels=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.tuples(*[st.tuples(st.integers(low, 3), st.integers(low, 3)) for low in (1, 0, 1)]),
    size=st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 20)),
    dtype=st.sampled_from(list(ERRORS)),
    layout=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_sweep(
    pattern: tuple[int, int],
    groups: int,
    outputs: int,
    channels: int,
    kernel: tuple[int, int],
    window: tuple[tuple[int, int], ...],
    size: tuple[int, int, int],
    dtype: torch.dtype,
    layout: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n, m = pattern
    stride, padding, dilation = window
    batch, *more = size
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    packed = packed_weight((groups * outputs, channels * m, *kernel), n, m, dtype)
    image = [a + b for a, b in zip(least, more, strict=True)]
    x = layouts(torch.randn(batch, groups * channels * m, *image).to(dtype))[layout]
    check(x, packed, n, m, stride=stride, padding=padding, dilation=dilation, groups=groups)


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for n, m in ((2, 4), (1, 16)):
            for outputs, size in ((100, (6, 7)), (40, (30, 20))):
                _, values, index = packed_weight((outputs, 2 * m, 3, 3), n, m)
                input, results = torch.randn(2, 2 * m, *size), []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(nm_packed_conv2d(input, values, index, n, m, 3, padding=1))
                assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_many_pixels(dtype: torch.dtype) -> None:
    """Enough for a dense convolution to be faster, in some types."""
    for n, m in ((2, 4), (1, 4)):
        packed = packed_weight((9, 2 * m, 3, 3), n, m, dtype)
        for x in layouts(torch.randn(1, 2 * m, 40, 31).to(dtype)):
            check(x, packed, n, m, padding=1, bias=torch.randn(9).to(dtype), activation="relu")


def test_damaged_index_stays_inside_the_tensors() -> None:
    for n, m in PATTERNS:
        _, values, index = packed_weight((17, m, 2, 2), n, m)
        for byte in (0, 255, 0b10110110):
            for x in layouts(torch.ones(2, m, 5, 6)):
                nm_packed_conv2d(x, values, torch.full_like(index, byte), n, m, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kernel_size": 2}, ValueError, "kernel_size must fit a row of 36 elements in groups of 4"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be an int or two ints of at least 1"),
        ({"kernel_size": (3, 3, 1)}, ValueError, "kernel_size must be an int or two ints"),
        ({"stride": 0}, ValueError, "stride must be an int or two ints of at least 1"),
        ({"padding": "same"}, TypeError, "padding must be an int or two ints, got str"),
        ({"groups": 4}, ValueError, r"groups must divide the output channels \(6\), got 4"),
        ({"groups": 2}, ValueError, r"input must be \(N, 8, H, W\)"),
        ({"input": torch.zeros(4, 5, 5)}, ValueError, r"input must be \(N, 4, H, W\)"),
        ({"input": torch.zeros(1, 4, 2, 5)}, ValueError, "at least as large as the window"),
        ({"input": torch.zeros(1, 4, 5, 5).half()}, TypeError, "values must have the dtype of input"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(6,\)"),
        ({"activation": None}, ValueError, "activation must be one of none, relu, gelu, got None"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    _, values, index = packed_weight((6, 4, 3, 3), 2, 4)
    arguments = {"input": torch.zeros(1, 4, 5, 5), "values": values, "index": index, "n": 2, "m": 4, "kernel_size": 3}
    with pytest.raises(error, match=message):
        nm_packed_conv2d(**arguments | change)
