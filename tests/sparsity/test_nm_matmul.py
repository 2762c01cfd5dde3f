"""Product with a packed N:M matrix: the same as with the dense one, on every backend, level and pattern."""

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
from packed_problem import ACTIVATIONS, ERRORS, PATTERNS, packed_weight
from subject import Subject
from torch import Tensor

import tersor
from tersor import _backends
from tersor.sparsity import nm_matmul, nm_pack
from tersor.sparsity.nm_crossover import CROSSOVERS
from tersor.sparsity.nm_unpack import unpack_rows

native = _backends._introspection()


def _fixed(n: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    _, values, index = packed_weight((10, 6 * m), n, m)
    torch.random.set_rng_state(generator)
    return values, index


def _subject(n: int, m: int, activation: str) -> Subject:
    values, index = _fixed(n, m)

    def function(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        device = input.device if isinstance(input, Tensor) else "cpu"
        return nm_matmul(input, values, index.to(device), n, m, bias, activation)

    def exact(input: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return ACTIVATIONS[activation](F.linear(input, unpack_rows(values, index.to(values.device), n, m), bias))

    def inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        tensors = torch.randn(*size, 6 * m), values, torch.linspace(-1, 1, 10)
        return tuple(t.to(device, dtype, copy=True) for t in tensors)

    def raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        input, own, bias = inputs(size, dtype, device)
        return input, own, index.to(device, copy=True), bias, n, m, activation

    return Subject(
        function=function,
        exact=exact,
        inputs=inputs,
        options=(),
        operators=("nm_matmul",),
        raw=raw,
        sizes=[(8, 11), (13, 7), (14, 33), (1, 3)],
        float64=False,
        differentiable=False,
        alike=False,
        skips=True,
        name=f"nm_matmul_{n}of{m}_{activation}",
    )


SUBJECTS = [_subject(2, 4, "gelu"), _subject(1, 16, "none"), _subject(5, 12, "relu")]


def check(input: Tensor, weight: Tensor, values: Tensor, index: Tensor, n: int, m: int, **options: Any) -> None:
    """Against the dense product in float64."""
    output = nm_matmul(input, values, index, n, m, **options)
    wide, bias = input.double(), options.get("bias")
    bias = torch.zeros(weight.shape[0]).to(wide) if bias is None else bias.double()
    exact = ACTIVATIONS[options.get("activation", "none")](F.linear(wide, weight.double(), bias))
    terms = F.linear(wide.abs(), weight.double().abs(), bias.abs())
    assert (output.shape, output.dtype) == (exact.shape, input.dtype)
    assert output.is_contiguous()
    assert ((output.double() - exact).abs() <= ERRORS[input.dtype] * (terms + 0.5)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "{}of{}".format(*p))
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_every_pattern(pattern: tuple[int, int], dtype: torch.dtype, run: tuple[str, str]) -> None:
    if run == ("cpu", "triton") and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong for bfloat16")
    n, m = pattern
    slow = run[1] == "triton"  # the interpreter; test_nm_matmul_triton.py has more
    for outputs, groups in ((37, 20),) if slow else ((1, 1), (37, 20), (70, 41)):
        weight, values, index = (t.to(run[0]) for t in packed_weight((outputs, groups * m), n, m, dtype))
        bias = torch.randn(outputs).to(run[0], dtype)
        for batch in (3, 20) if slow else (0, 1, 2, 3, 7, 9, 24, 70, 130):
            input = torch.randn(batch, groups * m).to(run[0], dtype)
            check(input, weight, values, index, n, m, bias=bias, activation="gelu")
            check(input, weight, values, index, n, m)


@given(
    pattern=st.sampled_from(PATTERNS),
    outputs=st.integers(0, 40),
    groups=st.integers(0, 30),
    batch=st.lists(st.integers(0, 9), max_size=3),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(list(ERRORS)),
    bias=st.booleans(),
    layout=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_sweep(
    pattern: tuple[int, int],
    outputs: int,
    groups: int,
    batch: list[int],
    activation: str,
    dtype: torch.dtype,
    bias: bool,
    layout: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    n, m = pattern
    weight, values, index = packed_weight((outputs, groups * m), n, m, dtype)
    input = torch.randn(*batch, groups * m).to(dtype)
    if layout == 1:
        input = torch.stack([input, input], dim=-1)[..., 0]
    if layout == 2:
        input = input[..., None].expand(*input.shape, 3).transpose(-1, -2)
    own = torch.randn(outputs).to(dtype) if bias else None
    check(input, weight, values, index, n, m, bias=own, activation=activation)


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
@pytest.mark.parametrize("level", native.cpu_isa_supported() if native else ["none"])
def test_every_level(level: str) -> None:
    before = native.cpu_isa()
    native.set_cpu_isa(level)
    try:
        for dtype in ERRORS:
            for n, m in PATTERNS:
                weight, values, index = packed_weight((37, 41 * m), n, m, dtype)
                for batch in (1, 2, 5, 12, 40, 100):
                    check(torch.randn(batch, 41 * m).to(dtype), weight, values, index, n, m, activation="relu")
    finally:
        native.set_cpu_isa(before)


def check_bfloat16() -> None:
    for n, m in PATTERNS:
        weight, values, index = packed_weight((70, 41 * m), n, m, torch.bfloat16)
        for batch in (3, 40, 300):
            check(torch.randn(batch, 41 * m).bfloat16(), weight, values, index, n, m, activation="gelu")


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
def test_without_matrix_tiles() -> None:
    """A processor without AMX takes vectors for bfloat16 too."""
    code = "import test_nm_matmul as t; t.check_bfloat16(); print('same')"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = {**os.environ, "TERSOR_CPU_AMX": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_long_rows() -> None:
    """Longer than what is taken at a time, for few columns and for many."""
    for n, m in ((1, 2), (2, 4), (1, 16), (4, 8), (5, 12)):
        weight, values, index = packed_weight((5, 9600), n, m)
        for batch in (1, 3, 30):
            check(torch.randn(batch, 9600), weight, values, index, n, m)


def test_many_outputs() -> None:
    """More than one thread's sums have room for."""
    for n, m in ((2, 4), (1, 16)):
        weight, values, index = packed_weight((9001, 2 * m), n, m)
        check(torch.randn(30, 2 * m), weight, values, index, n, m, bias=torch.randn(9001))


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for n, m in ((2, 4), (1, 16), (4, 8)):
            for batch, outputs in ((1, 300), (100, 40), (200, 300)):
                _, values, index = packed_weight((outputs, 16 * m), n, m)
                input, results = torch.randn(batch, 16 * m), []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(nm_matmul(input, values, index, n, m))
                assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_gelu_is_exact(run: tuple[str, str]) -> None:
    """Over all sizes of its argument, to 3e-7 of it or of 1: torch's own has 2.8e-7."""
    points = 2001 if run[1] == "triton" else 20001
    x = torch.cat([torch.linspace(-9, 9, points), torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30])])
    x = torch.cat([x, x.new_zeros(-len(x) % 2)]).to(run[0])
    values, index = (t.to(run[0]) for t in nm_pack(torch.tensor([[1.0, 0.0]]), None, 1, 2))
    input = torch.stack([x, torch.zeros_like(x)], dim=1)
    output = nm_matmul(input, values, index, 1, 2, activation="gelu")[:, 0]
    exact = F.gelu(x.double())
    assert ((output.double() - exact).abs() <= 3e-7 * x.abs().clamp(min=1)).all()


def test_what_is_kept_spreads_what_is_not_finite(run: tuple[str, str]) -> None:
    weight = torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    values, index = (t.to(run[0]) for t in nm_pack(weight, None, 1, 4))
    for batch in (1, 40):
        input = torch.ones(batch, 4)
        input[0, 1] = float("nan")
        output = nm_matmul(input.to(run[0]), values, index, 1, 4)
        assert output[0, 0].isnan()
        assert torch.equal(output[1:], torch.tensor([[2.0, 1.0]]).to(output).expand(batch - 1, 2))


def test_damaged_index_stays_inside_the_tensors() -> None:
    """Results are meaningless then, but no other memory is touched."""
    for n, m in PATTERNS:
        for batch in (1, 5, 40):
            _, values, index = packed_weight((33, 7 * m), n, m)
            for byte in (0, 255, 0b10110110):
                nm_matmul(torch.ones(batch, 7 * m), values, torch.full_like(index, byte), n, m)


def test_refuses_a_derivative() -> None:
    _, values, index = packed_weight((3, 8), 2, 4)
    input = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        nm_matmul(input, values, index, 2, 4).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 4}, ValueError, "1 <= n < m <= 16"),
        ({"n": 1}, ValueError, r"values must be \(O, K / m, n\) with n = 1"),
        ({"m": 8}, ValueError, r"index must have shape \(6, 3\)"),
        ({"index": torch.zeros(6, 2)}, TypeError, "index must be a uint8 tensor"),
        ({"index": torch.zeros(6, 1, dtype=torch.uint8)}, ValueError, "index must have shape"),
        ({"input": torch.zeros(2, 13)}, ValueError, r"input must be \(\.\.\., 12\)"),
        ({"input": torch.zeros(2, 12).half()}, TypeError, "values must have the dtype of input"),
        ({"input": torch.zeros(2, 12).double()}, TypeError, "input must be float16, bfloat16 or float32"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(6,\)"),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias must have the dtype"),
        ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, gelu, got 'tanh'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    _, values, index = packed_weight((6, 12), 2, 4)
    arguments = {"input": torch.zeros(2, 12), "values": values, "index": index, "n": 2, "m": 4} | change
    with pytest.raises(error, match=message):
        nm_matmul(**arguments)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_dense_product_where_it_is_faster(dtype: torch.dtype) -> None:
    """The same results on both sides of every crossover, and the packed kernel on one of them only."""
    calls: list[int] = []
    packed = torch.ops.tersor.nm_matmul.default

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(args[0].shape[0]) if func is packed else None
            return func(*args, **(kwargs or {}))

    for crossover in (c for c in CROSSOVERS if c.product == "linear" and c.dtype == dtype):
        n, m = (3, 4) if crossover.density else (2, 4)
        weight, values, index = packed_weight((9, 8 * m), n, m, dtype)
        calls.clear()
        for batch in (crossover.columns - 1, crossover.columns):
            with Count():
                check(torch.randn(batch, 8 * m).to(dtype), weight, values, index, n, m, bias=torch.randn(9).to(dtype))
        assert calls == [crossover.columns - 1]
    assert dtype == torch.float16 or calls
    assert str(CROSSOVERS[0]) in str(tersor.backends())
