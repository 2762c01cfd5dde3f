"""What is special to the Triton kernels of the binary operators: counting, powers, blocks, layouts, groups of words.

The kernels run on CPU tensors in Triton's interpreter, which is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m pytest tests/binary/test_binary_triton.py``. It computes bfloat16 wrongly, hence
float32 and float16 only. The compiler's tests run without that variable.
"""

import importlib
import itertools
import os
import re

import pytest
import torch
import torch.nn.functional as F

import tersor
from tersor import _backends, _operator
from tersor.binary import Estimator, epilogue, pack_binary_weight, pack_signs

pytest.importorskip("triton", reason="triton is not installed")

import ahead_of_time_triton as ahead
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tersor.triton_kernels.binary import _power, _words, binary_packed_conv2d, binary_sign, recu_weight
from tersor.triton_kernels.binary.pack_signs import _plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity in the interpreter

OPERATORS = [name for name, op in _operator.REGISTRY.items() if op.place.startswith("binary/")]
DTYPES = [torch.float32, torch.float16]
INF, NAN = float("inf"), float("nan")
ops = torch.ops.tersor

RULES = {
    "ste": Estimator("ste", t=0.7),
    "approx": Estimator("approx"),
    "reste": Estimator("reste", 2.5, 1.5, 0.1),
    "reste of 1": Estimator("reste", 1.0, INF, 0.3),
    "reste of many": Estimator("reste", 1e4, 2.0, 1e-4),
}


@pytest.fixture
def on_triton(monkeypatch):
    """Says so if that backend would not run the operators; small blocks, since the interpreter is slow."""
    for module, name, value in (
        (binary_sign, "ELEMENTS", 256), (binary_sign, "PARTS", 4), (binary_sign, "BLOCK", 4),
        (recu_weight, "ELEMENTS", 128), (recu_weight, "BLOCK", 2), (binary_packed_conv2d, "ELEMENTS", 256),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    with tersor.use_backend("triton"):
        assert len(OPERATORS) == 11
        assert {_backends.running(name, "cpu") for name in OPERATORS} == {"triton"}
        yield


def launcher(name):
    place = _operator.REGISTRY[name].place.replace("/", ".")
    return getattr(importlib.import_module(f"tersor.triton_kernels.{place}"), name)


def both(function, *given):
    """The results on Triton and of the reference, as tuples, which have the same strides."""
    results = []
    for backend in ("triton", "reference"):
        with tersor.use_backend(backend):
            found = function(*given)
        results.append(found if isinstance(found, tuple) else (found,))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        strides = zip(ours.shape, ours.stride(), theirs.stride(), strict=True)
        assert ours.numel() == 0 or all(size == 1 or own == other for size, own, other in strides)
    return results


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def layouts(tensor):
    """The tensor in order, transposed, with gaps, and channels last."""
    yield tensor
    if tensor.dim() > 1:
        yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, tensor], -1)[..., 0]
    if tensor.dim() == 4:
        yield tensor.to(memory_format=torch.channels_last)


