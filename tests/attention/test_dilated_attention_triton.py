"""The Triton kernels of dilated attention on CPU tensors, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/attention/test_dilated_attention_triton.py``. It computes bfloat16 wrongly,
hence float32 and float16 only.
"""

import importlib
import os

import pytest
import torch

import tersor
from tersor import _backends
from tersor.attention.dilated_attention import _reference, _reference_backward

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1, which make test starts", allow_module_level=True)

# batch, height, width, heads, head_dim, kernel_size, dilation
SHAPES = [
    (1, 5, 7, 3, 24, 3, [1, 2, 3]),
    (1, 9, 6, 2, 5, 5, [1, 2]),  # the window is taller than the image at dilation 2
    (2, 3, 5, 2, 32, 1, [1]),
    (1, 4, 3, 2, 5, 2, [2]),  # no centre tap
    (1, 3, 4, 1, 4, 9, [1]),  # more taps than a run takes
    (3, 1, 1, 2, 1, 3, [1, 2]),
    (1, 2, 3, 3, 8, 3, [3]),
    (1, 17, 33, 1, 1, 3, [1]),  # more than one tile per axis, ragged
    (1, 3, 5, 2, 70, 3, [2, 1]),  # head_dim not a multiple of a vector, more than one tile
    (0, 4, 4, 2, 8, 3, [1, 2]),
]
SEED = 0


