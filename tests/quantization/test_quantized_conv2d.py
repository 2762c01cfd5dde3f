"""Convolution in whole numbers: exact on every backend and level, and close to the fake-quantised."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolution_problem import problem
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor
from tersor import _backends
from tersor.quantization import fake_quantize_bounds
from tersor.quantization.quantized_conv2d import _unblock, convolve, prepare_weight, quantized_conv2d

EPS = 2.0**-23
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in Triton's interpreter
BOUNDS = [(-1.3, 2.0), (0.7, 2.0), (-3.0, -1.0), (0.0, 1.0), (10.0, 11.0), (-1.0, 1.0)]
native = _backends._introspection()


_FIXED = {name: value for name, value in problem()[0].items() if name != "input"}


def _function(input: Tensor) -> Tensor:
    device = input.device if isinstance(input, Tensor) else "cpu"
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in _FIXED.items()}
    return quantized_conv2d(input, **moved, padding=1)


def _exact(input: Tensor) -> Tensor:
    with tersor.use_backend("reference"):
        return _function(input)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (problem(batch=size[0], size=size[1:], dtype=dtype, device=device)[0]["input"],)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    p = {name: v.to(device, copy=True) if isinstance(v, Tensor) else v for name, v in _FIXED.items()}
    weight = prepare_weight(p["weight"], p["weight_scale"], p["weight_zero"], p["bias"])
    bounds = p["lower"], p["upper"]
    window = [1, 1], [1, 1], [1, 1]
    return (
        *_inputs(size, dtype, device),
        *weight[:3],
        weight.zero,
        *bounds,
        weight.bias,
        None,
        p["bits"],
        *window,
        False,
        False,
        False,
    )


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("quantized_conv2d",),
        raw=_raw,
        sizes=[(2, 9, 7), (3, 6, 8), (1, 3, 3)],
        quantizer=True,
        float64=False,
        differentiable=False,
        name="quantized_conv2d",
    )
]


def fake_quantized(p: dict[str, Any], relu: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """The float convolution of the fake-quantised tensors, summed in float64, and that of the absolute values."""
    x = fake_quantize_bounds(p["input"].float(), p["lower"], p["upper"], p["bits"], relu=relu)
    zero = 0 if p["weight_zero"] is None else p["weight_zero"].view(-1, 1, 1, 1)
    weight = (p["weight"].float() + zero) * p["weight_scale"].view(-1, 1, 1, 1)
    bias = torch.zeros(weight.shape[0]).to(x) if p["bias"] is None else p["bias"]
    tensors = [t.double() for t in (x, weight, bias)]
    return F.conv2d(*tensors, **options), F.conv2d(*(t.abs() for t in tensors), **options)


def reference(p: dict[str, Any], **options: Any) -> Tensor:
    with tersor.use_backend("reference"):
        return quantized_conv2d(**p, **options)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    assert (ours.shape, ours.dtype, ours.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


CASES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"padding": 1, "relu": True, "bits": 2},
    {"padding": (2, 0), "stride": (2, 1), "bits": 3},
    {"padding": 2, "stride": 3, "dilation": 2, "bits": 8, "zero": None},
    {"padding": 5, "dilation": (1, 2), "per_sample": True, "per_channel": True},
    {"channels": 6, "outputs": 9, "groups": 3, "padding": 1, "zero": -7},
    {"channels": 4, "outputs": 4, "groups": 4, "padding": 1, "kernel": (2, 3), "bias": False},
    {"channels": 33, "outputs": 17, "kernel": (1, 1), "size": (7, 14), "bits": 8},
    {"channels": 17, "outputs": 8, "size": (2, 70), "padding": 1, "zero": None},
    {"batch": 1, "channels": 3, "size": (1, 1), "padding": 1, "per_sample": True},
    {"padding": 1, "output_relu": True, "residual": True},
    {"channels": 33, "outputs": 17, "kernel": (1, 1), "size": (7, 14), "residual": True, "per_channel": True},
    {"padding": 1, "stride": 2, "relu": True, "output_relu": True},
    {"channels": 6, "outputs": 20, "groups": 2, "size": (5, 40), "output_relu": True, "residual": True},
    {"batch": 0},
    {"stride": (1000000, 9), "kernel": (2, 1), "dilation": (1, 1000000)},
]


def split(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a case, what describes the tensors, and the options of the call."""
    options = {k: case[k] for k in ("stride", "padding", "dilation", "relu", "output_relu") if k in case}
    return {k: v for k, v in case.items() if k not in (*options, "residual")}, options


