"""The Triton kernels of products with packed N:M weights, in Triton's interpreter.

``TRITON_INTERPRET=1 python -m pytest tests/sparsity/test_nm_matmul_triton.py``; float32 and float16 only, since the
interpreter computes bfloat16 wrongly. That the kernels compile is tests/test_ahead_of_time_triton.py's matter.
"""

import os

import pytest
import torch

import tersor
from tersor import _backends
from tersor.sparsity.nm_pack import nm_pack
from tersor.sparsity.nm_unpack import unpack_rows

pytest.importorskip("triton", reason="triton is not installed")

from tersor.triton_kernels.sparsity import nm_matmul, nm_packed_conv2d, nm_unpack

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process with TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of NaN and infinity in the interpreter
]

DTYPES = [torch.float32, torch.float16]
FORMATS = [(1, 2), (1, 3), (1, 4), (1, 7), (1, 16), (2, 3), (2, 4), (3, 4), (2, 8), (4, 8), (5, 12), (15, 16)]
ACTIVATIONS = ["none", "relu", "gelu"]
FEW, MANY = [1, 3, 4], [5, 17, 33]  # rows on either side of the constant; programs of one row, and with rows to spare
INF, NAN = float("inf"), float("nan")
ops = torch.ops.tersor


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several programs, steps and parts on small problems; and says so if another backend would run."""
    monkeypatch.setattr(nm_matmul, "DENSE", 4)
    monkeypatch.setattr(nm_matmul, "BLOCK", 16)
    monkeypatch.setattr(nm_matmul, "STEPS", 1)
    monkeypatch.setattr(nm_matmul, "PROGRAMS", 4)
    monkeypatch.setattr(nm_matmul, "ELEMENTS", 64)
    with tersor.use_backend("triton"):
        assert {_backends.running(name, "cpu") for name in ("nm_matmul", "nm_packed_conv2d")} == {"triton"}


def packed(outputs, inputs, n, m, dtype, kernel=()):
    """Values and index of a random weight with n of every m kept."""
    groups = torch.randn(outputs, *kernel, inputs // m, m)
    mask = torch.rand(groups.shape).argsort(-1) < n
    shape = outputs, *kernel, inputs
    weight, mask = (groups * mask).reshape(shape).to(dtype), mask.reshape(shape)
    if kernel:
        weight, mask = weight.permute(0, 3, 1, 2), mask.permute(0, 3, 1, 2)
    return nm_pack(weight, mask, n, m)


def both(operator, *given):
    """The results on Triton and of the reference."""
    found = []
    for backend in ("triton", "reference"):
        with tersor.use_backend(backend):
            found.append(operator(*given))
    return found


def check(ours, theirs, error=2e-5):
    """The same but for the order of float32 sums, and one rounding of float16."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.numel() == 0 or ours.stride() == theirs.stride()
    bar = 2e-5 if ours.dtype == torch.float32 else 2**-10
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=bar, atol=error, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), FORMATS, ids=str)
def test_product(n, m, dtype):
    """Both kernels: groups and outputs that end within a tile, a byte and a vector; every activation with and without
    bias."""
    bias = torch.randn(19).to(dtype)
    for number, (rows, groups) in enumerate(zip(FEW + MANY, (1, 16, 21, 21, 16, 2), strict=True)):
        weight = packed(19, groups * m, n, m, dtype)
        input = torch.randn(rows, groups * m).to(dtype)
        activation = ACTIVATIONS[number % 3]
        for given in (bias, None):
            check(*both(ops.nm_matmul, input, *weight, given, n, m, activation))


@pytest.mark.parametrize("rows", [2, 6])
def test_shapes_and_strides(rows):
    """Any leading dimensions, none, no rows; inputs and packed tensors with gaps; no outputs; no groups."""
    values, index = packed(5, 24, 2, 4, torch.float32)
    for shape in [(24,), (0, 24), (rows, 1, 24), (1, rows, 1, 24)]:
        check(*both(ops.nm_matmul, torch.randn(shape), values, index, None, 2, 4, "none"))
    apart = [torch.stack([t, t], -1)[..., 0] for t in (torch.randn(24, rows).t(), values, index)]
    check(*both(ops.nm_matmul, *apart, torch.randn(10)[::2], 2, 4, "gelu"))
    check(*both(ops.nm_matmul, torch.randn(rows, 24), values[:0], index[:0], None, 2, 4, "none"))
    check(*both(ops.nm_matmul, torch.randn(rows, 0), values[:, :0], index[:, :0], torch.randn(5), 2, 4, "relu"))


@pytest.mark.parametrize("rows", [1, 9])
def test_values_that_are_not_finite(rows):
    """They come out where they went in, through every activation."""
    values, index = packed(6, 32, 2, 4, torch.float32)
    values[1, 2, 0], values[2, 3, 1], values[3, 0, 0] = NAN, INF, -INF
    input = torch.rand(rows, 32) + 0.5
    for activation in ACTIVATIONS:
        ours, theirs = both(ops.nm_matmul, input, values, index, None, 2, 4, activation)
        if activation != "gelu":  # of infinity torch's is NaN on some processors
            check(ours, theirs)
        assert ours[:, 1].isnan().all()
        assert (ours[:, 2] == INF).all()


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("n", "m"), FORMATS, ids=str)
def test_a_damaged_index_leads_nowhere(n, m, rows):
    """Whatever the bytes are, only elements of the group itself are read: others are NaN, before and behind."""
    values, index = packed(5, 8 * m, n, m, torch.float32)
    everything = torch.full((rows + 2, 8 * m), NAN)
    everything[1:-1] = torch.rand(rows, 8 * m)
    for damaged in (torch.full_like(index, 255), torch.zeros_like(index), torch.randint_like(index, 256)):
        with tersor.use_backend("triton"):
            found = ops.nm_matmul(everything[1:-1], values, damaged, None, n, m, "none")
        most = values.abs().sum((1, 2))  # the input is below 1
        assert (found.abs() <= most + 1e-4).all()


