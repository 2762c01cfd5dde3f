"""Packed convolution of signs: exact sums, what follows in the same pass, and bits for an output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

from tersor import _backends
from tersor.binary import (
    Epilogue,
    PackedBinaryWeight,
    binary_packed_conv2d,
    binary_packed_conv2d_signs,
    epilogue,
    pack_binary_weight,
    pack_signs,
    unpack_signs,
)

native = _backends._introspection()
LEVELS = native.cpu_isa_supported() if native else ["none"]
OUTPUTS, CHANNELS = 10, 3


WEIGHT = torch.randn(OUTPUTS, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(0))
PACKED = pack_binary_weight(WEIGHT, 2)


def _packed(device: str) -> PackedBinaryWeight:
    """Tensors of their own."""
    return PACKED._replace(blocks=PACKED.blocks.to(device, copy=True), sums=PACKED.sums.to(device, copy=True))


def rows(outputs: int, device: str = "cpu") -> dict[str, Tensor]:
    """Numbers that float32 multiplies and adds exactly, so that no order of operations matters."""
    names = ("scale", "shift", "gain", "offset", "before", "slope", "after")
    return {n: (torch.arange(outputs) % (3 + i) - 1.25).to(device) / 4 for i, n in enumerate(names)}


def _finish(y: Tensor, values: dict[str, Tensor], relu: bool, residual: Tensor | None, activation: str) -> Tensor:
    v = {n: t.to(y.dtype).view(-1, 1, 1) for n, t in values.items()}
    y = v["scale"] * y + v["shift"]
    y = v["gain"] * (F.relu(y) if relu else y) + v["offset"]
    y = y if residual is None else y + residual
    if activation == "hardtanh":
        return F.hardtanh(y)
    z = y + v["before"]
    return torch.where(z > 0, z, v["slope"] * z) + v["after"] if activation == "prelu" else y


def _function(input: Any, residual: Any) -> Tensor:
    signs = pack_signs(input, groups=2)
    end = epilogue(OUTPUTS, relu=True, activation="prelu", device=input.device, **rows(OUTPUTS, input.device))
    weight = _packed(input.device)
    options = {"epilogue": end, "residual": residual, "dtype": input.dtype, "channels_last": False}
    return binary_packed_conv2d(signs, weight, 1, 1, **options)


def _exact(input: Tensor, residual: Tensor) -> Tensor:
    y = F.conv2d(input.sign(), WEIGHT.sign().to(input), None, 1, 1, 1, 2)
    return _finish(y, rows(OUTPUTS, input.device), True, residual, "prelu")


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    batch, height, width = size
    tensors = torch.randn(batch, 2 * CHANNELS, height, width), torch.randn(batch, OUTPUTS, height, width)
    return tuple(t.mul(2).round().div(2).to(device, dtype) for t in tensors)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    input, residual = _inputs(size, dtype, device)
    common = (pack_signs(input, groups=2).words, *_packed(device), [1, 1], [1, 1], [1, 1])
    if name.endswith("_signs"):
        return *common, _thresholds(OUTPUTS, device), 2
    values = torch.stack(list(rows(OUTPUTS, device).values()))
    return *common, values, True, "prelu", residual, dtype, False


def _thresholds(outputs: int, device: str) -> Tensor:
    i = torch.arange(outputs, device=device)
    return torch.stack([1 - 2 * (i % 2), i % 5 - 2, i % 5 - 2 + i % 3 - 1]).int()


def _signs_function(input: Any) -> Tensor:
    signs, weight = pack_signs(input, groups=2), _packed(input.device)
    given = binary_packed_conv2d_signs(signs, weight, _thresholds(OUTPUTS, input.device), 1, 1, groups=2)
    return unpack_signs(given, input.dtype)


def _signs_exact(input: Tensor) -> Tensor:
    s = F.conv2d(input.sign(), WEIGHT.sign().to(input), None, 1, 1, 1, 2)
    direction, lower, upper = _thresholds(OUTPUTS, input.device).view(3, -1, 1, 1).to(input.dtype)
    return direction * ((s > upper).to(s.dtype) - (s < lower).to(s.dtype))


COMMON = {"differentiable": False, "autocast": False, "alike": False, "skips": True, "float64": False}
SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("binary_packed_conv2d",), _raw,
        [(5, 4, 7), (4, 9, 12), (1, 1, 2), (2, 9, 17)],
        in_forward=False, name="binary_packed_conv2d", **COMMON,
    ),
    Subject(
        _signs_function, _signs_exact, lambda *given: _inputs(*given)[:1], (), ("binary_packed_conv2d_signs",), _raw,
        [(5, 4, 7), (4, 9, 12), (1, 1, 2), (2, 9, 17)],
        in_forward=False, name="binary_packed_conv2d_signs", **COMMON,
    ),
]  # fmt: skip


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Any:
    if native is None:
        yield request.param
        return
    before = native.cpu_isa()
    native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)


def check_sums(channels: int, zeros: str) -> None:
    input, weight = torch.randn(2, channels, 14, 13), torch.randn(21, channels, 3, 3)
    input = input.round() if zeros in ("input", "both") else input
    weight = weight.mul(2).round() if zeros in ("weight", "both") else weight
    for stride, padding, dilation in ((1, 1, 1), (2, 1, 1), (1, 0, 2), (3, 4, 1), ((1, 2), (3, 0), (2, 1))):
        expected = F.conv2d(input.sign(), weight.sign(), None, stride, padding, dilation)
        given = binary_packed_conv2d(pack_signs(input), pack_binary_weight(weight), stride, padding, dilation)
        assert torch.equal(given, expected)
        assert given.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("zeros", ["none", "input", "weight", "both"])
@pytest.mark.parametrize("channels", [8, 64, 100, 256])
def test_exact_sums_at_every_level(channels: int, zeros: str, level: str) -> None:
    check_sums(channels, zeros)


def check_all_sums() -> None:
    for channels in (8, 100, 256):
        for zeros in ("none", "both"):
            check_sums(channels, zeros)


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
def test_without_counts_of_words() -> None:
    """A processor without AVX512-VPOPCNTDQ counts by a table of half bytes at its level."""
    code = "import test_binary_packed_conv2d as t; t.check_all_sums(); print('same')"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = {**os.environ, "TERSOR_CPU_VPOPCNTDQ": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (7, 300, 1, 1), (1, 64, 1, 300)])
@pytest.mark.parametrize("outputs", [1, 8, 70])
def test_pointwise_at_every_level(shape: tuple[int, ...], outputs: int, level: str) -> None:
    input, weight = torch.randn(shape), torch.randn(outputs, shape[1], 1, 1)
    given = binary_packed_conv2d(pack_signs(input), pack_binary_weight(weight), channels_last=False)
    assert torch.equal(given, F.conv2d(input.sign(), weight.sign()))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("activation", ["none", "hardtanh", "prelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_follows(relu: bool, activation: str, dtype: torch.dtype, run: tuple[str, str]) -> None:
    if run == ("cpu", "triton") and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong for it")
    device = run[0]
    input, weight = torch.randn(2, 20, 6, 5, device=device).round(), torch.randn(13, 20, 3, 3, device=device)
    residual = torch.randn(2, 13, 6, 5, device=device).mul(8).round().div(8).to(dtype)
    values = rows(13, device)
    sums = F.conv2d(input.sign(), weight.sign(), None, 1, 1)
    for last in (False, True):
        for added in (None, residual, residual.contiguous(memory_format=torch.channels_last)):
            end = epilogue(13, relu=relu, activation=activation, device=torch.device(device), **values)
            options = {"epilogue": end, "residual": added, "dtype": dtype, "channels_last": last}
            given = binary_packed_conv2d(pack_signs(input), pack_binary_weight(weight), 1, 1, **options)
            expected = _finish(sums, values, relu, None if added is None else added.float(), activation).to(dtype)
            assert torch.equal(given, expected)
            assert given.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@given(
    outputs=st.sampled_from([2, 8, 30, 64, 130]),
    groups=st.sampled_from([1, 2]),
    zeros=st.booleans(),
    level=st.sampled_from(LEVELS),
    seed=st.integers(0, 50),
)
def test_signs_by_thresholds(outputs: int, groups: int, zeros: bool, level: str, seed: int) -> None:
    torch.manual_seed(seed)
    input, weight = torch.randn(1, 70, 5, 4), torch.randn(outputs, 70, 3, 3)
    input = input.round() if zeros else input
    before = native.cpu_isa() if native else "none"
    try:
        if native:
            native.set_cpu_isa(level)
        packed = pack_signs(input), pack_binary_weight(weight)
        given = binary_packed_conv2d_signs(*packed, _thresholds(outputs, "cpu"), 1, 1, groups=groups)
    finally:
        if native:
            native.set_cpu_isa(before)
    s = F.conv2d(input.sign(), weight.sign(), None, 1, 1)
    direction, lower, upper = _thresholds(outputs, "cpu").view(3, -1, 1, 1)
    expected = (direction * ((s > upper).int() - (s < lower).int())).float()
    assert torch.equal(given.words, pack_signs(expected, groups=groups).words)


SIGNS, ONES = pack_signs(torch.ones(1, 6, 4, 4)), pack_binary_weight(torch.ones(4, 6, 3, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: binary_packed_conv2d(torch.ones(1), ONES), TypeError, "signs must be PackedSigns"),
        (lambda: binary_packed_conv2d(SIGNS, torch.ones(1)), TypeError, "weight must be a PackedBinaryWeight"),
        (lambda: binary_packed_conv2d(pack_signs(torch.ones(1, 5, 4, 4)), ONES), ValueError, "must have 6 channels"),
        (lambda: binary_packed_conv2d(pack_signs(torch.ones(1, 6, 2, 2)), ONES), ValueError, "at least as large"),
        (lambda: binary_packed_conv2d(SIGNS, ONES, dtype=torch.float64), TypeError, "dtype must be float16"),
        (lambda: binary_packed_conv2d(SIGNS, ONES, epilogue=3), TypeError, "epilogue must be an Epilogue, got int"),
        (
            lambda: binary_packed_conv2d(SIGNS, ONES, epilogue=Epilogue(torch.ones(7, 3))),
            ValueError,
            r"float32 \(7, 4\)",
        ),
        (lambda: binary_packed_conv2d(SIGNS, ONES, residual=torch.ones(1, 4, 4, 4)), ValueError, "residual must be"),
        (lambda: epilogue(4, activation="relu"), ValueError, "activation must be one of none, hardtanh, prelu"),
        (lambda: epilogue(4, scale=torch.ones(3)), ValueError, "scale must have 1 or 4 elements"),
        (lambda: epilogue(4, factor=torch.ones(4)), TypeError, "rows are scale, shift"),
        (lambda: binary_packed_conv2d_signs(SIGNS, ONES, torch.ones(3, 4)), TypeError, "thresholds must be a tensor"),
        (
            lambda: binary_packed_conv2d_signs(SIGNS, ONES, torch.ones(3, 5).int()),
            ValueError,
            r"thresholds must be \(3, 4\)",
        ),
        (
            lambda: binary_packed_conv2d_signs(SIGNS, ONES, torch.ones(3, 4).int(), groups=3),
            ValueError,
            "groups must divide",
        ),
        (lambda: pack_binary_weight(torch.ones(4, 6)), ValueError, r"weight must be \(O, C / groups, KH, KW\)"),
        (lambda: pack_binary_weight(torch.ones(4, 6, 3, 3), 3), ValueError, "groups must divide the output channels"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
