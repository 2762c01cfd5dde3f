"""The linear layer of signs in one operator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subject import Subject
from torch import Tensor

from tersor import _backends
from tersor.binary import (
    PackedBinaryWeight,
    binary_packed_conv2d,
    binary_packed_linear,
    epilogue,
    pack_binary_weight,
    pack_signs,
)

native = _backends._introspection()
LEVELS = native.cpu_isa_supported() if native else ["none"]
OUTPUTS, CHANNELS = 10, 70


WEIGHT = torch.randn(OUTPUTS, CHANNELS, generator=torch.Generator().manual_seed(0))
PACKED = pack_binary_weight(WEIGHT[:, :, None, None])


def _packed(device: str) -> PackedBinaryWeight:
    """Tensors of their own."""
    return PACKED._replace(blocks=PACKED.blocks.to(device, copy=True), sums=PACKED.sums.to(device, copy=True))


def affine(outputs: int, device: str = "cpu") -> Tensor:
    """Numbers that float32 multiplies and adds exactly."""
    return torch.stack([(torch.arange(outputs) % (3 + i) - 1.25) / 4 for i in range(2)]).to(device)


def _function(columns: Any) -> Tensor:
    """Of columns in place of rows, so that a single one is a wrong shape and none is contiguous."""
    if not isinstance(columns, Tensor):
        return binary_packed_linear(columns, PACKED)
    return binary_packed_linear(columns.t(), _packed(columns.device), affine(OUTPUTS, columns.device))


def _exact(columns: Tensor) -> Tensor:
    scale, shift = affine(OUTPUTS, columns.device).to(columns)
    return scale * F.linear(columns.t().sign(), WEIGHT.sign().to(columns)) + shift


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(CHANNELS, size).mul(2).round().div(2).to(device, dtype),)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return _inputs(size, dtype, device)[0].t(), *_packed(device)[:2], affine(OUTPUTS, device)


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("binary_packed_linear",), _raw, [5, 8, 1, 36],
        differentiable=False, autocast=False, alike=False, skips=True, float64=False,
        name="binary_packed_linear",
    )
]  # fmt: skip


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu_isa() if native else ""
    if native:
        native.set_cpu_isa(request.param)
    yield request.param
    if native:
        native.set_cpu_isa(before)


def check_sums(rows: int, channels: int, outputs: int, zeros: str) -> None:
    input, weight = torch.randn(rows, channels), torch.randn(outputs, channels)
    input = input.round() if zeros in ("input", "both") else input
    weight = weight.mul(2).round() if zeros in ("weight", "both") else weight
    packed, expected = pack_binary_weight(weight[:, :, None, None]), F.linear(input.sign(), weight.sign())
    assert torch.equal(binary_packed_linear(input, packed), expected)
    scale, shift = rows_of = torch.randn(2, outputs)
    assert torch.equal(binary_packed_linear(input, packed, rows_of), scale * expected + shift)


@pytest.mark.parametrize("zeros", ["none", "input", "weight", "both"])
@pytest.mark.parametrize("channels", [1, 64, 100, 2100])
def test_exact_sums_at_every_level(channels: int, zeros: str, level: str) -> None:
    for rows in (1, 3, 9):
        for outputs in (1, 21, 64):
            check_sums(rows, channels, outputs, zeros)


def check_all_sums() -> None:
    for rows, channels, outputs in ((1, 64, 33), (5, 100, 40)):
        for zeros in ("none", "both"):
            check_sums(rows, channels, outputs, zeros)


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
def test_without_counts_of_words() -> None:
    """A processor without AVX512-VPOPCNTDQ counts by a table of half bytes at its level."""
    code = "import test_binary_packed_linear as t; t.check_all_sums(); print('same')"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = {**os.environ, "TERSOR_CPU_VPOPCNTDQ": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize(("rows", "channels", "outputs"), [(1, 4096, 2048), (1, 8200, 1000), (40, 1024, 600)])
def test_shared_out_among_threads(rows: int, channels: int, outputs: int) -> None:
    """Enough work for more than one thread: the rows are shared out, or the outputs of a single one."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_sums(rows, channels, outputs, "none")
    finally:
        torch.set_num_threads(before)


