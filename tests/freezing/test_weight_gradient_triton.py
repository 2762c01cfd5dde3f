"""What is special to the Triton kernels of weight gradients by tiles: blocks, parts, and what the compiler emits.

How to run them, and why in float32 and float16 only, is said in ``test_freezing_triton.py``.
"""

import os
import re

import pytest
import torch

import tersor
from tersor import _backends
from tersor.freezing import freeze_plan, pack_mask

pytest.importorskip("triton", reason="triton is not installed")

import ahead_of_time_triton as ahead
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tersor.triton_kernels.freezing import frozen_conv2d as products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")

DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def on_triton():
    """Runs the test on the Triton backend, and says so if it does not."""
    with tersor.use_backend("triton"):
        names = "frozen_linear_backward", "frozen_conv2d_backward"
        assert {_backends.running(name, "cpu") for name in names} == {"triton"}
        yield


def strided(tensor):
    """The same values in every other element of memory."""
    wide = tensor.new_empty((*tensor.shape, 2))
    wide[..., 0] = tensor
    return wide[..., 0]


def planned(*shape, tile):
    """A mask with a corner that is all frozen and an element that is free, and the plan by tiles."""
    mask = torch.rand(shape) < 0.7
    mask[: shape[0] // 2, : shape[1] // 2] = True
    mask.view(-1)[-1] = False
    return mask, freeze_plan(pack_mask(mask), shape, tile, level="tiles")


def check_product(function, mask, grad_output, input, frozen, *rest):
    """Zeros where nothing is computed, elsewhere the float64 result but for float32 sums and one rounding."""
    ours = function(grad_output, input, frozen, *rest)
    with tersor.use_backend("reference"):
        exact = function(grad_output.double(), input.double(), frozen, *rest)
        size = function(grad_output.double().abs(), input.double().abs(), frozen, *rest)
    assert ours.dtype == input.dtype
    assert ours.shape == exact.shape
    assert ours.is_contiguous()
    rounding = torch.finfo(input.dtype).eps / 2 * exact.abs()
    assert ((ours - exact).abs() <= 1e-6 * size + 1.01 * rounding).all()
    assert not ours[size == 0].any()
    assert frozen is None or not ours[mask].any()
    tiles, *rest = rest
    assert not function(grad_output, input, frozen, tiles[:0], *rest).any()
    assert not function(grad_output[:0], input[:0], frozen, tiles, *rest).any()
    return ours


@pytest.fixture
def in_parts(parts, monkeypatch):
    """One program for all pixels of a tile, or one for every few."""
    monkeypatch.setattr(products, "PROGRAMS", 1 if parts == "one part" else 10000)
    monkeypatch.setattr(products, "STEPS", 1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["one part", "several parts"])
def test_linear(dtype, on_triton, in_parts):
    """Tiles that divide the matrix and do not, of one element, larger than a block, larger than the matrix."""
    backward = torch.ops.tersor.frozen_linear_backward
    sizes = (1, 1, (1, 1)), (5, 3, (4, 2)), (40, 24, (32, 8)), (90, 70, (80, 66)), (9, 17, (50, 50))
    for rows, columns, tile in sizes:
        tensors = torch.randn(40, rows).to(dtype), torch.randn(40, columns).to(dtype)
        mask, plan = planned(rows, columns, tile=tile)
        for frozen in (None, pack_mask(mask)):
            ours = check_product(backward, mask, *tensors, frozen, plan.listed, *plan.tile)
            if rows == 40:
                gaps = strided(tensors[0]), tensors[1].t().contiguous().t()
                odd = torch.cat([plan.listed.flatten()[:1], plan.listed.flatten()])[1:].view(-1, 2)  # misaligned
                for listed in (plan.listed, odd, odd.long()):
                    assert torch.equal(ours, backward(*gaps, frozen, listed, *tile))


WINDOWS = {  # kernel, stride, padding, dilation
    "1 x 1": ((1, 1), (1, 1), (0, 0), (1, 1)),
    "3 x 3": ((3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": ((3, 2), (2, 3), (1, 0), (1, 1)),
    "dilated": ((2, 3), (1, 2), (3, 2), (2, 3)),
}


@interpreted
@pytest.mark.parametrize("parts", ["one part", "several parts"])
@pytest.mark.parametrize("window", WINDOWS)
def test_convolution(window, parts, on_triton, in_parts):
    kernel, *window = WINDOWS[window]
    backward = torch.ops.tersor.frozen_conv2d_backward
    for number, (outputs, inputs, tile) in enumerate([(1, 1, (1, 1)), (5, 3, (4, 2)), (24, 16, (24, 8))]):
        dtype = DTYPES[(number + len(parts)) % 2]
        input = torch.randn(2, inputs, 4, 5).to(dtype)
        weight = torch.zeros(outputs, inputs, *kernel, dtype=dtype)
        grad_output = torch.randn_like(torch.nn.functional.conv2d(input, weight, None, *window))
        mask, plan = planned(*weight.shape, tile=tile)
        for frozen in [None, pack_mask(mask)][number // 2 : number + 1]:
            rest = frozen, plan.listed, kernel, *window, *plan.tile
            ours = check_product(backward, mask, grad_output, input, *rest)
            if number == 1:
                gaps = grad_output.to(memory_format=torch.channels_last), strided(input)
                assert torch.equal(ours, backward(*gaps, *rest))


@interpreted
def test_a_list_that_names_no_tile_writes_nothing(on_triton):
    """Beyond the matrix and negative, which the reference refuses; the device cannot, and stays inside the tensors."""
    grad_output, input = torch.randn(5, 6), torch.randn(5, 7)
    for tile in ([3, 0], [0, 4], [-1, 0], [0, -1]):
        tiles = torch.tensor([tile], dtype=torch.int32)
        assert not torch.ops.tersor.frozen_linear_backward(grad_output, input, None, tiles, 2, 2).any()


@interpreted
def test_rerun_is_bitwise_the_same(on_triton, monkeypatch):
    monkeypatch.setattr(products, "STEPS", 1)
    tiles = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32)
    args = torch.randn(200, 30), torch.randn(200, 50), None, tiles, 16, 16
    backward = torch.ops.tersor.frozen_linear_backward
    assert torch.equal(backward(*args), backward(*args))


@interpreted
def test_mismatched_tensors_are_refused(on_triton):
    """The public functions check before; the operators themselves must not read outside a tensor either."""
    x, image = torch.randn(4, 5), torch.randn(2, 3, 5, 5)
    frozen, tiles = torch.zeros(3, dtype=torch.uint8), torch.zeros((1, 2), dtype=torch.int32)
    linear, convolution = torch.ops.tersor.frozen_linear_backward, torch.ops.tersor.frozen_conv2d_backward
    window = None, tiles, (3, 3), (1, 1), (1, 1), (1, 1), 2, 2
    with pytest.raises(ValueError, match=r"frozen_linear: grad_output and input must be \(tokens, O\)"):
        linear(x, x[1:], None, tiles, 2, 2)
    with pytest.raises(ValueError, match=r"frozen_linear: tiles must be \(count, 2\)"):
        linear(x, x, None, tiles[0], 2, 2)
    with pytest.raises(ValueError, match=r"frozen_linear: frozen must have shape \(4,\)"):
        linear(x, x, frozen, tiles, 2, 2)
    with pytest.raises(ValueError, match=r"frozen_conv2d: grad_output must have N, H' and W' \[2, 5, 5\]"):
        convolution(image[..., 1:], image, *window)
    with pytest.raises(ValueError, match=r"frozen_conv2d: grad_output and input must be \(N, O, H', W'\)"):
        convolution(x, image, *window)


def machine_code(case):
    """PTX of the case for sm_90."""
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.endswith(":16")]
    kinds = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(case.kernel, kinds, case.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options).asm["ptx"]


@compiled
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_products_are_pipelined_in_whole_vectors(dtype):
    """The test of all kernels sees no copies to shared memory; half precision goes to the tensor cores."""
    wanted = {f"window 64 {dtype}", f"linear 64 {dtype}", f"window in parts 64 {dtype}"}
    found = [case for case in ahead.cases(products) if case.label in wanted]
    assert len(found) == 3
    for case in found:
        code = machine_code(case)
        sizes = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+)", code)
        assert sizes
        assert set(sizes) == {"0x10"}
        assert ("wgmma.mma_async" in code) == (dtype != "fp32")