@triton.jit
def _numbers_kernel(x, words, powers, logs, counts, exponent, high, low, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    value = tl.load(x + place)
    tl.store(powers + place, _power.power(value, exponent, high, low))
    tl.store(logs + place, _power.log(value))
    tl.store(counts + place, _words.count_bits(tl.load(words + place), False))


@interpreted
@pytest.mark.parametrize("o", [1.0, 1.0001, 1.7, 3.0, 100.0, 1e9])
def test_powers_logarithms_and_counts(o):
    """To 5e-7: the GPU's 2^f adds 2^-22, which together are less than 1e-6."""
    x = torch.cat([torch.linspace(0.05, 3, 600), 2 ** torch.linspace(-126, 126, 400), 1 + torch.randn(1000) * 1e-3])
    near = torch.tensor([1.0, 1 - 2**-24, 1 + 2**-23, 2**0.5, 0.5**0.5, 2.0, 0.5, 4e-39, 1e-38, 3.4e38, 0.1, 1.5])
    x = torch.cat([x, torch.nextafter(near, torch.zeros(())), near, torch.ones(24)])
    words = torch.randint(-(2**63), 2**63 - 1, x.shape)
    words[:67] = torch.tensor([0, -1, 2**63 - 1, *(1 << i for i in range(63)), -(2**63)])
    powers, logs, counts = torch.empty_like(x), torch.empty_like(x), torch.empty(x.shape, dtype=torch.int32)
    exponent = (1 - o) / o
    _numbers_kernel[(1,)](x, words, powers, logs, counts, *_power.split(exponent), SIZE=len(x))
    expected = x.double() ** exponent
    assert ((powers.double() - expected) / expected).abs().max() < 5e-7
    assert (logs.double() - x.double().log()).abs().div(x.double().log().abs().clamp(min=1e-30)).max() < 4e-7
    assert counts.tolist() == [(word & (2**64 - 1)).bit_count() for word in words.tolist()]
    assert o > 1 or powers.eq(1).all()


# Elements in no octet, in one, with a tail, in several programs.
SHAPES = [(0, 3), (), (8,), (3, 11), (2, 3, 5, 7), (1, 3, 1, 1), (2, 5, 41, 9)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_signs(shape, dtype, on_triton):
    """Signs and bits are the reference's, and so are gradients, but for the rounding of a power."""
    x, incoming = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    odd = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.7, -0.7, 1.0, 1.5, 0.1, 0.3, 1e-7]).to(dtype)
    x.view(-1)[: len(odd)] = odd[: x.numel()]
    for given, (name, rule) in itertools.product(layouts(x), RULES.items()):
        ours, theirs = both(ops.binary_sign_forward, given, *rule, False)
        assert all(map(torch.equal, ours, theirs))
        last = given.dim() == 4 and not ours[0].is_contiguous()
        kept = (None, theirs[1]) if rule.name == "ste" else (given, None)
        ours, theirs = both(ops.binary_sign_backward, incoming, *kept, None, last, *rule)
        rtol = {torch.float32: 1e-6, torch.float16: 2**-10}[dtype] if name.startswith("reste") else 0
        torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0, equal_nan=True)


@interpreted
def test_a_kept_input_serves_every_rule(on_triton):
    """A straight-through estimator too, of which the function keeps bits; a gradient of NaN is not hidden by a 0."""
    x, incoming = torch.randn(3, 50), torch.randn(3, 50)
    incoming[0, 7], x[0, 7] = NAN, 5.0
    for rule in RULES.values():
        ours, theirs = both(ops.binary_sign_backward, incoming, x, None, None, False, *rule)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0, equal_nan=True)
        assert ours[0][0, 7].isnan()


# Samples in one block, in two, and in so many that a part of the backward sum has several and a tail.
SCALED = [(1, 2, 1, 1), (3, 2, 4, 5), (2, 3, 7, 8), (2, 3, 17, 23)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SCALED, ids=str)
def test_scaled_signs(shape, dtype, on_triton):
    x, incoming = (torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    for given in layouts(x):
        (signs, inside, statistics), theirs = both(ops.binary_sign_forward, given, *RULES["approx"], True)
        assert torch.equal(signs, theirs[0])
        assert inside.numel() == 0
        flat = x.double().flatten(1)
        torch.testing.assert_close(statistics[:, 0].double(), flat.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(statistics[:, 1].double(), (flat.var(1) + 1e-5).rsqrt(), rtol=1e-6, atol=0)
        last = not signs.is_contiguous()
        for rule in list(RULES.values())[:3]:
            kept = (incoming, given, None, statistics, last, *rule)
            ours, theirs = both(ops.binary_sign_backward, *kept)
            eps = {torch.float32: 2e-6, torch.float16: 2**-10}[dtype]
            torch.testing.assert_close(ours[0], theirs[0], rtol=eps, atol=eps * theirs[0].abs().max().item())
            with tersor.use_backend("triton"):
                assert torch.equal(ops.binary_sign_backward(*kept), ours[0])


@interpreted
def test_samples_without_a_deviation(on_triton):
    """NaN and infinity, and squares beyond float32, in the first block and in the last: no signs, and no other's."""
    x = torch.randn(9, 3, 10, 13) + 1
    for i, value in enumerate((NAN, INF, -INF, 1e30)):
        x[2 * i, 0, 0, 0] = x[2 * i + 1, 2, 9, 12] = value
    ours, theirs = both(ops.binary_sign_forward, x, *RULES["approx"], True)
    equal(ours[0], theirs[0])
    assert ours[0][:8].eq(0).all()
    assert ours[0][8].ne(0).all()
    assert torch.equal(ours[2][:, 1] > 0, theirs[2][:, 1] > 0)
    empty = both(ops.binary_sign_forward, torch.empty(2, 0, 3, 3), *RULES["approx"], True)
    equal(*empty)
    assert ops.binary_sign_forward(torch.empty(0, 2, 3, 3), *RULES["approx"], True)[2].shape == (0, 2)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (5, 3, 3, 3), (7, 301)], ids=str)
