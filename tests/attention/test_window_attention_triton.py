"""The Triton kernels of window attention on CPU tensors, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/attention/test_window_attention_triton.py``. It computes bfloat16 wrongly,
hence float32 and float16 only.
"""

import importlib
import os

import pytest
import torch

import tersor
from tersor import _backends
from tersor.attention.window_attention import _reference, _reference_backward

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1, which make test starts", allow_module_level=True)

# (batch, height, width, heads, head_dim), window, shift, mask, packs
CASES = [
    ((1, 7, 14, 2, 24), (7, 7), (3, 3), None, [3]),
    ((1, 7, 7, 1, 32), (7, 7), (-3, -3), "tokens of each", [2, 1]),
    ((1, 8, 8, 2, 16), (8, 8), (0, -4), "pairs", [1, 1, 1]),  # nothing of a block is unused
    ((2, 4, 8, 1, 8), (4, 4), (2, -1), "tokens", [1, 2]),
    ((2, 4, 6, 2, 5), (2, 3), (-1, 2), "pairs of each", [3]),
    ((2, 2, 3, 2, 1), (1, 1), (0, 0), None, [3]),
    ((1, 3, 5, 1, 33), (3, 5), (0, 0), None, [2, 1]),
    ((0, 4, 4, 2, 8), (2, 2), (1, 1), None, [3]),
    # Windows that do not fit a block: 81 and 20 places, blocks of 64 and, for the wide vectors, 16.
    ((1, 9, 9, 1, 8), (9, 9), (4, -3), "tokens", [1, 2]),
    ((1, 4, 10, 1, 65), (4, 5), (-2, 3), "pairs", [3]),
]
SHIFT, MASK_VALUE, SCALE = (1, -1), -3.0, 0.4
NAMES = ("output", "logsumexp", "grad_qkv", "grad_position_bias")
SEED = 0


@pytest.fixture(autouse=True)
def _triton():
    """Every test runs on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        assert _backends.running("window_attention_forward", "cpu") == "triton"
        assert _backends.running("window_attention_backward", "cpu") == "triton"
        yield


def random(*shape, dtype=torch.float32, seed=SEED):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_table(heads, window, **options):
    return random((2 * window[0] - 1) * (2 * window[1] - 1), heads, seed=7, **options)


def make_mask(kind, size, window):
    if kind is None:
        return None
    batch, height, width = size[:3]
    tokens = window[0] * window[1]
    shape = (height, width) if kind.startswith("tokens") else (height * width // tokens, tokens, tokens)
    return random(batch if kind.endswith("of each") else 1, *shape, seed=8) < -0.3


def make(size, window, mask=None, dtype=torch.float32):
    """grad_output, query, key, value, table and mask."""
    qkv = random(*size[:3], 3, *size[3:], dtype=dtype).unbind(3)
    return random(*size, dtype=dtype, seed=1), *qkv, make_table(size[3], window), make_mask(mask, size, window)


def run(forward, backward, grad_output, *inputs, packs):
    """output, logsumexp, the flat gradient and the table's of one implementation."""
    output, logsumexp = forward(*inputs)
    return output, logsumexp, *backward(grad_output, *inputs[:5], logsumexp, *inputs[5:], packs)


def run_triton(*inputs, packs=(3,)):
    operators = torch.ops.tersor.window_attention_forward, torch.ops.tersor.window_attention_backward
    return run(*(op.default for op in operators), *inputs, packs=list(packs))


