"""What is special to the Triton kernels of the freezing operators: octets, blocks, and what the compiler emits.

The kernels run on CPU tensors in Triton's interpreter, which is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m pytest tests/freezing/test_freezing_triton.py``. It computes bfloat16 wrongly, hence
float32 and float16 only. The compiler's tests run without that variable.
"""

import importlib
import itertools
import math
import os
import re

import pytest
import torch

import tersor
from tersor import _backends, _operator
from tersor.freezing import FreezeSchedule, lts_quantize, lts_state, pack_mask, unpack_mask

pytest.importorskip("triton", reason="triton is not installed")

import ahead_of_time_triton as ahead
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tersor.triton_kernels.freezing import lts_quantize as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity in the interpreter

OPERATORS = [name for name, op in _operator.REGISTRY.items() if op.place.startswith("freezing/")]
DTYPES = [torch.float32, torch.float16]
INF, NAN = float("inf"), float("nan")
# Elements in no octet, in one, with a tail, in several programs; rows of one element; bytes shared by rows.
SHAPES = [(0, 3), (1,), (8,), (5, 1), (3, 11), (6, 8, 3, 3), (7, 5, 3, 3), (3, 1400)]


@pytest.fixture
def on_triton():
    """Runs the test on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        assert len(OPERATORS) == 7
        assert {_backends.running(name, "cpu") for name in OPERATORS} == {"triton"}
        yield


def launcher(name):
    place = _operator.REGISTRY[name].place.replace("/", ".")
    return getattr(importlib.import_module(f"tersor.triton_kernels.{place}"), name)


def bits(tensor):
    """The tensor's bits, with one NaN for all."""
    if not tensor.is_floating_point():
        return tensor
    whole = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.where(tensor.isnan(), NAN, tensor).contiguous().view(whole)


def same(ours, theirs):
    """Bit for bit, the signs of zeros too."""
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(bits(ours), bits(theirs))


def random_mask(shape, share=0.5):
    """Packed, with octets that are all frozen and all free."""
    mask = torch.rand(shape) < share
    mask.view(-1)[8:24] = True
    mask.view(-1)[32:48] = False
    return pack_mask(mask)


def tail_is_zero(frozen, shape):
    return same(pack_mask(unpack_mask(frozen, shape)), frozen)


def bounds(lower=-0.9, upper=1.1):
    return torch.tensor([lower]), torch.tensor(upper)


def train(weights, gradients, state, levels, schedule):
    """Outputs and gradients of each step; the bounds move, and the state is left as the last step leaves it."""
    results = []
    for step, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        leaves = [t.clone().requires_grad_() for t in (weight, *bounds(-0.9 - 0.01 * step))]
        output = lts_quantize(leaves[0], state, *leaves[1:], levels, schedule)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, gradient)))
        results[-1] += tuple(t.clone() for t in state if t is not None)
    return results


def compare(weights, gradients, levels, schedule, saved=True, frozen_step=True, prepare=lambda state: state):
    """Outputs, weight gradients and states are the reference's bits in every step; returns the share that froze."""
    runs = []
    for backend in ("triton", "reference"):
        state = prepare(lts_state(weights[0], saved=saved, frozen_step=frozen_step))
        with tersor.use_backend(backend):
            runs.append(train(weights, gradients, state, levels, schedule))
        assert tail_is_zero(state.frozen, weights[0].shape)
    shares = []
    for step, (ours, theirs) in enumerate(zip(*runs, strict=True)):
        for place, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
            if place not in (2, 3):
                assert same(mine, reference), (step, place)
                continue
            finite = reference.isfinite()
            # What an addend may err by, summed: a rounding of each, and of a float32 sum by halves.
            bar = 4e-6 * max(1.0, gradients[step].float().nan_to_num(0, 0, 0).abs().sum().item())
            assert ((mine - reference).abs() <= bar)[finite].all(), (step, place)
            assert torch.equal(mine.isnan(), reference.isnan())
        shares.append(unpack_mask(ours[6], weights[0].shape).float().mean().item())
    return shares