def with_residual(p: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options with something to add to the output, about as large."""
    plain = reference(p, **options)
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3)).to(plain)
    return options | {"residual": noise * plain.nan_to_num().abs().mean()}


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_is_exact(case: dict[str, Any], bounds: tuple[float, float], run: tuple[str, str]) -> None:
    """Bit for bit the reference, which is within 2 eps of the fake-quantised convolution."""
    assert _backends.running("quantized_conv2d", run[0]) == run[1]
    what, options = split(case)
    p, groups = problem(bounds=bounds, device=run[0], **what)
    options |= groups
    plain = {name: value for name, value in options.items() if name != "output_relu"}
    if case.get("residual"):
        options = with_residual(p, options)
    output = quantized_conv2d(**p, **options)
    assert_same(output, reference(p, **options))
    if "residual" in options or "output_relu" in options:  # as if computed after the convolution
        after = quantized_conv2d(**p, **plain) + options.get("residual", 0)
        assert_same(output, torch.relu(after) if options.get("output_relu") else after)
        return
    if p["bits"] == 8 and bounds == (-1.0, 1.0):
        return  # the extra level: see below
    exact, terms = fake_quantized(p, **options)
    assert ((output.double() - exact).abs() <= 2 * EPS * terms).all()


@pytest.mark.parametrize("mode", [2, 4, 8])
def test_against_float_convolution(mode: int) -> None:
    """And torch's own float32 convolution, which adds at most one rounding for each of its terms."""
    p, groups = problem(channels=64, outputs=32, size=(12, 20), bits=mode, zero=None)
    x = fake_quantize_bounds(p["input"], p["lower"], p["upper"], mode)
    plain = F.conv2d(x, p["weight"].float() * p["weight_scale"], p["bias"], padding=1)
    terms = fake_quantized(p, padding=1)[1]
    ours = quantized_conv2d(**p, padding=1, **groups)
    assert ((ours - plain).abs() <= (64 * 9 + 3) * EPS * terms).all()
    assert ((ours - plain).abs() <= 8 * EPS * terms).float().mean() > 0.99


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    pair = st.tuples
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(pair(st.integers(1, 4), st.integers(1, 4)))
    padding, dilation = (
        draw(pair(st.integers(0, 4), st.integers(0, 4))),
        draw(pair(st.integers(1, 3), st.integers(1, 3))),
    )
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    wide = st.one_of(st.integers(0, 20), st.sampled_from([31, 32, 48, 50, 64, 70]))
    return problem(
        batch=draw(st.integers(0, 3)),
        channels=groups * draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 33])),
        outputs=groups * draw(st.sampled_from([1, 2, 7, 8, 9, 16, 20])),
        size=(least[0] + draw(st.integers(0, 12)), least[1] + draw(wide)),
        kernel=kernel,
        groups=groups,
        bits=draw(st.integers(2, 8)),
        bounds=draw(st.sampled_from(BOUNDS)),
        per_sample=draw(st.booleans()),
        zero=draw(st.sampled_from([None, 0, 5, -300])),
        per_channel=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
        padding=padding,
        dilation=dilation,
        stride=draw(pair(st.integers(1, 3), st.integers(1, 3))),
        relu=draw(st.booleans()),
        output_relu=draw(st.booleans()),
    )


def layouts(x: Tensor) -> Iterator[Tensor]:
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.stack([x, x], dim=-1)[..., 0]
    yield torch.cat([x, x], dim=1)[:, x.shape[1] :]


@given(drawn=problems(), layout=st.integers(0, 4), residual=st.booleans())
def test_sweep(drawn: tuple[dict[str, Any], dict[str, Any]], layout: int, residual: bool) -> None:
    p, options = drawn
    options = with_residual(p, options) if residual else options
    p["input"] = list(layouts(p["input"]))[layout]
    assert_same(quantized_conv2d(**p, **options), reference(p, **options))


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
        for bounds in BOUNDS[:3]:
            for case in CASES:
                what, options = split(case)
                p, groups = problem(bounds=bounds, dtype=dtype, **what)
                options |= groups
                if case.get("residual"):
                    options = with_residual(p, options)
                for x in list(layouts(p["input"])):
                    p["input"] = x
                    assert_same(quantized_conv2d(**p, **options), reference(p, **options))


