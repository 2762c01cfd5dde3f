"""The linear layer in whole numbers: exact on every backend and level, and close to the fake-quantised."""

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

import tersor
from tersor import _backends
from tersor.quantization import fake_quantize_bounds
from tersor.quantization.quantized_conv2d import prepare_weight
from tersor.quantization.quantized_linear import quantized_linear

EPS = 2.0**-23
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in Triton's interpreter
BOUNDS = [(-1.3, 2.0), (0.7, 2.0), (-1.0, 1.0), (10.0, 11.0)]
native = _backends._introspection()


def problem(
    shape: tuple[int, ...] = (3, 7, 5),
    outputs: int = 11,
    bits: int = 4,
    bounds: tuple[float, float] = BOUNDS[0],
    per_sample: bool = False,
    zero: int | None = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Arguments of quantized_linear."""
    generator = torch.Generator().manual_seed(0)
    lower, upper = (torch.tensor([b]) for b in bounds)
    if per_sample:
        size = (shape[0], *[1] * (len(shape) - 1)) if len(shape) > 1 else (1,)
        lower, upper = (b + 0.1 * torch.rand(size, generator=generator) for b in (lower, upper))
    scale = torch.rand(outputs, generator=generator) + 0.1
    tensors = {
        "input": 2 * torch.randn(shape, generator=generator).to(dtype),
        "weight": torch.randint(-128, 128, (outputs, shape[-1]), generator=generator).to(torch.int8),
        "weight_scale": scale,
        "weight_zero": None if zero is None else torch.full_like(scale, zero),
        "lower": lower,
        "upper": upper,
        "bias": torch.randn(outputs, generator=generator) if bias else None,
    }
    return {**{name: None if t is None else t.to(device) for name, t in tensors.items()}, "bits": bits}


_FIXED = {name: value for name, value in problem().items() if name != "input"}


def _function(input: Tensor) -> Tensor:
    device = input.device if isinstance(input, Tensor) else "cpu"
    return quantized_linear(input, **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in _FIXED.items()})


def _exact(input: Tensor) -> Tensor:
    with tersor.use_backend("reference"):
        return _function(input)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (problem(shape=(*size, 5), dtype=dtype, device=device)["input"],)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    p = {name: v.to(device, copy=True) if isinstance(v, Tensor) else v for name, v in _FIXED.items()}
    weight = prepare_weight(p["weight"][:, :, None, None], p["weight_scale"], p["weight_zero"], p["bias"])
    numbers = (*weight[:3], weight.zero, p["lower"], p["upper"], weight.bias, p["bits"])
    return (*_inputs(size, dtype, device), *numbers, False)


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("quantized_linear",),
        raw=_raw,
        sizes=[(2, 9), (3, 6), (1, 1)],
        quantizer=True,
        float64=False,
        differentiable=False,
        name="quantized_linear",
    )
]

CASES: list[dict[str, Any]] = [
    {},
    {"shape": (5,), "bits": 2},
    {"shape": (3, 5), "bits": 8, "zero": None},
    {"shape": (1, 64), "outputs": 40, "bias": False},
    {"shape": (2, 2, 3, 16), "outputs": 8, "per_sample": True},
    {"shape": (6, 33), "outputs": 17, "per_sample": True, "zero": None},
    {"shape": (13, 70), "outputs": 25, "bits": 8},
    {"shape": (2, 101, 48), "outputs": 16, "bits": 3},
    {"shape": (0, 5)},
    {"shape": (4, 0, 5), "per_sample": True},
]


def reference(p: dict[str, Any], **options: Any) -> Tensor:
    with tersor.use_backend("reference"):
        return quantized_linear(**p, **options)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_is_exact(case: dict[str, Any], bounds: tuple[float, float], run: tuple[str, str]) -> None:
    """Bit for bit the reference, which is within 2 eps of the fake-quantised layer."""
    assert _backends.running("quantized_linear", run[0]) == run[1]
    p = problem(bounds=bounds, device=run[0], **case)
    for relu in (False, True):
        output = quantized_linear(**p, relu=relu)
        assert output.is_contiguous()
        assert_same(output, reference(p, relu=relu))
        x = fake_quantize_bounds(p["input"], p["lower"], p["upper"], p["bits"], relu=relu)
        if p["bits"] == 8:  # whose 257th level has no code
            scale = 255 / (p["upper"] - p["lower"])
            x = torch.where(torch.round(scale * x) - torch.round(scale * p["lower"]) == 256, x - 1 / scale, x)
        zero = 0 if p["weight_zero"] is None else p["weight_zero"][:, None]
        weight = (p["weight"].float() + zero) * p["weight_scale"][:, None]
        bias = torch.zeros_like(p["weight_scale"]) if p["bias"] is None else p["bias"]
        exact, terms = (F.linear(*(f(t.double()) for t in (x, weight, bias))) for f in (torch.clone, torch.abs))
        assert ((output.double() - exact).abs() <= 2 * EPS * terms).all()


@given(
    rows=st.integers(1, 30),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    bits=st.integers(2, 8),
    zero=st.sampled_from([None, -2]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    turned=st.booleans(),
)
def test_sweep(
    rows: int, inputs: int, outputs: int, bits: int, zero: int | None, dtype: torch.dtype, turned: bool
) -> None:
    p = problem(shape=(rows, inputs), outputs=outputs, bits=bits, zero=zero, dtype=dtype)
    if turned:
        p["input"] = p["input"].t().contiguous().t()
    assert_same(quantized_linear(**p), reference(p))


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
@pytest.mark.parametrize("level", native.cpu_isa_supported() if native else ["none"])
def test_every_level_is_exact(level: str) -> None:
    before = native.cpu_isa()
    native.set_cpu_isa(level)
    try:
        check_all_cases()
    finally:
        native.set_cpu_isa(before)


def check_all_cases() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bounds in BOUNDS:
            for case in CASES:
                p = problem(bounds=bounds, dtype=dtype, **case)
                assert_same(quantized_linear(**p), reference(p))


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
def test_without_byte_products() -> None:
    """A processor without AVX512-VNNI takes numbers of 16 bits at its level."""
    code = "import test_quantized_linear as t; t.check_all_cases(); print('same')"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = {**os.environ, "TERSOR_CPU_VNNI": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for case in ({"shape": (400, 96), "outputs": 100}, {"shape": (1, 2048), "outputs": 1100}):
            p = problem(**case)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(quantized_linear(**p))
            assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input(value: float, zero: int | None, run: tuple[str, str]) -> None:
    """NaN comes out of its row, and of no other; infinities are clipped to the bounds."""
    p = problem(shape=(9, 20), zero=zero, device=run[0])
    p["input"][4, 17] = value
    output = quantized_linear(**p)
    assert_same(output, reference(p))
    nan = torch.zeros_like(output, dtype=torch.bool)
    nan[4] = value != value
    assert torch.equal(output.isnan(), nan)
    assert output[~nan].isfinite().all()


def test_largest_sums() -> None:
    """65536 terms of the largest codes fill 31 bits."""
    x, weight = torch.full((2, 65536), 9.0), torch.full((1, 65536), -128, dtype=torch.int8)
    output = quantized_linear(x, weight, torch.ones(1), None, torch.tensor([0.0]), torch.tensor([1.0]), 8)
    assert torch.equal(output, torch.full((2, 1), -128.0 * 65536))


def test_bounds_per_sample() -> None:
    p = problem(shape=(3, 4, 5), per_sample=True)
    output = quantized_linear(**p)
    for i in range(3):
        one = {**p, "input": p["input"][i], "lower": p["lower"][i, 0], "upper": p["upper"][i, 0]}
        assert torch.equal(output[i], quantized_linear(**one))
    one = {**p, "upper": p["upper"][:1].flatten()}  # one of them for all
    assert torch.equal(quantized_linear(**one)[0], output[0])


def test_has_no_derivative() -> None:
    p = problem()
    p["input"].requires_grad_()
    output = quantized_linear(**p)
    with pytest.raises(RuntimeError, match="quantized_linear has no derivative"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 5, dtype=torch.float64)}, TypeError, "input must be float16, bfloat16 or float32"),
        ({"input": [1.0]}, TypeError, r"input must be a torch\.Tensor, got list"),
        ({"input": torch.zeros(2, 4)}, ValueError, r"input must be \(\.\.\., 5\), got shape \(2, 4\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"input must be \(\.\.\., 5\), got shape \(\)"),
        ({"input": torch.zeros(2, 5, device="meta")}, ValueError, "weight must be on the device of input meta"),
        (
            {"weight": torch.zeros(6, 5, 1, 1)},
            ValueError,
            r"weight must be a tensor \(O, C\), got shape \(6, 5, 1, 1\)",
        ),
        ({"weight": None}, ValueError, r"weight must be a tensor \(O, C\), got NoneType"),
        (
            {"lower": torch.zeros(3, 1)},
            ValueError,
            r"lower must have one element or one per sample \(N, 1, \.\.\., 1\) for input \(3, 7, 5\), got.*\(3, 1\)",
        ),
        ({"lower": [0.0]}, TypeError, r"lower must be a torch\.Tensor, got list"),
        ({"bits": 1}, ValueError, "bits must be 2 to 8"),
        ({"bits": 32}, ValueError, "bits must be 2 to 8, got 32"),
        ({"lower": torch.tensor([2.0])}, ValueError, "lower must be less than upper, got lower 2.0 and upper 2.0"),
        ({"upper": torch.tensor([float("nan")])}, ValueError, "upper must be finite"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="quantized_linear: .*" + message):
        quantized_linear(**{**problem(), **change})


def test_operator_protects_its_memory() -> None:
    """Called without the public function, with tensors that do not fit each other."""
    p = problem()
    w = prepare_weight(p["weight"][:, :, None, None], p["weight_scale"], p["weight_zero"], p["bias"])
    good = [p["input"], w.blocks, w.sums, w.scale, w.zero, p["lower"], p["upper"], w.bias, 4, False]
    operator = torch.ops.tersor.quantized_linear
    assert operator(*good).shape == (3, 7, 11)
    if _backends.running("quantized_linear", "cpu") == "reference":
        return  # torch's own checks
    wide = prepare_weight(torch.zeros(11, 5, 1, 3, dtype=torch.int8), p["weight_scale"], None, None)
    wrong = [(0, p["input"].double()), (0, torch.randn(3, 17)), (1, w.blocks[:, :1]), (1, wide.blocks)]
    wrong += [(2, w.sums[:3]), (2, wide.sums), (3, w.scale[:3]), (4, w.zero[:3]), (5, torch.zeros(2)), (8, 9)]
    wrong += [(7, torch.zeros(2)), (1, w.blocks.float())]
    for place, value in wrong:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            operator(*good[:place], value, *good[place + 1 :])