@pytest.mark.parametrize("rows", [3, 9])
def test_the_same_every_run(rows):
    weight = packed(19, 256, 2, 4, torch.float32)
    input = torch.randn(rows, 256)
    with tersor.use_backend("triton"):
        first, second = (ops.nm_matmul(input, *weight, None, 2, 4, "none") for _ in range(2))
        assert torch.equal(first, second)


def test_parts(monkeypatch):
    """One program for all groups, and parts of them, down to one step."""
    weight, bias = packed(9, 512, 2, 4, torch.float32), torch.randn(9)
    input, counts = torch.randn(7, 512), []
    launch = nm_matmul._sum_kernel

    class Counting:
        def __getitem__(self, grid):
            return lambda *given, **constants: (counts.append(given[3]), launch[grid](*given, **constants))

    monkeypatch.setattr(nm_matmul, "_sum_kernel", Counting())
    for programs in (1, 3, 1000):
        monkeypatch.setattr(nm_matmul, "PROGRAMS", programs)
        check(*both(ops.nm_matmul, input, *weight, bias, 2, 4, "gelu"))
    assert counts == [3, 16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolution(channels_last, activation, dtype, monkeypatch):
    """A matrix product where it is one, else the dense weight: the output's format is what was asked for."""
    products, product = [], nm_packed_conv2d.nm_matmul
    monkeypatch.setattr(nm_packed_conv2d, "nm_matmul", lambda *given: (products.append(1), product(*given))[1])
    format = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(2, 16, 5, 6).to(dtype).contiguous(memory_format=format)
    window = [1, 1], [0, 0], [1, 1]
    for outputs, groups, kernel, own in [
        (7, 1, [1, 1], window),
        (6, 2, [1, 1], window),
        (7, 1, [1, 1], ([2, 1], [0, 0], [1, 1])),
        (7, 1, [1, 1], ([1, 1], [1, 0], [1, 1])),
        (8, 2, [3, 2], ([2, 1], [1, 2], [1, 2])),
    ]:
        weight = packed(outputs, 16 // groups, 2, 4, dtype, kernel)
        for bias in (torch.randn(outputs).to(dtype), None):
            given = input, *weight, bias, 2, 4, kernel, *own, groups, activation, channels_last
            ours, theirs = both(ops.nm_packed_conv2d, *given)
            # Torch rounds before the activation, whose slope is 1.13 at most.
            check(ours, theirs, 2e-5 if dtype == torch.float32 else 2**-10 * theirs.abs().max().item())
    assert len(products) == (2 if channels_last else 0)


@pytest.mark.parametrize(("n", "m"), FORMATS, ids=str)
def test_the_dense_weight(n, m):
    """Bit for bit, for values of any dtype: nothing is computed."""
    for dtype in (*DTYPES, torch.bfloat16):
        weight = packed(5, 3 * m, n, m, dtype, (3, 2))
        assert torch.equal(nm_unpack.nm_unpack(*weight, n, m), unpack_rows(*weight, n, m))


def test_convolution_shapes():
    """No samples; an image of one pixel, whose strides say nothing; an input with gaps."""
    weight = packed(7, 8, 1, 4, torch.float32, (1, 1))
    rest = None, 1, 4, [1, 1], [1, 1], [0, 0], [1, 1], 1, "none"
    for input in (torch.randn(0, 8, 3, 3), torch.randn(3, 8, 1, 1), torch.randn(2, 8, 6, 3)[:, :, ::2]):
        for channels_last in (False, True):
            check(*both(ops.nm_packed_conv2d, input, *weight, *rest, channels_last))


def test_refusals():
    """What would read outside a tensor."""
    values, index = packed(5, 24, 2, 4, torch.float32)
    input, bias = torch.randn(3, 24), torch.randn(5)
    image, window = torch.randn(1, 24, 2, 2), ([1, 1], [1, 1], [0, 0], [1, 1], 1, "none", False)
    with tersor.use_backend("triton"):
        for given, error, message in [
            ((input[:, :20], values, index, bias, 2, 4, "none"), ValueError, r"input must be \(\.\.\., 24\)"),
            ((input.half(), values, index, bias, 2, 4, "none"), TypeError, "must both be float16, bfloat16 or float32"),
            ((input, values, index[:, :2], bias, 2, 4, "none"), ValueError, "index must have shape"),
            ((input, values, index.char(), bias, 2, 4, "none"), TypeError, "index must be a uint8 tensor"),
            ((input, values, index, bias[:4], 2, 4, "none"), ValueError, "bias must be torch.float32 of shape"),
            ((input, values, index, bias, 2, 4, "tanh"), ValueError, "activation must be one of"),
        ]:
            with pytest.raises(error, match=message):
                ops.nm_matmul(*given)
        with pytest.raises(ValueError, match=r"values must be those of a weight \(5, 20, 1, 1\)"):
            ops.nm_packed_conv2d(image[:, :20], values, index, bias, 2, 4, *window)
        with pytest.raises(TypeError, match="must both be float16, bfloat16 or float32"):
            ops.nm_packed_conv2d(image.half(), values, index, bias, 2, 4, *window)