@pytest.fixture(autouse=True)
def _triton():
    """Every test runs on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        assert _backends.running("dilated_attention_forward", "cpu") == "triton"
        assert _backends.running("dilated_attention_backward", "cpu") == "triton"
        yield


def random(*shape, dtype=torch.float32, seed=SEED):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(forward, backward, qkv, grad_output, kernel_size, dilation, scale):
    """output, logsumexp and the fused gradient of one implementation."""
    output, logsumexp = forward(*qkv, kernel_size, dilation, scale)
    return output, logsumexp, backward(grad_output, *qkv, output, logsumexp, kernel_size, dilation, scale)


def run_triton(*args):
    forward = torch.ops.tersor.dilated_attention_forward.default
    return run(forward, torch.ops.tersor.dilated_attention_backward.default, *args)


def run_reference(qkv, grad_output, *options, dtype=torch.float64):
    return run(_reference, _reference_backward, [t.to(dtype) for t in qkv], grad_output.to(dtype), *options)


def error(ours, exact):
    """The largest difference, relative to max(1, |exact|) elementwise."""
    assert ours.shape == exact.shape
    return ((ours.double() - exact).abs() / exact.abs().clamp(min=1)).max().item() if exact.numel() else 0.0


def check_layout(results, like):
    batch, height, width, heads, head_dim = like.shape
    output, logsumexp, grad_qkv = results
    assert output.shape == like.shape
    assert logsumexp.shape == (batch, heads, height, width)
    assert grad_qkv.shape == (batch, height, width, 3, heads, head_dim)
    assert (output.dtype, logsumexp.dtype, grad_qkv.dtype) == (like.dtype, torch.float32, like.dtype)
    assert all(t.is_contiguous() for t in results)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_agrees_with_float64_reference(shape):
    *size, kernel_size, dilation = shape
    batch, height, width, heads, head_dim = size
    qkv = random(batch, height, width, 3, heads, head_dim).unbind(3)
    args = qkv, random(*size, seed=1), kernel_size, dilation, head_dim**-0.5
    ours = run_triton(*args)
    check_layout(ours, qkv[0])
    for name, result, exact in zip(("output", "logsumexp", "grad_qkv"), ours, run_reference(*args), strict=True):
        assert error(result, exact) <= 1e-5, name


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3]], ids=str)
def test_float16_errs_at_most_twice_as_much_as_torch(shape):
    """The error of the reference on the same float16 inputs (float32 inside, float16 results), times two, is the bar.

    One unit of float16 rounding (2**-11) is added, the least that a rounded result can differ by.
    """
    *size, kernel_size, dilation = shape
    batch, height, width, heads, head_dim = size
    qkv = random(batch, height, width, 3, heads, head_dim, dtype=torch.float16).unbind(3)
    args = qkv, random(*size, dtype=torch.float16, seed=1), kernel_size, dilation, head_dim**-0.5
    ours, exact = run_triton(*args), run_reference(*args)
    torchs = run_reference(*args, dtype=torch.float16)
    check_layout(ours, qkv[0])
    for name, result, rival, truth in zip(("output", "logsumexp", "grad_qkv"), ours, torchs, exact, strict=True):
        assert error(result, truth) <= 2 * error(rival, truth) + 2**-11, name
    assert error(ours[1], exact[1]) <= 1e-5  # float32


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
    """Four layouts at a time; over all cases every tensor has had every layout."""
    size = (2, 3, 4, 1, 8)
    layouts = [*LAYOUTS.values(), *LAYOUTS.values()][first : first + 4]
    *qkv, grad_output = (layout(size) for layout in layouts)
    args = qkv, grad_output, 3, [2], 0.4
    ours = run_triton(*args)
    check_layout(ours, qkv[0])
    for name, result, exact in zip(("output", "logsumexp", "grad_qkv"), ours, run_reference(*args), strict=True):
        assert error(result, exact) <= 1e-5, name


def test_packed_and_summed():
    """The public function on a fused projection, with the expanded gradient of a sum."""
    qkv = random(1, 3, 5, 3, 2, 5).requires_grad_()
    tersor.dilated_attention_qkvpacked(qkv, 3, [1, 2]).sum().backward()
    exact = qkv.detach().double().requires_grad_()
    with tersor.use_backend("reference"):
        tersor.dilated_attention_qkvpacked(exact, 3, [1, 2]).sum().backward()
    assert error(qkv.grad, exact.grad) <= 1e-5


def test_rerun_is_bitwise_the_same():
    args = random(1, 5, 4, 3, 2, 24).unbind(3), random(1, 5, 4, 2, 24, seed=1), 3, [1, 3], 0.2
    for first, second in zip(run_triton(*args), run_triton(*args), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("kernel_size", [3, 2])
def test_non_finite_values_go_where_torch_sends_them(which, value, kernel_size):
    names = ("query", "key", "value", "grad_output")
    tensors = [random(1, 3, 6, 1, 5, seed=i) for i in range(4)]
    tensors[names.index(which)][0, 1, 2, 0, 3] = value
    args = tensors[:3], tensors[3], kernel_size, [2], 0.5
    ours = run_triton(*args)
    assert not all(result.isfinite().all() for result in ours)
    for name, result, exact in zip(("output", "logsumexp", "grad_qkv"), ours, run_reference(*args), strict=True):
        assert torch.equal(result.isnan(), exact.isnan()), name
        assert torch.equal(result[result.isinf()].double(), exact[exact.isinf()]), name
        assert error(result[exact.isfinite()], exact[exact.isfinite()]) <= 1e-5, name


def test_dilation_beyond_the_image_leaves_the_centre():
    """Also one that overflows 32 bits: the same as any other that no tap but the centre survives."""
    qkv, grad_output = random(1, 2, 3, 3, 2, 8).unbind(3), random(1, 2, 3, 2, 8, seed=1)
    huge = run_triton(qkv, grad_output, 3, [1, 2**31 + 1], 0.3)
    for result, exact in zip(huge, run_reference(qkv, grad_output, 3, [1, 50], 0.3), strict=True):
        assert error(result, exact) <= 1e-5


def test_inputs_are_left_alone():
    tensors = [random(1, 3, 3, 2, 5, seed=i) for i in range(4)]
    copies = [t.clone() for t in tensors]
    run_triton(tensors[:3], tensors[3], 3, [1], 0.5)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, copies, strict=True))


def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference():
    query = random(1, 2, 2, 1, 4, dtype=torch.float64)
    launcher = importlib.import_module("tersor.triton_kernels.attention.dilated_attention")
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        launcher.dilated_attention_forward(query, query, query, 3, [1], 0.5)
    expected = _reference(query, query, query, 3, [1], 0.5)[0]
    assert torch.equal(tersor.dilated_attention(query, query, query, 3, [1], 0.5), expected)


def test_mismatched_tensors_are_refused():
    """The public function checks before; the operator itself must not read outside a tensor either."""
    qkv, grad_output = random(1, 3, 3, 3, 2, 4).unbind(3), random(1, 3, 2, 2, 4)
    output, logsumexp = torch.ops.tersor.dilated_attention_forward(*qkv, 3, [1], 0.5)
    backward = torch.ops.tersor.dilated_attention_backward
    with pytest.raises(ValueError, match=r"grad_output must be torch.float32 of shape \(1, 3, 3, 2, 4\)"):
        backward(grad_output, *qkv, output, logsumexp, 3, [1], 0.5)
    with pytest.raises(ValueError, match="logsumexp must be"):
        backward(output, *qkv, output, logsumexp[:, :1], 3, [1], 0.5)
    with pytest.raises(ValueError, match="key must be"):
        torch.ops.tersor.dilated_attention_forward(qkv[0], qkv[1][:, :2], qkv[2], 3, [1], 0.5)