def walk(shape, dtype, steps=6):
    """Weights that settle: the later the step, the less they move."""
    weight = torch.randn(shape) * 0.6
    moves = [torch.randn(shape) * 0.3 / (1 + step) ** 2 for step in range(steps)]
    weights = [(weight := weight + move).to(dtype) for move in moves]
    return weights, [torch.randn(shape).to(dtype) for _ in range(steps)]


def schedule(growth="linear", granularity="element", tile=(2, 2), quantile=0.5, warmup=1):
    return FreezeSchedule(1, 9, warmup, growth, 0.3, 0.6, granularity, tile, quantile)


GROWTHS = {"fixing": (True, True), "linear": (False, False), "sine": (True, False)}  # and what optional state there is


@interpreted
@pytest.mark.parametrize(("shape", "dtype"), list(itertools.product(SHAPES, DTYPES)), ids=str)
def test_steps_of_elements(shape, dtype, on_triton):
    """Every growth at five shapes or more."""
    growth = list(GROWTHS)[(SHAPES.index(shape) + DTYPES.index(dtype)) % 3]
    shares = compare(*walk(shape, dtype), 2, schedule(growth), *GROWTHS[growth])
    if math.prod(shape) > 8:
        assert shares[1] == 0 < shares[2] < shares[-1]


BLOCKS = {  # shape, granularity, tile, growth, and whether the optional parts of the state are there
    "one element": ((1,), "tile", (2, 2), "fixing", True, True),
    "rows of one element": ((5, 1), "tile", (2, 2), "fixing", False, False),
    "odd tiles": ((5, 11), "tile", (2, 3), "linear", True, False),
    "whole octets": ((6, 16), "tile", (4, 8), "sine", True, True),
    "kernels": ((3, 5, 3, 3), "tile", (2, 4), "sine", False, True),
    "tiles larger than the matrix": ((3, 11), "tile", (100, 100), "linear", False, False),
    "odd channels": ((7, 5, 3, 3), "channel", (1, 1), "linear", False, True),
    "whole channels": ((5, 9, 8), "channel", (1, 1), "fixing", True, False),
    "odd layer": ((3, 11), "layer", (1, 1), "fixing", True, True),
    "whole layer": ((6, 16), "layer", (1, 1), "linear", False, False),
}


@interpreted
@pytest.mark.parametrize("case", BLOCKS)
def test_steps_of_blocks(case, on_triton):
    """Blocks of whole octets and of parts of them, of one row, with smaller ones at the borders, and beyond them."""
    shape, granularity, tile, growth, *optional = BLOCKS[case]
    dtype = DTYPES[list(BLOCKS).index(case) % 2]
    shares = compare(*walk(shape, dtype), 2, schedule(growth, granularity, tile, 0.3), *optional)
    assert shares[1] == 0
    assert shares[-1] > 0 or shape == (1,)


@interpreted
def test_blocks_in_several_parts(on_triton, monkeypatch):
    """A program for every tile of a block, and fewer programs than tiles."""
    weights, gradients = walk((70, 150), torch.float32, 4)
    for programs in (8, 528):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        shares = compare(weights, gradients, 2, schedule("linear", "layer", quantile=0.3))
        assert shares[1] < shares[-1]
    assert kernels._count_tile(150, 70, 150) == {"VECTOR": 2, "ROWS": 32, "COLUMNS": 64}


@interpreted
def test_a_share_is_compared_in_double_precision(on_triton):
    """0.3 is 0.30000001192 in float32: three elements of ten would not be enough."""
    weight = torch.full((4, 10), 0.12)  # which is far from a level, as 0.45 is not
    weight[:, 4:7], weight[3, 5] = 0.45, 0.12
    shares = compare([weight] * 5, [weight] * 5, 2, schedule("fixing", "channel", quantile=0.3))
    assert shares[-1] == 0.75


