"""What is special to the Triton kernels of the quantisers: tiles, layouts, sums, rounding, and what the compiler emits.

The kernels run on CPU tensors in Triton's interpreter, which is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m pytest tests/quantization/test_quantization_triton.py``. It computes bfloat16 wrongly,
hence float32 and float16 only. The compiler's tests run without that variable.
"""

import importlib
import itertools
import os
import re

import pytest
import torch

import tersor
from tersor import _backends, _operator

pytest.importorskip("triton", reason="triton is not installed")

import ahead_of_time_triton as ahead
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tersor.triton_kernels.quantization import _fake_quantize as shared

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity in the interpreter

PLACES = ("bounds", "pact", "lsq", "lsq_plus", "affine", "add")
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def on_triton():
    """Runs the test on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        names = [name for name, op in _operator.REGISTRY.items() if op.place.startswith("quantization/")]
        ours = [name for name in names if "fake_quantize" in name or name == "percentile_bounds"]
        assert len(ours) == 15
        assert {_backends.running(name, "cpu") for name in ours} == {"triton"}
        yield


def bits(tensor):
    """The tensor's bits, with one NaN for all."""
    whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.where(tensor.isnan(), NAN, tensor).contiguous().view(whole)


def same(ours, theirs):
    """Bit for bit, signs of zeros too, and the same strides."""
    return ours.dtype == theirs.dtype and ours.stride() == theirs.stride() and torch.equal(bits(ours), bits(theirs))


def check(function, inputs, parameters, grad_output):
    """Output and input gradients are the reference's bits; parameter gradients are close to its float64 sums."""
    results = []
    for backend, dtype in (("triton", None), ("reference", None), ("reference", torch.float64)):
        data = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        values = [p.detach().to(dtype or p.dtype).requires_grad_() for p in parameters]
        with tersor.use_backend(backend):
            output = function(*data, *values)
            grads = torch.autograd.grad(output, (*data, *values), grad_output.to(output.dtype))
        results.append((output.detach(), *grads))
    ours, theirs, exact = results
    exact_parts = 1 + len(inputs)
    for i in range(exact_parts):
        assert same(ours[i], theirs[i]), ("output", *("input",) * len(inputs))[i]
    for mine, reference, sums in zip(ours[exact_parts:], theirs[exact_parts:], exact[exact_parts:], strict=True):
        assert mine.shape == reference.shape
        assert mine.is_contiguous()
        assert torch.equal(mine.isnan(), reference.isnan())
        finite = reference.isfinite()
        # Float32 and float64 may round an element to different levels, hence to float32's elements where they differ.
        bar = 2 * (reference - sums).abs() + 1e-5 * sums.abs().clamp(min=1)
        assert ((mine - sums).abs() <= bar)[finite].all()


def numbers(shape, dtype=torch.float32, spread=2.0):
    return (torch.randn(shape) * spread).to(dtype)


def parameters(shape):
    return -torch.rand(shape) - 0.1, torch.rand(shape) * 2 + 0.1


def ddtb(x, lower, upper):
    return tersor.fake_quantize_bounds(x, lower, upper, 3)


SHAPES = {  # input, parameter: what has a value each, and how the tiles lie
    "empty": ((0, 3), (1,)),
    "no dimension": ((), ()),
    "one": ((1,), (1,)),
    "one tile, odd": ((1999,), ()),
    "whole tile": ((2048,), (1,)),
    "three tiles": ((5, 1000), (1, 1)),
    "per sample, several tiles": ((3, 5, 30, 41), (3, 1, 1, 1)),
    "per sample, many in a tile": ((20, 130), (20, 1)),
    "per channel, long rows": ((2, 3, 30, 41), (1, 3, 1, 1)),
    "per channel, short rows": ((40, 5, 3, 3), (1, 5, 1, 1)),
    "per feature": ((100, 66), (1, 66)),
    "per row of an image": ((3, 5, 9, 12), (1, 1, 9, 1)),
    "one sample": ((1, 6, 5, 5), (1, 6, 1, 1)),
    "empty, per feature": ((0, 3), (1, 3)),
    "one element each": ((37,), (37,)),
}