def test_recu(shape, dtype, on_triton):
    weight, incoming = (torch.randn(shape) * 0.1 + 0.02).to(dtype), torch.randn(shape).to(dtype)
    for given, tau in zip(layouts(weight), (0.85, 1.0, 0.500001, 0.99), strict=False):
        ours, theirs = both(ops.recu_weight_forward, weight, torch.tensor(tau))
        strided = ops.recu_weight_forward(given, torch.tensor(tau))
        assert all(map(torch.equal, ours, strided))
        assert strided[0].is_contiguous()
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=2e-6, atol=1e-8)
        for kept in (theirs[1:], ours[1:]):
            grads, expected = both(ops.recu_weight_backward, incoming, weight, *kept)
            assert torch.equal(ops.recu_weight_backward(incoming, given, *kept), grads[0])
            eps = {torch.float32: 1e-6, torch.float16: 2**-10}[dtype]
            # What is left of numbers up to these, which at 2 weights a filter cancel each other.
            bar = eps * (2 * 2**0.5 * kept[0][:, 1].max() * incoming.abs().max()).item()
            torch.testing.assert_close(grads[0], expected[0], rtol=eps, atol=bar)


@interpreted
@pytest.mark.parametrize("value", [NAN, INF, 1e25, 0.0])
def test_recu_without_a_bound(value, on_triton):
    """Of a layer that is not finite no signs are left, nor of one whose weights are all equal."""
    weight = torch.full((3, 4, 3, 3), 0.25) if value == 0 else torch.randn(3, 4, 3, 3)
    weight[2, 3, 2, 2] = value or 0.25
    ours, theirs = both(ops.recu_weight_forward, weight, torch.tensor(0.9))
    equal(ours[0], theirs[0])
    equal(ours[2], theirs[2]) if value != 1e25 else None
    assert value == 1e25 or ours[0].eq(0).all()
    assert ops.recu_weight_forward(weight[:0], torch.tensor(0.9))[2].isnan()


def views(x):
    """Layouts that packing reads wide along channels or positions, and others that it cannot."""
    yield from layouts(x)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield F.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2]  # rows with a step
    yield F.pad(x, (0, 8))[..., :-8]
    yield F.pad(x, (0, 0, 0, 0, 3, 0)).to(memory_format=torch.channels_last)[:, 3:]
    yield x[:, :, :1, :1].expand_as(x)
    yield x[:, :1].expand_as(x)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 70, 3, 8), 1), ((3, 12, 1, 5), 3), ((1, 130, 5, 1), 2)], ids=str)