@interpreted
@pytest.mark.parametrize("granularity", ["element", "tile"])
def test_without_a_schedule_only_the_saved_weights_change(granularity, on_triton):
    weights, gradients = walk((3, 11), torch.float32)
    for saved in (True, False):
        state = lts_state(weights[0], saved=saved)
        before = [t.clone() for t in state if t is not None]
        compare(weights[:1], gradients[:1], 3, None, saved)
        lts_quantize(weights[0], state, *bounds(), 3, None)
        after = [t for t in state if t is not None]
        assert list(map(torch.equal, before, after)) == [True] * 4 + [False] * saved
        frozen = random_mask((3, 11))

        def prepare(state, frozen=frozen):
            state.frozen.copy_(frozen)
            return state

        compare(weights[:2], gradients[:2], 3, None, saved, prepare=prepare)
        compare(weights, gradients, 3, schedule("linear", granularity), saved, prepare=prepare)


@interpreted
@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_weights_that_are_not_finite(granularity, on_triton):
    weights, gradients = walk((6, 9), torch.float32)
    for weight, value in itertools.product(weights[1:], (NAN, INF, -INF)):
        weight[torch.randint(6, ()), torch.randint(9, ())] = value
    compare(weights, gradients, 2, schedule("linear", granularity))
    gradients[2][1, 1] = INF
    gradients[3][2, 2] = NAN
    compare(weights, gradients, 2, schedule("sine", granularity))


@interpreted
def test_many_steps_and_steps_beyond_the_end(on_triton):
    """The thresholds up to 1, the sine's down again, to its second quarter and its third."""
    weights, gradients = walk((4, 30), torch.float32, 14)
    for levels, growth in ((3, "sine"), (8, "linear")):
        compare(weights, gradients, levels, FreezeSchedule(1, 5, 0, growth, momentum=0.9))


@interpreted
@pytest.mark.parametrize("size", [1, 11, 2049])
def test_bits_beyond_the_last_element_stay_zero(size, on_triton):
    """Where a weight of 0 would be within the threshold, as with a lower bound of 0."""
    state = lts_state(torch.zeros(size))
    for _ in range(4):
        lts_quantize(torch.full((size,), 0.34), state, *bounds(0.0, 1.0), 2, schedule("fixing"))
    assert unpack_mask(state.frozen, (size,)).all()
    assert tail_is_zero(state.frozen, (size,))
    assert state.counters.tolist() == [3, size]


@triton.jit
def _sine_kernel(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, kernels._sine(tl.load(source + place)))


@interpreted
def test_sine():
    x = torch.cat([torch.linspace(0, math.pi / 2, 512), torch.linspace(0, 100, 512)]).double()
    x[:4] = torch.tensor([0.0, math.pi / 2, math.pi, 1e-12], dtype=torch.float64)
    result = torch.empty_like(x)
    _sine_kernel[(1,)](x, result, SIZE=1024)
    assert (result - x.sin()).abs().max() < 1e-14
    assert result[1] == 1