LAYOUTS = {
    "contiguous": lambda shape: numbers(shape),
    "channels last": lambda shape: numbers(shape).to(memory_format=torch.channels_last),
    "transposed": lambda shape: numbers((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2),
    "every other": lambda shape: numbers([2 * n + 1 for n in shape])[tuple(slice(1, None, 2) for _ in shape)],
    "expanded": lambda shape: numbers((*shape[:-1], 1)).expand(shape),
    "misaligned": lambda shape: numbers((torch.Size(shape).numel() + 1,))[1:].view(shape),
}
LEAST_DIMENSIONS = {"channels last": 4, "transposed": 2, "expanded": 1}


def layouts(shape):
    """The layouts that a shape can have."""
    return {
        name: make
        for name, make in LAYOUTS.items()
        if len(shape) >= LEAST_DIMENSIONS.get(name, 0) and (name != "channels last" or len(shape) == 4)
    }


@interpreted
@pytest.mark.parametrize("case", SHAPES)
def test_every_tiling_in_every_layout(case, on_triton):
    """The input's layout against another one of the incoming gradient."""
    shape, along = SHAPES[case]
    made = layouts(shape)
    for place, layout in enumerate(made.values()):
        gradient = list(made.values())[(place + 1) % len(made)](shape)
        check(ddtb, [layout(shape)], parameters(along), gradient)


@interpreted
@pytest.mark.parametrize("case", ["three tiles", "per sample, several tiles", "per channel, short rows", "per feature"])
def test_every_tiling_in_float16(case, on_triton):
    shape, along = SHAPES[case]
    check(ddtb, [numbers(shape, torch.float16)], parameters(along), numbers(shape, torch.float16))


@interpreted
@pytest.mark.parametrize("case", ["per sample, several tiles", "per channel, short rows"])
def test_one_value_beside_many(case, on_triton):
    shape, along = SHAPES[case]
    check(ddtb, [numbers(shape)], (torch.tensor(-0.7), parameters(along)[1]), numbers(shape))
    check(ddtb, [numbers(shape)], (parameters(along)[0], torch.tensor([1.3])), numbers(shape))


@interpreted
def test_two_inputs_of_different_layouts(on_triton):
    """Each gradient has its own input's strides."""
    shape = (2, 3, 7, 50)
    for first, second in itertools.permutations(layouts(shape).values(), 2):
        inputs = [first(shape), second(shape)]
        bounds = (*parameters((2, 1, 1, 1)), *parameters(()))
        check(lambda *args: tersor.fake_quantize_add(*args, 3), inputs, bounds, numbers(shape))


VARIANTS = {
    **{
        f"bounds {bits} {tie}{' relu' * relu}": (
            lambda *args, bits=bits, tie=tie, relu=relu: tersor.fake_quantize_bounds(
                *args, bits, tie=tie, relu=relu, grad_scale=0.7
            ),
            (-0.75, 1.25),
        )
        for bits, tie, relu in ((2, "half", False), (5, "bound", False), (8, "half", True))
    },
    "bounds overflow": (lambda *args: tersor.fake_quantize_bounds(*args, 2), (-1.5, 1.5)),
    **{
        f"bounds unit{' signed' * signed}{' relu' * relu}": (
            lambda *args, signed=signed, relu=relu: tersor.fake_quantize_bounds(
                *args, 3, "unit", signed=signed, relu=relu
            ),
            (-0.75, 1.25),
        )
        for signed, relu in ((False, False), (True, False), (True, True))
    },
    **{
        f"pact {bits}": (lambda *args, bits=bits: tersor.fake_quantize_pact(*args, bits), (1.3,)) for bits in (2, 7, 32)
    },
    "lsq": (lambda *args: tersor.fake_quantize_lsq(*args, 3), (0.25,)),
    "lsq signed": (lambda *args: tersor.fake_quantize_lsq(*args, 4, True, grad_factor=2.0), (0.3,)),
    "lsq_plus": (lambda *args: tersor.fake_quantize_lsq_plus(*args, 3), (0.3, -0.6)),
    "affine": (lambda *args: tersor.fake_quantize_affine(*args, -3, 11, 0.3), (0.3, 2.5)),
    "affine corrected": (lambda *args: tersor.fake_quantize_affine(*args, -3, 11, corrected=True), (0.3, -7.4)),
    "add": (lambda x, *args: tersor.fake_quantize_add(x, x.flip(0), *args, 4, "bound"), (-0.5, 1.0, -1.0, 0.8)),
}


def special(values):
    """Bounds, levels and half-way points with their neighbours, signed zeros, subnormals, huge and non-finite ones."""
    least = min(values[:2]) if len(values) > 1 else 0.0
    steps = torch.arange(-40, 41) / 2
    grids = [steps * abs(values[0]), steps * 0.1 + least, steps * abs(values[-1] - least) / 3, torch.tensor(values)]
    points = torch.cat(grids)
    near = [points, points.nextafter(torch.tensor(INF)), points.nextafter(torch.tensor(-INF))]
    return torch.cat([*near, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 2.0**22 + 0.5, -(2.0**23), 1e30, -1e30])])


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_on_ties_and_extremes(name, dtype, on_triton):
    function, values = VARIANTS[name]
    values = [torch.tensor([v]) for v in values]
    x = special([v.item() for v in values]).to(dtype)
    grad_output = numbers(x.shape, dtype)
    check(function, [x[x.abs() < 1e3]], values, grad_output[x.abs() < 1e3])
    with tersor.use_backend("reference"):
        expected = function(x, *values)
    assert same(function(x, *values), expected)
    for value in (INF, -INF, NAN):
        x[5] = value
        check(function, [x], values, grad_output)
        grad_output[11] = value
        check(function, [x], values, grad_output)


