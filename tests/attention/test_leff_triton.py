"""The Triton kernels of LeFF on CPU tensors, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/attention/test_leff_triton.py``. It computes bfloat16 wrongly, hence float32
and float16 only.
"""

import importlib
import os

import pytest
import torch

import tersor
from tersor import _backends
from tersor.attention.leff import _reference, _reference_backward

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1, which make test starts", allow_module_level=True)

# batch, height, width, channels, hidden, outputs
SHAPES = [
    (1, 5, 7, 3, 10, 4),
    (2, 9, 17, 16, 32, 16),  # more tokens than a program adds up, images that share a tile
    (1, 1, 1, 1, 1, 1),
    (1, 3, 70, 40, 70, 70),  # more than one block of channels, of hidden channels and of outputs
    (3, 2, 1, 8, 33, 5),
]
SEED = 0


@pytest.fixture(autouse=True)
def _triton():
    """Every test runs on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        assert _backends.running("leff_forward", "cpu") == "triton"
        assert _backends.running("leff_backward", "cpu") == "triton"
        yield


def problem(size, affine=False, dtype=torch.float32):
    """The incoming gradient and the operator's nine tensors."""
    generator = torch.Generator().manual_seed(SEED)
    batch, height, width, channels, hidden, outputs = size
    shapes = [
        (batch, height, width, outputs), (batch, height, width, channels), (hidden, channels), (hidden,),
        (hidden, 1, 3, 3), (hidden,), (outputs, hidden), (outputs,), (hidden,), (hidden,),
    ]  # fmt: skip
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors[2], tensors[6] = tensors[2] / channels**0.5, tensors[6] / hidden**0.5
    tensors = [t.to(dtype) for t in tensors]
    return tensors if affine else [*tensors[:8], None, None]


def run_triton(grad, *tensors):
    forward, backward = torch.ops.tersor.leff_forward.default, torch.ops.tersor.leff_backward.default
    return [forward(*tensors), *backward(grad, *tensors, True, True)]


def run_reference(*tensors, dtype=torch.float64):
    grad, *tensors = (None if t is None else t.to(dtype) for t in tensors)
    return [_reference(*tensors), *_reference_backward(grad, *tensors, True, True)]


def error(ours, exact):
    """The largest difference, relative to the largest number or to 1."""
    assert ours.shape == exact.shape
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1)).item() if exact.numel() else 0.0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_float32_agrees_with_float64_reference(size, affine):
    tensors = problem(size, affine)
    for i, (ours, exact) in enumerate(zip(run_triton(*tensors), run_reference(*tensors), strict=True)):
        assert ours.is_contiguous()
        assert ours.dtype == torch.float32
        assert error(ours, exact) <= 1e-5, i


@pytest.mark.parametrize("affine", [False, True])
def test_float16_errs_at_most_twice_as_much_as_torch(affine):
    """The bar is torch's error with everything in float16, and a unit of its rounding."""
    from tersor.models.eager_leff import leff_rearrange

    grad, *tensors = problem(SHAPES[1], affine, torch.float16)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = leff_rearrange(*leaves)
    given = [t for t in leaves if t is not None]
    rivals = [output.detach(), *torch.autograd.grad(output, given, grad)]
    exact = [t for t in run_reference(grad, *tensors) if t.numel()]
    ours = [t for t in run_triton(grad, *tensors) if t.numel()]
    for i, (own, rival, truth) in enumerate(zip(ours, rivals, exact, strict=True)):
        assert own.dtype == torch.float16
        assert error(own, truth) <= 2 * error(rival, truth) + 2**-11, i


def test_slabs_of_images_are_the_same(monkeypatch):
    """The forward pass takes as many images at a time as fit in the cache, here one, two and all."""
    launcher = importlib.import_module("tersor.triton_kernels.attention.leff")
    _, *tensors = problem((3, 2, 3, 4, 16, 4), True)
    expected = launcher.leff_forward(*tensors)
    for images in (0, 1, 2):
        monkeypatch.setattr(launcher, "SLAB_BYTES", images * 2 * 3 * 16 * 4)
        assert torch.equal(launcher.leff_forward(*tensors), expected)


def test_absent_biases_and_gradients():
    grad, x, w1, _, dw, _, w2, *_ = problem(SHAPES[0])
    tensors = (x, w1, None, dw, None, w2, None, None, None)
    for ours, exact in zip(run_triton(grad, *tensors), run_reference(grad, *tensors), strict=True):
        assert error(ours, exact) <= 1e-5
    backward = torch.ops.tersor.leff_backward
    assert [t.numel() > 0 for t in backward(grad, *tensors, True, False)] == [True] + [False] * 8
    assert [t.numel() > 0 for t in backward(grad, *tensors, False, True)][:3] == [False, True, False]


def test_rerun_is_bitwise_the_same():
    tensors = problem(SHAPES[0], True)
    for first, second in zip(run_triton(*tensors), run_triton(*tensors), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [1, 5, 8])  # of taps torch itself sends some to the border and some not
def test_non_finite_values_stay_where_they_belong(which, value):
    tensors = problem((1, 4, 5, 3, 6, 2), True)
    tensors[which].view(-1)[tensors[which].numel() // 2] = value
    ours, exact = run_triton(*tensors), run_reference(*tensors)
    assert torch.equal(ours[0].isfinite(), exact[0].isfinite())
    assert error(ours[0][exact[0].isfinite()], exact[0][exact[0].isfinite()]) <= 1e-5


def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference():
    launcher = importlib.import_module("tersor.triton_kernels.attention.leff")
    _, *tensors = problem(SHAPES[0], dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        launcher.leff_forward(*tensors)
    assert torch.equal(torch.ops.tersor.leff_forward(*tensors), _reference(*tensors))


def test_mismatched_tensors_are_refused():
    """The public function checks before; the operator itself must not read outside a tensor either."""
    grad, *tensors = problem(SHAPES[0], True)
    forward, backward = torch.ops.tersor.leff_forward, torch.ops.tersor.leff_backward
    for i in range(1, 9):
        bad = [*tensors[:i], tensors[i][:-1], *tensors[i + 1 :]]
        with pytest.raises(ValueError, match="must be"):
            forward(*bad)
    with pytest.raises(ValueError, match="grad_output must be"):
        backward(grad[:, :2], *tensors, True, True)
    with pytest.raises(ValueError, match="one of hidden_scale and hidden_shift"):
        forward(*tensors[:8], None)