def strided(tensor):
    """The same values in every other element of memory."""
    if tensor is None:
        return None
    wide = tensor.new_empty((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


@interpreted
@pytest.mark.parametrize("granularity", ["element", "tile"])
def test_tensors_with_gaps(granularity, on_triton):
    def with_gaps(state):
        return type(state)(*map(strided, state))

    weights, gradients = walk((6, 13), torch.float32)
    moved = list(map(strided, weights)), list(map(strided, gradients))
    compare(*moved, 2, schedule("linear", granularity), prepare=with_gaps)
    compare([w.t() for w in weights], [g.t() for g in gradients], 2, schedule("linear", granularity))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zero_frozen(shape, dtype, on_triton):
    x, frozen = torch.randn(shape).to(dtype), random_mask(shape)
    x.view(-1)[::3] = torch.tensor([NAN, INF, -0.0]).to(dtype).repeat(x.numel())[: len(x.view(-1)[::3])]
    copies = x.clone(), frozen.clone()
    for each in (x, strided(x)):
        output = torch.ops.tersor.zero_frozen(each, strided(frozen))
        assert output.is_contiguous()
        assert same(output, torch.where(unpack_mask(frozen, shape), torch.zeros_like(x), x))
    assert same(x, copies[0])
    assert same(frozen, copies[1])


STEPS = {
    "plain": (None, {"momentum": 0.0}),
    "plain, decay": (None, {"weight_decay": 0.1, "maximize": True}),
    "first": ("first", {"dampening": 0.3}),
    "first, nesterov": ("first", {"nesterov": True, "weight_decay": 0.01}),
    "momentum": ("buffer", {"dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": ("buffer", {"nesterov": True, "maximize": True}),
}


def tensors(count, shape, dtype, frozen):
    """The second, the gradient, is NaN where frozen, which nobody may take into account."""
    drawn = [torch.randn(shape).to(dtype) for _ in range(count)]
    drawn[1][unpack_mask(frozen, shape)] = NAN
    return drawn


def on_both(step, *given):
    """The step's tensors after it on both backends, in pairs; tensors with gaps end as contiguous ones do."""
    results = []
    for backend, layout in (("triton", torch.clone), ("reference", torch.clone), ("triton", strided)):
        own = [None if t is None else layout(t) for t in given]
        with tersor.use_backend(backend):
            assert step(*own) is None
        results.append([t for t in own if t is not None])
    ours, theirs, with_gaps = results
    assert all(map(same, ours, with_gaps))
    return list(zip(ours, theirs, strict=True))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sgd(shape, dtype, on_triton):
    """Bit for bit the reference's."""
    plain = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False}
    for number, (buffer, changed) in enumerate(STEPS.values()):
        frozen = random_mask(shape, (0.5, 0.0, 0.5, 1.0)[number % 4])
        parameter, gradient, momentum = tensors(3, shape, dtype, frozen)

        def step(*own, options=plain | changed, first=buffer == "first"):
            torch.ops.tersor.frozen_sgd_step(*own, **options, first=first)

        pairs = on_both(step, parameter, gradient, momentum if buffer else None, frozen)
        assert all(same(*pair) for pair in pairs)
        still = unpack_mask(frozen, shape)
        assert torch.equal(pairs[0][0][still], parameter[still])
        if buffer == "first":
            assert not pairs[2][0][still].any()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw(shape, dtype, on_triton):
    """The moments bit for bit; torch's square root on some CPUs is not rounded to nearest: one more ulp of the step."""
    for share, maximize, number in ((0.0, False, 1), (0.5, True, 10), (1.0, False, 3)):
        frozen = random_mask(shape, share)
        given = tensors(4, shape, dtype, frozen)
        given[3].abs_()

        def step(*own, maximize=maximize, number=number):
            torch.ops.tersor.frozen_adamw_step(*own, 1e-2, 0.9, 0.999, 0.01, 0.1, maximize, number)

        pairs = on_both(step, *given, frozen)
        assert all(same(*pair) for pair in pairs[1:])
        still = unpack_mask(frozen, shape)
        assert torch.equal(pairs[0][0][still], given[0][still])
        ours, theirs = (t[~still] for t in pairs[0])
        taken = (theirs - given[0][~still]).abs()
        # An ulp of the square root grows to at most 2.5 in the quotients and products that follow.
        assert ((ours - theirs).abs() <= torch.finfo(dtype).eps * (theirs.abs() + 2.5 * taken)).all()


@interpreted
def test_rerun_is_bitwise_the_same(on_triton):
    weight, backward = torch.randn(30, 50), torch.ops.tersor.lts_quantize_backward
    args = weight.flip(1), weight, weight.flip(0), *bounds(), random_mask((30, 50))
    assert all(map(same, backward(*args), backward(*args)))


@interpreted
def test_mismatched_tensors_are_refused(on_triton):
    """The public functions check before; the operators themselves must not read outside a tensor either."""
    x, frozen, ops = torch.randn(4, 5), torch.zeros(3, dtype=torch.uint8), torch.ops.tersor
    with pytest.raises(ValueError, match=r"zero_frozen: frozen must have shape \(3,\)"):
        ops.zero_frozen(x, frozen[1:])
    with pytest.raises(ValueError, match=r"frozen_sgd_step: gradient must have shape \(4, 5\), got \(5, 4\)"):
        ops.frozen_sgd_step(x, x.t(), None, frozen, 0.1, 0.0, 0.0, 0.0, False, False, False)
    with pytest.raises(ValueError, match="frozen_adamw_step: exp_avg_sq must have shape"):
        ops.frozen_adamw_step(x, x, x, x[1:], frozen, 0.1, 0.9, 0.9, 1e-8, 0.0, False, 1)
    with pytest.raises(ValueError, match=r"lts_quantize: lower must be one float32, got torch.float32 of shape \(2,\)"):
        ops.lts_quantize_backward(x, x, None, torch.zeros(2), torch.ones(1), frozen)
    state = lts_state(x)._replace(code=frozen)
    with pytest.raises(ValueError, match="lts_quantize: code must have shape"):
        ops.lts_quantize_forward(x, *bounds(), *state, 2, True, "fixing", 0.1, 0.9, 0, 1, 1, 1, 1.0)
    with pytest.raises(ValueError, match="lower must be less than upper"):
        lts_quantize(x, lts_state(x), *bounds(1.0, 1.0), 2)


@interpreted
def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference(on_triton):
    x, tiles = torch.randn(4, 5).double(), torch.zeros((1, 2), dtype=torch.int32)
    for name, args in (
        ("zero_frozen", (x, random_mask((4, 5)))),
        ("frozen_linear_backward", (x, x, None, tiles, 2, 2)),
    ):
        with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
            launcher(name)(*args)
        ours = getattr(torch.ops.tersor, name)(*args)
        with tersor.use_backend("reference"):
            assert torch.equal(ours, getattr(torch.ops.tersor, name)(*args))


def test_launchers_have_the_operators_names_and_arguments():
    for name in OPERATORS:
        arguments = [argument.name for argument in _operator.REGISTRY[name].overload._schema.arguments]
        code = launcher(name).__code__
        assert list(code.co_varnames[: code.co_argcount]) == arguments


def machine_code(case):
    """PTX of the case for sm_90."""
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.endswith(":16")]
    kinds = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.kernel, kinds, case.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options).asm["ptx"]


@compiled
@pytest.mark.parametrize("place", ["lts_quantize", "frozen_sgd_step", "frozen_adamw_step"])
def test_the_compiler_contracts_and_approximates_nothing(place):
    """Every float32 operation rounds once and to nearest, and none flushes subnormals; float64 constants are whole."""
    module = importlib.import_module(f"tersor.triton_kernels.freezing.{place}")
    for case in ahead.cases(module):
        if "fp32" not in case.label:
            continue
        code = machine_code(case)
        arithmetic = set(re.findall(r"\b((?:div|fma|mad|rcp|sqrt|ex2|min|max|add|sub|mul)\.[\w.]*f(?:32|64))\b", code))
        names = ("add", "sub", "mul", "div", "sqrt")
        allowed = {f"{name}.rn.{kind}" for name in names for kind in ("f32", "f64")}
        assert arithmetic <= allowed, (case.label, arithmetic - allowed)
        assert arithmetic & {"add.rn.f32", "sub.rn.f32"}
        if "element" in case.label or "count" in case.name:
            assert "0d3FF921FB54442D18" in code  # pi / 2, in the threshold