@triton.jit
def _round_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, shared.round_half_even(tl.load(source + place)))


@interpreted
def test_rounding_is_torchs():
    halves = torch.arange(-64, 64) + 0.5
    large = torch.cat([2.0**e + torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]) for e in (21, 22, 23, 24)])
    extremes = torch.tensor([0.0, -0.0, 0.49999997, -0.49999997, 1e-45, 3e38, -3e38, INF, -INF, NAN])
    x = torch.cat([halves, large, -large, extremes, numbers((1024 - 128 - 48 - 10,), spread=1e4)])
    rounded = torch.empty_like(x)
    _round_kernel[(1,)](x, rounded, SIZE=1024)
    assert same(rounded, x.round())


@interpreted
@pytest.mark.parametrize(
    "partials", [(4, 1, 1, 16388), (2, 1, 1, 4), (1, 1, 5, 7), (2, 3, 5, 4), (3, 700, 3, 9), (4, 2, 1, 1)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_partial_sums(partials, dtype):
    """Each parameter's, over one or two dimensions, in whole words or not, in one step or two."""
    values = torch.randn(partials, dtype=dtype)
    like = [torch.zeros(1, partials[2], 1) for _ in range(partials[0])]
    for which, total in enumerate(shared._sums(values, like, 0.25)):
        exact = values[which].double().sum((0, 2)) * 0.25
        assert total.shape == (1, partials[2], 1)
        assert ((total.flatten() - exact).abs() <= 1e-5 * exact.abs().clamp(min=1)).all()


@interpreted
def test_rerun_is_bitwise_the_same(on_triton):
    x, g = numbers((3, 5, 30, 41)), numbers((3, 5, 30, 41))
    backward = torch.ops.tersor.fake_quantize_bounds_backward
    for along in ((), (3, 1, 1, 1), (1, 5, 1, 1)):
        args = (g, x, *parameters(along), 2, "ddtb", "half", False, False, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(backward(*args), backward(*args), strict=True))


@interpreted
@pytest.mark.parametrize("mode", ["symmetric", "minmax", "percentile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights(mode, dtype, on_triton):
    """Output, bounds and the gradient's mask; 101 elements put the percentiles on elements."""
    for shape, layout in itertools.product(
        [(101,), (2, 3), (64, 5, 3, 3), (30, 7, 3, 4)], ["contiguous", "every other"]
    ):
        weight, grad_output = LAYOUTS[layout](shape).to(dtype), numbers(shape, dtype)
        for levels, percentile in ((2, 99.0), (3, 95.0), (8, 100.0)):
            args = weight, levels, mode, percentile
            output, bounds = torch.ops.tersor.weight_fake_quantize_forward(*args)
            grad = torch.ops.tersor.weight_fake_quantize_backward(grad_output, weight, bounds)
            with tersor.use_backend("reference"):
                expected, expected_bounds = torch.ops.tersor.weight_fake_quantize_forward(*args)
                expected_grad = torch.ops.tersor.weight_fake_quantize_backward(grad_output, weight, bounds)
            assert same(output, expected)
            assert same(bounds, expected_bounds)
            assert same(grad, expected_grad)


@interpreted
@pytest.mark.parametrize("elements", [1, 2, 3, 101, 5000])
def test_percentiles(elements, on_triton):
    x = numbers((elements,))
    for percentile in (50.0, 77.7, 95.0, 99.0, 100.0):
        with tersor.use_backend("reference"):
            expected = tersor.percentile_bounds(x, percentile)
        assert all(map(same, tersor.percentile_bounds(x, percentile), expected))
    x[0] = NAN
    assert torch.cat(tersor.percentile_bounds(x)).isnan().all()


@interpreted
def test_inputs_are_left_alone(on_triton):
    tensors = [numbers((2, 3, 5, 7)) for _ in range(3)] + [*parameters((2, 1, 1, 1)), *parameters(())]
    copies = [t.clone() for t in tensors]
    torch.ops.tersor.fake_quantize_add_backward(*tensors, 3, "half", 1.0)
    assert all(map(torch.equal, tensors, copies))


@interpreted
def test_values_that_no_quantiser_has_are_refused_on_the_cpu(on_triton):
    x = numbers((3,))
    with pytest.raises(ValueError, match="lower must be less than upper"):
        ddtb(x, torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="alpha must be finite and greater than 0"):
        tersor.fake_quantize_pact(x, torch.tensor(-1.0), 2)
    with pytest.raises(ValueError, match="unequal bounds"):
        tersor.weight_fake_quantize(torch.ones(3), 2, "minmax")


@interpreted
def test_mismatched_tensors_are_refused(on_triton):
    """The public functions check before; the operators themselves must not read outside a tensor either."""
    x, a = numbers((4, 5)), torch.ones(())
    forward, backward = torch.ops.tersor.fake_quantize_pact_forward, torch.ops.tersor.fake_quantize_pact_backward
    for wrong in (torch.ones(4), torch.ones(4, 5), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="one element or lie along one dimension"):
            forward(x, wrong, 2)
    with pytest.raises(ValueError, match=r"lie along one dimension, got dimensions \[0, 1\]"):
        torch.ops.tersor.fake_quantize_lsq_plus_forward(x, torch.ones(4, 1), torch.ones(1, 5), 3, 1.0)
    with pytest.raises(TypeError, match="parameters must be float32"):
        forward(x, a.half(), 2)
    with pytest.raises(ValueError, match=r"must have the input's shape \(4, 5\), got \(5, 4\)"):
        backward(x.t(), x, a, 2)
    with pytest.raises(ValueError, match=r"must have the input's shape \(4, 5\), got \(4, 4\)"):
        torch.ops.tersor.fake_quantize_add_forward(x, x[:, :4], a - 2, a, a - 2, a, 2, "half", 1.0)
    with pytest.raises(ValueError, match=r"bounds must be torch.float32 of shape \(2,\)"):
        torch.ops.tersor.weight_fake_quantize_backward(x, x, torch.zeros(1))


@interpreted
def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference(on_triton):
    x, alpha = numbers((7,)).double(), torch.tensor(1.0)
    launcher = importlib.import_module("tersor.triton_kernels.quantization.fake_quantize_pact")
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        launcher.fake_quantize_pact_forward(x, alpha, 2)
    with tersor.use_backend("reference"):
        expected = tersor.fake_quantize_pact(x, alpha, 2)
    assert torch.equal(tersor.fake_quantize_pact(x, alpha, 2), expected)


def test_launchers_have_the_operators_names_and_arguments():
    for name, op in _operator.REGISTRY.items():
        if op.place.startswith("quantization/") and (
            op.place.split("/")[1] == "percentile_bounds" or "fake_quantize" in op.place
        ):
            launcher = getattr(importlib.import_module(f"tersor.triton_kernels.{op.place.replace('/', '.')}"), name)
            arguments = [argument.name for argument in op.overload._schema.arguments]
            assert list(launcher.__code__.co_varnames[: launcher.__code__.co_argcount]) == arguments


def test_tiles_of_tensors_beyond_32_bits():
    """Programs stay far below the grid's limit, and offsets are never a 32-bit product of theirs."""
    large = torch.empty(2**33 + 4, dtype=torch.float16, device="meta")
    plan = shared._plan(large, [torch.empty(1, device="meta")])
    assert plan.programs * shared.ELEMENTS >= large.numel()
    assert plan.programs < 2**31
    assert plan.sizes[1] * plan.tile[3] == large.numel()


@compiled
@pytest.mark.parametrize("place", [*(f"fake_quantize_{place}" for place in PLACES), "weight_fake_quantize"])
def test_the_compiler_contracts_and_approximates_nothing(place):
    """Every float32 operation rounds once and to nearest; none flushes subnormals, and minimum and maximum keep NaN."""
    module = importlib.import_module(f"tersor.triton_kernels.quantization.{place}")
    for case in ahead.cases(module):
        if "fp32" in case.label:
            signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
            kinds = {name: kind.removesuffix(":16") for name, kind in signature.items()}
            source = ASTSource(case.kernel, kinds, case.constants)
            ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options).asm["ptx"]
            arithmetic = set(re.findall(r"\b((?:div|fma|mad|rcp|ex2|min|max|add|sub|mul)\.[\w.]*f32)\b", ptx))
            allowed = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div")} | {"min.NaN.f32", "max.NaN.f32"}
            assert arithmetic <= allowed, (case.label, arithmetic - allowed)
            assert "add.rn.f32" in arithmetic or "backward" in case.name