def test_packing(shape, groups, dtype, on_triton):
    x = torch.randn(shape).mul(2).round().to(dtype)
    x.view(-1)[:5] = torch.tensor([NAN, INF, -INF, -0.0, 1e-7]).to(dtype)
    shift = torch.randn(shape[1]).round().to(dtype)
    shift[0], shift[1] = INF, 2**-24
    for given, add in itertools.product(views(x), (None, shift)):
        ours, theirs = both(ops.pack_signs, given, add, groups)
        assert torch.equal(ours[0], theirs[0])
    for last, other in ((False, torch.float16), (True, torch.float64)):
        own, expected = both(ops.unpack_signs, with_gaps(ours[0]), shape[1], other, last)
        assert torch.equal(own[0], expected[0])
    assert ops.pack_signs(x[:0], None, groups).shape == (2, 0, *shape[2:], groups, -(-shape[1] // groups // 64))
    assert ops.unpack_signs(ops.pack_signs(x[:0], None, groups), shape[1], dtype, True).shape == (0, *shape[1:])


def with_gaps(words):
    return torch.stack([words, ~words], -1)[..., 0]


@interpreted
def test_packing_of_many_positions(on_triton):
    """In several programs, of one channel and of depthwise groups, across images."""
    for shape, groups in (((3, 1, 31, 37), 1), ((5, 6, 19, 23), 6)):
        x = torch.randn(shape).round()
        for given in (x, x.to(memory_format=torch.channels_last)):
            ours, theirs = both(ops.pack_signs, given, None, groups)
            assert torch.equal(ours[0], theirs[0])
            own, expected = both(ops.unpack_signs, ours[0], shape[1], torch.float32, False)
            assert torch.equal(own[0], expected[0])


@pytest.mark.parametrize(
    ("shape", "last", "crop", "vectors"),
    [
        ((8, 64, 56, 56), True, 0, (1, 4)), ((8, 64, 56, 56), False, 0, (4, 1)), ((8, 64, 7, 7), False, 0, (1, 1)),
        ((8, 6, 7, 7), True, 0, (1, 2)), ((8, 64, 56, 56), False, 4, (4, 1)), ((8, 64, 56, 56), False, 3, (1, 1)),
        ((8, 64, 1, 1), False, 0, (1, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_loads_are_as_wide_as_the_layout_allows(shape, last, crop, vectors):
    input = torch.empty(shape, device="meta", memory_format=torch.channels_last if last else torch.contiguous_format)
    input = input[..., : shape[3] - crop]
    sizes, strides, constants = _plan(input, shape[1])
    along_p, along_c = constants["VECTOR_P"], constants["VECTOR_C"]
    assert (along_p, along_c) == vectors
    assert (sizes[0] * along_p, sizes[2] * along_c) == (input.shape[2] * input.shape[3], shape[1])
    assert strides[0] * along_p * along_c == input.stride(0)
    assert constants["ROWS"] == (crop > 0)


# Channels, outputs, groups, and the window: odd channels, several words, a window larger than the image, depthwise.
CONVOLUTIONS = {
    "plain": (3, 10, 1, (3, 3), ((1, 1), (1, 1), (1, 1))),
    "words": (130, 12, 2, (1, 2), ((2, 1), (0, 1), (1, 2))),
    "far": (64, 9, 1, (3, 2), ((3, 2), (4, 3), (2, 3))),
    "depthwise": (6, 6, 6, (2, 2), ((1, 1), (0, 1), (1, 1))),
    "points": (70, 70, 1, (1, 1), ((1, 1), (0, 0), (1, 1))),
}


def problem(case, zeros):
    channels, outputs, groups, kernel, window = CONVOLUTIONS[case]
    input, weight = torch.randn(3, channels, 5, 4), torch.randn(outputs, channels // groups, *kernel)
    if zeros:
        input, weight = input.round(), weight.mul(2).round()
    exact = F.conv2d(input.sign(), weight.sign(), None, *window, groups)
    return pack_signs(input, groups=groups).words, pack_binary_weight(weight, groups), window, exact


@interpreted
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("offset", [tl.int32, tl.int64], ids=str)
def test_sums_are_exact(case, zeros, offset, on_triton, monkeypatch):
    choose = binary_packed_conv2d._constants
    chosen = []

    def constants(*given):
        chosen.append(choose(*given))
        return chosen[-1] | {"OFFSET": offset}

    monkeypatch.setattr(binary_packed_conv2d, "_constants", constants)
    signs, weight, window, exact = problem(case, zeros)
    end = (None, False, "none", None, torch.float16 if zeros else torch.float32, offset == tl.int32)
    output = ops.binary_packed_conv2d(with_gaps(signs), *weight, *window, *end)
    assert torch.equal(output.float(), exact)
    assert chosen[0]["OFFSET"] == tl.int32
    assert chosen[0]["PLANES"] == 1 + zeros


@interpreted
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("activation", ["none", "hardtanh", "prelu"])
def test_what_follows_rounds_as_the_reference_does(activation, relu, on_triton):
    """Numbers of any size, infinity and NaN in the rows and the residual, whose strides are any."""
    signs, weight, window, exact = problem("words", False)
    rows = torch.randn(7, 12)
    rows[:, 3], rows[2, 4], rows[0, 5], rows[5, 6], rows[:, 7] = NAN, INF, -INF, 0.0, 1e-30
    end = epilogue(12, relu=relu, activation=activation)._replace(rows=rows)
    residual = torch.randn(exact.shape)
    residual[0, 0, 0, 0], residual[0, 1, 0, 0] = NAN, INF
    for number, given in enumerate([None, *layouts(residual), residual[:1].expand_as(residual)]):
        last = number % 2 == 0
        arguments = (signs, *weight, *window, *end, given, DTYPES[number % 2], last)
        ours, theirs = both(ops.binary_packed_conv2d, *arguments)
        equal(ours[0], theirs[0])


@interpreted
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("outputs", "groups", "following"), [
    (10, 1, 2), (40, 1, 1), (12, 6, 1), (10, 2, 5), (70, 2, 1), (138, 3, 2), (6, 1, 6),
])  # fmt: skip
def test_words_of_signs(outputs, groups, following, zeros, on_triton):
    """Words over several groups of this convolution, half words without channels, and thresholds in both directions."""
    input, weight = torch.randn(2, 6, 3, 4), torch.randn(outputs, 6 // groups, 2, 1)
    if zeros:
        input, weight = input.round(), weight.mul(2).round()
    i = torch.arange(outputs)
    thresholds = torch.stack([1 - 2 * (i % 2), i % 3 - 1, i % 3 - 1 + i % 2 - 1]).int()
    packed, blocks = pack_signs(input, groups=groups).words, pack_binary_weight(weight, groups)
    arguments = (packed, *blocks, [1, 1], [1, 0], [1, 1], thresholds, following)
    ours, theirs = both(ops.binary_packed_conv2d_signs, *arguments)
    assert torch.equal(ours[0], theirs[0])
    assert ours[0][1].ne(0).any()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_convolution(dtype, on_triton):
    """Sums, bits and gradients are the reference's, with zeros, groups, a scale or none, and either memory format."""
    x, weight = torch.randn(2, 6, 5, 4).mul(2).round().to(dtype), torch.randn(4, 3, 3, 2).round().to(dtype)
    window = ([2, 1], [1, 2], [1, 2])
    factors = torch.tensor([0.3, -0.7, 1.1, 0.0]).to(dtype)
    last_format = x.to(memory_format=torch.channels_last), weight.flip(3).flip(3)
    for given, kernel, scale in ((x, weight, None), (*last_format, factors)):
        ours, theirs = both(ops.binary_conv2d_forward, given, kernel, scale, *window, 2)
        assert all(map(torch.equal, ours, theirs))
        last = not ours[0].is_contiguous()
        incoming = torch.randn(ours[0].shape).to(dtype)
        for need in ((True, True, scale is not None), (True, False, False), (False, True, False)):
            kept = (incoming, *theirs[1:], scale, 6, *window, 2, last, *need)
            assert all(map(torch.equal, *both(ops.binary_conv2d_backward, *kept)))
    empty = ops.binary_conv2d_forward(x[:0], weight, None, *window, 2)
    assert [t.shape[i] for i, t in enumerate(empty[:2])] == [0, 0]


@interpreted
def test_mismatched_tensors_are_refused(on_triton):
    """The public functions check before; the operators themselves must not read outside a tensor either."""
    x, words, rule = torch.randn(2, 6, 4, 4), pack_signs(torch.randn(2, 6, 4, 4)).words, RULES["approx"]
    blocks, window = pack_binary_weight(torch.randn(5, 6, 3, 3)), ([1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match=r"binary_sign: input must have shape \(2, 6, 4, 4\)"):
        ops.binary_sign_backward(x, x[1:], None, None, False, *rule)
    with pytest.raises(ValueError, match=r"binary_sign: statistics must be torch\.float32 of shape"):
        ops.binary_sign_backward(x, x, None, torch.zeros(3, 2), False, *rule)
    with pytest.raises(ValueError, match="binary_sign: frozen must have shape"):
        ops.binary_sign_backward(x, None, torch.zeros(3, dtype=torch.uint8), None, False, *rule)
    with pytest.raises(ValueError, match="recu_weight: tau must have one element"):
        ops.recu_weight_forward(x, torch.zeros(2))
    with pytest.raises(ValueError, match="recu_weight: statistics must be"):
        ops.recu_weight_backward(x, x, torch.zeros(3, 2), torch.zeros(()))
    with pytest.raises(ValueError, match="recu_weight: grad_output must have shape"):
        ops.recu_weight_backward(x[1:], x, torch.zeros(2, 2), torch.zeros(()))
    with pytest.raises(ValueError, match="C a multiple of 4"):
        ops.pack_signs(x, None, 4)
    with pytest.raises(ValueError, match="pack_signs: shift must be"):
        ops.pack_signs(x, torch.zeros(5), 1)
    with pytest.raises(ValueError, match="unpack_signs: signs must be of 70 channels"):
        ops.unpack_signs(words, 70, torch.float32, False)
    end = (None, False, "none", None, torch.float32, True)
    for given, kernel, message in (
        (words[:1], blocks, "signs must be int64"), (words, blocks._replace(channels=70), "of 70 channels"),
        (words, blocks._replace(sums=blocks.sums[:, 1:]), "weight_sums must be"),
        (words, blocks._replace(blocks=blocks.blocks[..., :4]), "weight must be int64 blocks of 8"),
        (words[:, :, :, :0], blocks, "as large as the window"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.binary_packed_conv2d(given, *kernel, *window, *end)
    with pytest.raises(ValueError, match="residual must have shape"):
        ops.binary_packed_conv2d(words, *blocks, *window, torch.zeros(7, 5), False, "none", x, torch.float32, True)
    with pytest.raises(ValueError, match="rows must be float32"):
        ops.binary_packed_conv2d(words, *blocks, *window, torch.zeros(7, 4), *end[1:])
    with pytest.raises(ValueError, match="thresholds must be int32"):
        ops.binary_packed_conv2d_signs(words, *blocks, *window, torch.zeros(3, 4).int(), 1)
    with pytest.raises(ValueError, match="binary_conv2d: input and weight must be"):
        ops.binary_conv2d_forward(x, x, None, *window, 2)


@interpreted
def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference(on_triton):
    x, tau = torch.randn(2, 6, 4, 4).double(), torch.tensor(0.9)
    for name, args in (
        ("binary_sign_forward", (x, *RULES["reste"], False)),
        ("recu_weight_forward", (x, tau)),
        ("pack_signs", (x, None, 2)),
    ):
        with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
            launcher(name)(*args)
        ours, theirs = both(getattr(ops, name), *args)
        assert all(map(torch.equal, ours, theirs))
    words, blocks, end = pack_signs(x).words, pack_binary_weight(x), (None, False, "none", None, torch.float64, True)
    assert ops.binary_packed_conv2d(words, *blocks, [1, 1], [1, 1], [1, 1], *end).dtype == torch.float64


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
@pytest.mark.parametrize("place", ["binary_sign", "recu_weight", "binary_packed_conv2d"])
def test_the_compiler_contracts_nothing_and_counts_in_one_instruction(place):
    """Every float32 operation rounds once and to nearest but 2^f; no subnormal is flushed, and nothing is atomic.

    The one fused operation is that of the epilogue's norm.
    """
    names = ("div", "fma", "mad", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "add", "sub", "mul", "min", "max")
    pattern = rf"\b((?:{'|'.join(names)})\.[\w.]*f(?:32|64))\b"
    allowed = {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}
    allowed |= {"fma.rn.f32"} if place == "binary_packed_conv2d" else set()
    for case in ahead.cases(importlib.import_module(f"tersor.triton_kernels.binary.{place}")):
        code = machine_code(case)
        power = case.constants.get("RULE") == "reste"
        found = set(re.findall(pattern, code))
        assert found - {"ex2.approx.f32", "ex2.approx.ftz.f32"} <= allowed | {"max.f32"}, (case.label, found - allowed)
        assert power == any(name.startswith("ex2") for name in found), case.label
        assert not re.search(r"\b(atom|red)\.", code), case.label
        assert ("popc.b64" in code) == (place == "binary_packed_conv2d")