@pytest.mark.skipif(native is None, reason="the C++ library was not built here")
def test_without_byte_products() -> None:
    """A processor without AVX512-VNNI takes the pairs of 16 bits at its level."""
    code = "import test_quantized_conv2d as t; t.check_all_cases(); print('same')"
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = {**os.environ, "TERSOR_CPU_VNNI": "0", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for case in ({"size": (40, 50)}, {"batch": 1, "size": (1, 1), "outputs": 40}, {"batch": 1, "size": (90, 33)}):
            p, groups = problem(**case)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(quantized_conv2d(**p, padding=1, **groups))
            assert all(torch.equal(results[0], r) for r in results[1:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("zero", [None, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input(value: float, zero: int | None, run: tuple[str, str]) -> None:
    """NaN comes out where its windows are, and nowhere else; infinities are clipped to the bounds."""
    p, groups = problem(device=run[0], zero=zero, channels=6, groups=2)
    p["input"][1, 4, 3, 2] = value
    output = quantized_conv2d(**p, padding=1, **groups)
    assert_same(output, reference(p, padding=1, **groups))
    nan = torch.zeros_like(output, dtype=torch.bool)
    nan[1, 3:, 2:5, 1:4] = value != value
    assert torch.equal(output.isnan(), nan)
    assert output[~nan].isfinite().all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_extra_top_level(bits: int, run: tuple[str, str]) -> None:
    """Bounds of opposite sign have 2^bits + 1 levels: all have codes, but for the top one of 8 bits."""
    lower, upper, x = torch.tensor([-1.0]), torch.tensor([1.0]), torch.linspace(-1.1, 1.1, 1600).view(1, 1, 40, 40)
    one = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    tensors = [t.to(run[0]) for t in (x, one, torch.ones(1), lower, upper)]
    output = quantized_conv2d(*tensors[:3], None, *tensors[3:], bits)
    expected = fake_quantize_bounds(tensors[0], *tensors[3:], bits)
    levels = expected.unique()
    assert len(levels) == 2**bits + 1
    if bits == 8:
        expected = torch.where(expected == levels[-1], levels[-2], expected)
    torch.testing.assert_close(output, expected, rtol=EPS, atol=0)


def test_largest_sums() -> None:
    """65536 terms of the largest codes fill 31 bits."""
    x, weight = torch.full((1, 65536, 1, 2), 9.0), torch.full((1, 65536, 1, 1), -128, dtype=torch.int8)
    lower, upper = torch.tensor([0.0]), torch.tensor([1.0])
    output = quantized_conv2d(x, weight, torch.ones(1), None, lower, upper, 8)
    assert torch.equal(output, torch.full((1, 1, 1, 2), -128.0 * 65536))


def test_memory_format_and_poison(run: tuple[str, str]) -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        p, groups = problem(device=run[0])
        plain = quantized_conv2d(**p, padding=1, **groups)
        assert plain.is_contiguous()
        p["input"] = p["input"].contiguous(memory_format=torch.channels_last)
        output = quantized_conv2d(**p, padding=1, **groups)
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(output, plain)
        assert output.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_registration(run: tuple[str, str]) -> None:
    for case in CASES:
        what, options = split(case)
        p, groups = problem(device=run[0], **what)
        calls: list[tuple[Any, ...]] = []
        operator = torch.ops.tersor.quantized_conv2d.default
        with _Record(calls):
            quantized_conv2d(**p, **options, **groups)
        torch.library.opcheck(operator, calls[0])


class _Record(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the operator's own arguments."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.tersor.quantized_conv2d.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def test_compile_export_vmap(run: tuple[str, str]) -> None:
    p, groups = problem(device=run[0])
    x, rest = p.pop("input"), p

    class Module(torch.nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return quantized_conv2d(input, **rest, padding=1, **groups)

    expected = Module()(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Module(), fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(Module(), (x,))
    assert any(node.target is torch.ops.tersor.quantized_conv2d.default for node in program.graph.nodes)
    assert torch.equal(program.module()(x), expected)
    stacked = torch.stack([x, x.flip(0)], dim=1)
    mapped = torch.func.vmap(Module(), in_dims=1)(stacked)
    assert torch.equal(mapped, torch.stack([expected, expected.flip(0)]))


def test_has_no_derivative() -> None:
    p, groups = problem()
    p["input"].requires_grad_()
    output = quantized_conv2d(**p, **groups)
    with pytest.raises(RuntimeError, match="quantized_conv2d"):
        output.sum().backward()


def test_blocks_hold_the_codes() -> None:
    p, _ = problem(channels=34, outputs=18, groups=2)
    prepared = prepare_weight(p["weight"], p["weight_scale"], p["weight_zero"], p["bias"], 2)
    assert prepared.blocks.shape == (2, 2, 3, 3, 2, 8, 16)
    assert torch.equal(_unblock(prepared.blocks, 18, 17), p["weight"])
    assert prepared.blocks.long().sum() == p["weight"].long().sum(), "zeros beyond the channels"
    assert torch.equal(prepared.sums.long(), p["weight"].long().sum(1))
    window = ([1, 1], [0, 0], [1, 1])
    again = convolve("test", p["input"], prepared, p["lower"], p["upper"], p["bits"], *window)
    assert torch.equal(again, quantized_conv2d(**p, groups=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input": torch.zeros(2, 5, 9, 7, dtype=torch.float64)},
            TypeError,
            "input must be float16, bfloat16 or float32",
        ),
        ({"input": torch.zeros(2, 5, 9, 7, dtype=torch.int64)}, TypeError, "input must be float16"),
        ({"input": [1.0]}, TypeError, r"input must be a torch\.Tensor, got list"),
        ({"input": torch.zeros(2, 4, 9, 7)}, ValueError, r"input must be \(N, 5, H, W\).*got shape \(2, 4, 9, 7\)"),
        ({"input": torch.zeros(2, 5, 9)}, ValueError, r"input must be \(N, 5, H, W\)"),
        ({"input": torch.zeros(2, 5, 9, 7, device="meta")}, ValueError, "weight must be on the device of input meta"),
        ({"input": torch.zeros(2, 5, 2, 7)}, ValueError, "input must be at least as large as the window"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, TypeError, r"weight must be a tensor of int8, got torch\.float32"),
        ({"weight": torch.zeros(6, 5, 3, dtype=torch.int8)}, ValueError, r"weight must be \(O, C / groups, KH, KW\)"),
        ({"weight": torch.zeros(6, 65537, 1, 1, dtype=torch.int8)}, ValueError, "at most 65536 codes.*got 65537"),
        ({"weight_scale": torch.zeros(5)}, ValueError, r"weight_scale must have one element or shape \(6,\)"),
        ({"weight_scale": None}, TypeError, r"weight_scale must be a torch\.Tensor, got NoneType"),
        ({"weight_zero": torch.zeros(5)}, ValueError, r"weight_zero must have one element or shape \(6,\)"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must have shape \(6,\), got shape \(1,\)"),
        ({"lower": torch.zeros(2)}, ValueError, r"lower must have one element or shape \(2, 1, 1, 1\)"),
        ({"bits": 1}, ValueError, "bits must be 2 to 8"),
        ({"bits": 32}, ValueError, "bits must be 2 to 8, got 32"),
        ({"groups": 4}, ValueError, r"groups must divide the output channels \(6\), got 4"),
        ({"stride": 0}, ValueError, "stride must be an int or two ints of at least 1, got 0"),
        ({"stride": 1.5}, TypeError, "stride must be an int or two ints, got float"),
        ({"padding": (1, -1)}, ValueError, "padding must be an int or two ints of at least 0"),
        ({"padding": "same"}, TypeError, "padding must be an int or two ints, got str"),
        ({"dilation": (1, 1, 1)}, ValueError, "dilation must be an int or two ints of at least 1"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str, run: tuple[str, str]) -> None:
    p, groups = problem()
    with pytest.raises(error, match="quantized_conv2d: .*" + message):
        quantized_conv2d(**{**p, **groups, **change})


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower": torch.tensor([2.0])}, "lower must be less than upper, got lower 2.0 and upper 2.0"),
        ({"upper": torch.tensor([float("nan")])}, "upper must be finite"),
        ({"lower": torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)}, "lower must be less than upper, got lower 3.0"),
    ],
)
def test_bad_bounds(change: dict[str, Any], message: str, backend: str) -> None:
    """Their values are read on the CPU only."""
    p, groups = problem()
    context = contextlib.nullcontext() if backend == "default" else tersor.use_backend(backend)
    with context, pytest.raises(ValueError, match="quantized_conv2d: .*" + message):
        quantized_conv2d(**{**p, **groups, **change})


def test_operator_protects_its_memory() -> None:
    """Called without the public function, with tensors that do not fit each other."""
    p, _ = problem()
    w = prepare_weight(p["weight"], p["weight_scale"], p["weight_zero"], p["bias"])
    good = [p["input"], w.blocks, w.sums, w.scale, w.zero, p["lower"], p["upper"], w.bias, None, 4]
    window: list[Any] = [[1, 1], [0, 0], [1, 1], False, False, False]
    operator = torch.ops.tersor.quantized_conv2d
    assert operator(*good, *window).shape == (2, 6, 7, 5)
    if _backends.running("quantized_conv2d", "cpu") == "reference":
        return  # torch's own checks
    wrong = {0: p["input"][:, :1, :1], 1: w.blocks[:, :, :2], 2: w.sums[:2, :1], 3: w.scale[:3], 4: w.zero[:3]}
    wrong |= {5: torch.zeros(3), 7: torch.zeros(2), 8: torch.zeros(2, 6, 7, 4), 9: 9}
    for place, value in wrong.items():
        with pytest.raises((RuntimeError, ValueError)):
            operator(*good[:place], value, *good[place + 1 :], *window)
    for place, value in ((0, [1]), (0, [0, 1]), (1, [-1, 0]), (2, [2**40, 1])):
        with pytest.raises((RuntimeError, ValueError)):
            operator(*good, *window[:place], value, *window[place + 1 :])