def run_reference(*inputs, packs=(3,), dtype=torch.float64):
    wide = [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    return run(_reference, _reference_backward, *wide, packs=list(packs))


def error(ours, exact):
    """The largest difference, relative to max(1, |exact|) elementwise."""
    assert ours.shape == exact.shape
    return ((ours.double() - exact).abs() / exact.abs().clamp(min=1)).max().item() if exact.numel() else 0.0


def check(*inputs, packs=(3,), tolerance=1e-5):
    """Against the reference in float64; returns what the kernels gave."""
    ours = run_triton(*inputs, packs=packs)
    for name, result, exact in zip(NAMES, ours, run_reference(*inputs, packs=packs), strict=True):
        assert error(result, exact) <= tolerance, name
    table = inputs[4]
    dtypes = inputs[1].dtype, torch.float32, inputs[1].dtype, inputs[1].dtype if table is None else table.dtype
    assert tuple(result.dtype for result in ours) == dtypes
    assert all(result.is_contiguous() for result in ours)
    return ours


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_agrees_with_float64_reference(case):
    size, window, shift, mask, packs = case
    check(*make(size, window, mask), window, shift, MASK_VALUE, size[4] ** -0.5, packs=packs)


@pytest.mark.parametrize("window", [(2, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
def test_no_bias_and_bias_of_another_dtype(dtype, window, monkeypatch):
    """In whole windows and in blocks of 16 places."""
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.attention.window_attention"), "BLOCK", 16)
    size = (1, *window, 1, 4)
    grad_output, *qkv, table, mask = make(size, window, "tokens")
    table = None if dtype is None else table.to(dtype)
    results = check(grad_output, *qkv, table, mask, window, SHIFT, MASK_VALUE, SCALE, tolerance=1e-3 if dtype else 1e-5)
    if dtype is None:
        assert results[3].shape == (0,)


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[8]], ids=str)
def test_float16_errs_at_most_twice_as_much_as_torch(case):
    """The error of the reference on the same float16 inputs (float32 inside, float16 results), times two, is the bar.

    One unit of float16 rounding (2**-11) is added, the least that a rounded result can differ by. The table is
    float32, but its gradient is a sum of float16 products' results.
    """
    size, window, shift, mask, packs = case
    inputs = (*make(size, window, mask, torch.float16), window, shift, MASK_VALUE, SCALE)
    ours, exact = run_triton(*inputs, packs=packs), run_reference(*inputs, packs=packs)
    torchs = run_reference(*inputs, packs=packs, dtype=torch.float16)
    for name, result, rival, truth in zip(NAMES, ours, torchs, exact, strict=True):
        assert error(result, truth) <= 2 * error(rival, truth) + 2**-11, name
    assert error(ours[1], exact[1]) <= 1e-5  # float32, from exact products
    assert error(ours[3], exact[3]) <= 1e-5


def channels_first(size):
    """A view with the strides of a ``(B, heads * head_dim, H, W)`` tensor."""
    batch, height, width, heads, head_dim = size
    return random(batch, heads, head_dim, height, width).permute(0, 3, 4, 1, 2)


LAYOUTS = {
    "channels first": channels_first,
    "every other": lambda size: random(*(2 * n for n in size))[::2, ::2, ::2, ::2, ::2],
    "padded rows": lambda size: random(*size[:4], size[4] + 3)[..., 1:-2],  # misaligned for 16-byte loads
    "transposed": lambda size: random(size[0], size[2], size[1], *size[3:]).transpose(1, 2),
    "expanded over batch": lambda size: random(1, *size[1:]).expand(size),
    "expanded over positions": lambda size: random(size[0], 1, 1, *size[3:]).expand(size),
    "expanded scalar": lambda size: random(1, 1, 1, 1, 1).expand(size),
}


@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_any_strides(first):
    """Four layouts at a time, and a table and masks with strides of their own."""
    size, window = (2, 2, 3, 1, 8), (2, 3)
    layouts = [*LAYOUTS.values(), *LAYOUTS.values()][first : first + 4]
    tensors = [layout(size) for layout in layouts]
    table = make_table(2, window).t().contiguous().t()[:, 1:]
    mask = make_mask(["tokens", "pairs of each"][first % 2], size, window)
    mask = mask.expand(2, *mask.shape[1:]).transpose(1, 2).contiguous().transpose(1, 2)
    check(*tensors, table, mask, window, SHIFT, MASK_VALUE, SCALE)


def test_offsets_of_64_bits(monkeypatch):
    """What an image of more than 2**31 elements takes, on a small one."""
    module = importlib.import_module("tersor.triton_kernels.attention.window_attention")
    plan = module._plan

    def wide(*args):
        windows, numbers, constants, *rest = plan(*args)
        return windows, numbers, constants | {"WIDE": True}, *rest

    monkeypatch.setattr(module, "_plan", wide)
    for size, window in (((1, 4, 4, 2, 8), (2, 4)), ((1, 9, 9, 1, 8), (9, 9))):
        check(*make(size, window, "tokens"), window, SHIFT, MASK_VALUE, SCALE)


def test_one_program_takes_several_windows(monkeypatch):
    """The last one takes fewer; in whole windows, and in blocks."""
    module = importlib.import_module("tersor.triton_kernels.attention.window_attention")
    monkeypatch.setattr(module, "PROGRAMS", 3)
    monkeypatch.setattr(module, "BLOCK", 16)
    for size, window in (((3, 2, 6, 2, 4), (2, 3)), ((1, 5, 12, 1, 4), (5, 4))):
        check(*make(size, window, "pairs"), window, SHIFT, MASK_VALUE, SCALE)


def test_vectors_too_wide_for_the_kernels_run_on_the_reference():
    size, window = (1, 2, 2, 1, 300), (2, 2)
    check(*make(size, window), window, SHIFT, MASK_VALUE, SCALE)


def test_packed_and_summed():
    """The public function on fused projections, with the expanded gradient of a sum."""
    qkv, table = random(1, 4, 6, 3, 2, 5).requires_grad_(), make_table(2, (2, 3)).requires_grad_()
    tersor.window_attention_qkvpacked(qkv, (2, 3), (1, -2), table).sum().backward()
    exact, exact_table = (t.detach().double().requires_grad_() for t in (qkv, table))
    with tersor.use_backend("reference"):
        tersor.window_attention_qkvpacked(exact, (2, 3), (1, -2), exact_table).sum().backward()
    assert error(qkv.grad, exact.grad) <= 1e-5
    assert error(table.grad, exact_table.grad) <= 1e-5


@pytest.mark.parametrize("window", [(2, 3), (5, 4)], ids=str)
def test_rerun_is_bitwise_the_same(window, monkeypatch):
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.attention.window_attention"), "BLOCK", 16)
    inputs = (*make((2, window[0], window[1], 1, 8), window, "tokens"), window, SHIFT, MASK_VALUE, SCALE)
    for first, second in zip(run_triton(*inputs), run_triton(*inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["grad_output", "query", "key", "value", "position_bias"])
@pytest.mark.parametrize("window", [(2, 3), (4, 5)], ids=str)
def test_non_finite_values_go_where_torch_sends_them(which, value, window, monkeypatch):
    """One value in one of two windows; in whole windows, and in blocks of 16 places."""
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.attention.window_attention"), "BLOCK", 16)
    size = (1, window[0], 2 * window[1], 1, 3)
    inputs = [t.clone() for t in make(size, window)[:5]]
    index = ("grad_output", "query", "key", "value", "position_bias").index(which)
    inputs[index][(0, 1, 2, 0, 1) if index < 4 else (3, 0)] = value
    arguments = (*inputs, None, window, (0, 0), MASK_VALUE, SCALE)
    ours = run_triton(*arguments)
    if (which, value) != ("position_bias", float("-inf")):  # which is a weight of 0
        assert not all(result.isfinite().all() for result in ours)
    for name, result, exact in zip(NAMES, ours, run_reference(*arguments), strict=True):
        assert torch.equal(result.isnan(), exact.isnan()), name
        assert torch.equal(result[result.isinf()].double(), exact[exact.isinf()]), name
        assert error(result[exact.isfinite()], exact[exact.isfinite()]) <= 1e-5, name


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("window", [(1, 3), (4, 5)], ids=str)
def test_infinite_values_of_one_sign(window, monkeypatch):
    """Queries that are not there must not make NaN of an infinite key's or value's one-signed products."""
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.attention.window_attention"), "BLOCK", 16)
    size = (1, *window, 1, 2)
    for index, sign in ((2, -1), (3, 1), (0, 1)):
        inputs = [t.abs() + 0.1 for t in make(size, window)[:4]]
        inputs[index][0, 0, 1, 0, 1] = sign * float("inf")
        arguments = (*inputs, make_table(1, window), None, window, (0, 0), MASK_VALUE, SCALE)
        for name, result, exact in zip(NAMES, run_triton(*arguments), run_reference(*arguments), strict=True):
            assert torch.equal(result.isnan(), exact.isnan()), (name, index)
            assert torch.equal(result[result.isinf()].double(), exact[exact.isinf()]), (name, index)


def test_inputs_are_left_alone():
    inputs = make((1, 2, 3, 2, 5), (2, 3), "tokens")
    copies = [t.clone() for t in inputs]
    run_triton(*inputs, (2, 3), SHIFT, MASK_VALUE, SCALE)
    assert all(torch.equal(t, copy) for t, copy in zip(inputs, copies, strict=True))


def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference():
    query = random(1, 2, 2, 1, 4, dtype=torch.float64)
    launcher = importlib.import_module("tersor.triton_kernels.attention.window_attention")
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        launcher.window_attention_forward(query, query, query, None, None, [2, 2], [1, 1], -100.0, 0.5)
    expected = _reference(query, query, query, None, None, [2, 2], [1, 1], -100.0, 0.5)[0]
    assert torch.equal(tersor.window_attention(query, query, query, 2, 1, scale=0.5), expected)


def test_mismatched_tensors_are_refused():
    """The public function checks before; the operator itself must not read outside a tensor either."""
    window, options = [2, 3], ([2, 3], [1, 1], -100.0, 0.5)
    grad_output, query, key, value, table, _ = make((1, 4, 6, 2, 5), window)
    forward, backward = torch.ops.tersor.window_attention_forward, torch.ops.tersor.window_attention_backward
    output, logsumexp = forward(query, key, value, table, None, *options)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    for arguments, message in (
        ((query, key[:, :2], value, table, None, *options), r"key must be torch.float32 of shape \(1, 4, 6, 2, 5\)"),
        ((query, key, value.half(), table, None, *options), "value must be torch.float32"),
        ((query, key, value, table[:3], None, *options), "position_bias must be"),
        ((query, key, value, table, mask[:, :2], *options), "mask must be"),
        ((query, key, value, table, None, [3, 3], [1, 1], -100.0, 0.5), "must be a multiple of the window's size"),
        ((query, key, value, table, None, [2, 3], [2, 1], -100.0, 0.5), "shift must be"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
    for arguments, message in (
        ((grad_output[:, :2], query, key, value, table, None, logsumexp, *options, [3]), "grad_output must be"),
        ((output, query, key, value, table, None, logsumexp[:, :1], *options, [3]), "logsumexp must be"),
        ((output, query, key, value, table, None, logsumexp, *options, [2, 2]), "packs must be"),
        ((output, query, key, value, table, None, logsumexp, *options, [3, 1, -1]), "packs must be"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(*arguments)