def test_as_the_two_operators(run: tuple[str, str]) -> None:
    """What they give, to the last bit, whatever the layout of the input."""
    device = run[0]
    packed, end = _packed(device), affine(OUTPUTS, device) * 1.1
    rows = epilogue(OUTPUTS, scale=end[0], shift=end[1], device=torch.device(device))
    for dtype in (torch.float32, torch.float16):
        input = torch.randn(CHANNELS, 6, device=device).round().to(dtype).T
        maps = pack_signs(input[:, :, None, None])
        expected = binary_packed_conv2d(maps, packed, epilogue=rows, dtype=dtype).flatten(1)
        given = binary_packed_linear(input, packed, end)
        assert given.dtype == dtype
        assert torch.equal(given, expected)
        assert torch.equal(binary_packed_linear(input.view(2, 3, CHANNELS), packed, end), expected.view(2, 3, OUTPUTS))
        assert torch.equal(binary_packed_linear(input[0], packed, end), expected[0])


ONES = pack_binary_weight(torch.ones(4, 6, 1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: binary_packed_linear([1.0], ONES), TypeError, r"input must be a torch\.Tensor, got list"),
        (lambda: binary_packed_linear(torch.ones(2, 6).double(), ONES), TypeError, "float32, got torch.float64"),
        (lambda: binary_packed_linear(torch.ones(2, 6), torch.ones(4, 6)), TypeError, "must be a PackedBinaryWeight"),
        (lambda: binary_packed_linear(torch.ones(2, 5), ONES), ValueError, r"\(\.\.\., 6\), got shape \(2, 5\)"),
        (lambda: binary_packed_linear(torch.tensor(1.0), ONES), ValueError, r"\(\.\.\., 6\), got shape \(\)"),
        (
            lambda: binary_packed_linear(torch.ones(2, 6), pack_binary_weight(torch.ones(4, 6, 3, 3))),
            ValueError,
            r"got a kernel of \(3, 3\) in 1",
        ),
        (
            lambda: binary_packed_linear(torch.ones(2, 3), pack_binary_weight(torch.ones(4, 3, 1, 1), 2)),
            ValueError,
            r"got a kernel of \(1, 1\) in 2",
        ),
        (lambda: binary_packed_linear(torch.ones(2, 6), ONES, 2.0), TypeError, "affine must be a torch.Tensor"),
        (
            lambda: binary_packed_linear(torch.ones(2, 6), ONES, torch.ones(2, 3)),
            ValueError,
            r"affine must be torch\.float32 of shape \(2, 4\), got torch\.float32 of shape \(2, 3\)",
        ),
        (
            lambda: binary_packed_linear(torch.ones(2, 6), ONES, torch.ones(2, 4).half()),
            ValueError,
            r"affine must be torch\.float32 of shape \(2, 4\), got torch\.float16",
        ),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_operator_protects_memory() -> None:
    if native is None:
        pytest.skip("the C++ library was not built here")
    raw = torch.ops.tersor.binary_packed_linear
    for arguments in (
        (torch.ones(2, 130), *ONES[:2], None),
        (torch.ones(2, 6), ONES.blocks[:, :, :0], ONES.sums, None),
        (torch.ones(2, 6), ONES.blocks, torch.ones(40, 1, 1).int(), None),
        (torch.ones(2, 6), *ONES[:2], torch.ones(2, 3)),
    ):
        with pytest.raises(RuntimeError, match=r"weight must be|affine must be"):
            raw(*arguments)


def test_has_no_derivative() -> None:
    packed = pack_binary_weight(torch.randn(4, 10, 1, 1))
    output = binary_packed_linear(torch.randn(3, 10, requires_grad=True), packed)
    with pytest.raises(RuntimeError, match="binary_packed_linear has no derivative"):
        output.sum().backward()
