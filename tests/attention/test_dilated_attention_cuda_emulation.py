"""The CUDA kernels of dilated attention, run by a CPU emulation of launches: the same source, no GPU.

Bounds, barriers, shuffles and uninitialised shared memory are checked by the emulation and the address sanitizer;
the numbers here. What a GPU alone can show (speed, real races between warps) is not.
"""

import itertools
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tersor.attention.dilated_attention import _reference, _reference_backward

ROOT = Path(__file__).resolve().parents[2]
VECTORS = Path(os.environ.get("TERSOR_VECTORS") or ROOT.parent / "shared" / "vectors") / "dilateformer"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SHARED, DIRECT = 80_000, 0  # bytes of shared memory a block may take; with none, taps come from device memory
BOTH_PATHS = pytest.mark.parametrize("limit", [SHARED, DIRECT], ids=["shared", "direct"])


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation is compiled with g++, which is not installed")
    program = tmp_path_factory.mktemp("emulation") / "dilated_attention"
    flags = ["-std=c++20", "-O0", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Without redzones on stacks, which the fibers switch behind the sanitizer's back; heap checks are what counts.
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "--param", "asan-stack=0"]
    include = ["-I", ROOT / "csrc", "-isystem", Path(torch.__file__).parent / "include"]
    source = ROOT / "tests" / "emulation" / "dilated_attention.cpp"
    works = subprocess.run([compiler, *checks, "-x", "c++", "-", "-o", program], input="int main() {}", text=True)
    checks = checks if works.returncode == 0 else []  # a g++ without the sanitizers' libraries
    done = subprocess.run([compiler, *flags, *checks, *include, source, "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


class Result:
    """What one emulated launch wrote, and how the host code planned it."""

    def __init__(self, plan, values):
        # The first line; the sanitizer may add others.
        self.plan = dict(entry.split("=") for entry in plan.splitlines()[0].split())
        self.values = values


def launch(program, tensors, kernel_size, dilation, scale, limit, logsumexp=None, reverse=False):
    """``tensors``: query, key, value; with ``logsumexp`` (backward) also grad_output and output."""
    dtype, backward = tensors[0].dtype, logsumexp is not None
    sizes = tensors[0].shape
    call = [struct.pack("=5qd", DTYPES[dtype], backward, reverse, limit, kernel_size, scale)]
    call += [struct.pack(f"={len(items) + 1}q", len(items), *items) for items in (dilation, sizes)]
    for tensor in [*tensors, *([logsumexp] if backward else [])]:
        storage = bytes(tensor.untyped_storage())
        strides = tensor.stride()
        call.append(struct.pack(f"={len(strides) + 3}q", len(strides), *strides, tensor.storage_offset(), len(storage)))
        call.append(storage)
    options = {"env": {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}, "capture_output": True}
    done = subprocess.run([program], input=b"".join(call), **options)
    assert done.returncode == 0, done.stderr.decode()
    batch, height, width, heads, head_dim = sizes
    shape = (batch, height, width, 3, heads, head_dim) if backward else tuple(sizes)
    count = int(np.prod(shape)) * dtype.itemsize
    values = torch.frombuffer(bytearray(done.stdout[:count]), dtype=dtype).view(shape)
    if backward:
        assert len(done.stdout) == count
        return Result(done.stderr.decode(), values)
    lse = torch.frombuffer(bytearray(done.stdout[count:]), dtype=torch.float32).view(batch, heads, height, width)
    return Result(done.stderr.decode(), (values, lse))


def forward_backward(program, query, key, value, grad_output, kernel_size, dilation, scale, limit, reverse=False):
    options = (kernel_size, dilation, scale, limit)
    first = launch(program, [query, key, value], *options, reverse=reverse)
    output, logsumexp = first.values
    second = launch(program, [query, key, value, grad_output, output], *options, logsumexp, reverse=reverse)
    return first, second


def exact(query, key, value, grad_output, kernel_size, dilation, scale):
    """Output, log-sum-exp and gradient by the reference in float64."""
    query, key, value, grad_output = (t.double() for t in (query, key, value, grad_output))
    output, logsumexp = _reference(query, key, value, kernel_size, dilation, scale)
    options = (kernel_size, dilation, scale)
    return output, logsumexp, _reference_backward(grad_output, query, key, value, output, logsumexp, *options)


def inputs(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def assert_close(actual, expected):
    error = (actual.double() - expected).abs()
    bound = 1e-5 * expected.abs().clamp(min=1)
    assert not torch.isnan(actual).any()
    assert (error <= bound).all(), f"largest error {(error / bound).max():.3g} times the tolerance"


def check(program, tensors, kernel_size, dilation, scale, limit):
    expected = exact(*tensors, kernel_size, dilation, scale)
    first, second = forward_backward(program, *tensors, kernel_size, dilation, scale, limit)
    for actual, wanted in zip([*first.values, second.values], expected, strict=True):
        assert_close(actual, wanted)
    return first, second


CASES = [  # (B, H, W, heads, head_dim), kernel_size, dilation
    ((2, 7, 10, 3, 24), 3, (1, 2, 3)),  # the published head, an exact variant
    ((1, 9, 17, 3, 32), 3, (1, 2, 3)),  # tiles of 5 x 9, the last ones cut
    ((1, 8, 5, 2, 64), 3, (1, 2)),
    ((1, 17, 18, 2, 24), 3, (7,)),  # 3 x 2 tiles; taps beyond the neighbouring tile
    ((2, 5, 3, 2, 5), 3, (1, 2)),  # no multiple of four channels
    ((1, 6, 7, 3, 1), 5, (1, 2, 3)),
    ((1, 5, 9, 2, 40), 5, (1, 2)),  # lanes with one pack and lanes with two
    ((2, 4, 4, 1, 24), 1, (7,)),
    ((1, 6, 5, 2, 32), 2, (2,)),  # an even kernel: no tap at the centre
    ((1, 3, 4, 2, 40), 2, (2, 8)),  # an even kernel without any tap inside
    ((3, 1, 1, 3, 24), 3, (1, 2, 3)),
    ((1, 2, 3, 2, 32), 3, (3,)),
    ((1, 9, 6, 2, 5), 3, (7, 60)),  # taps farther away than the image is large
    ((1, 2, 2, 1, 136), 3, (1,)),  # 32 lanes
]


@BOTH_PATHS
@pytest.mark.parametrize(("shape", "kernel_size", "dilation"), CASES, ids=[f"{s}-K{k}-d{d}" for s, k, d in CASES])
def test_reference(emulator, shape, kernel_size, dilation, limit):
    first, second = check(emulator, inputs(shape), kernel_size, dilation, shape[-1] ** -0.5, limit)
    assert first.plan["shared"] == second.plan["shared"] == str(int(limit > 0))
    assert first.plan["packed"] == str(int(shape[-1] % 4 == 0))
    assert first.plan["exact"] == str(int(limit > 0 and kernel_size == 3 and shape[-1] in (24, 32, 64)))


@BOTH_PATHS
@pytest.mark.parametrize("head_dim", [24, 5])
def test_views_of_a_fused_projection(emulator, head_dim, limit):
    qkv = torch.randn(2, 5, 7, 3, 3, head_dim, generator=torch.Generator().manual_seed(1))
    grad_output = torch.randn(1, generator=torch.Generator().manual_seed(2)).expand(2, 5, 7, 3, head_dim)
    first, second = check(emulator, [*qkv.unbind(3), grad_output], 3, (1, 2, 3), 0.3, limit)
    assert first.plan["packed"] == str(int(head_dim == 24))
    assert second.plan["packed"] == "0"  # a gradient of stride 0 is read one by one


@BOTH_PATHS
def test_channels_first(emulator, limit):
    tensors = [t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in inputs((2, 5, 6, 2, 24))]
    tensors[0] = tensors[0].contiguous()  # mixed: packs for one tensor, single values for the others
    first, _ = check(emulator, tensors, 3, (1, 2), 24**-0.5, limit)
    assert first.plan["packed"] == "0"


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_views(emulator, offset):
    tensors = []
    for t in inputs((1, 4, 5, 1, 24)):
        memory = torch.full((t.numel() + offset,), float("nan"))
        tensors.append(memory[offset:].view(t.shape).copy_(t))
    first, _ = check(emulator, tensors, 3, (2,), 24**-0.5, SHARED)
    assert first.plan["packed"] == str(int(offset == 4))


@BOTH_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [24, 40])
def test_half_precision(emulator, dtype, head_dim, limit):
    tensors = inputs((1, 7, 9, 3, head_dim), dtype)
    options = (3, (1, 2, 3), head_dim**-0.5)
    expected = exact(*tensors, *options)
    output, logsumexp = _reference(*tensors[:3], *options)
    same_dtype = [output, logsumexp, _reference_backward(tensors[3], *tensors[:3], output, logsumexp, *options)]
    first, second = forward_backward(emulator, *tensors, *options, limit)
    assert second.values.dtype == dtype
    for actual, torchs, wanted in zip([*first.values, second.values], same_dtype, expected, strict=True):
        floor = 1e-5 * wanted.abs().max().clamp(min=1)
        assert (actual - wanted).abs().max() <= 2 * (torchs - wanted).abs().max() + floor


@BOTH_PATHS
@pytest.mark.parametrize(("shape", "kernel_size"), [((1, 9, 10, 2, 24), 3), ((1, 5, 6, 2, 40), 5)])
def test_same_bits_in_any_order_of_threads(emulator, shape, kernel_size, limit):
    tensors = inputs(shape, torch.bfloat16)
    runs = [
        forward_backward(emulator, *tensors, kernel_size, (1, 2), 0.25, limit, reverse)
        for reverse in (False, True, False)
    ]
    for (first, second), (again, second_again) in itertools.pairwise(runs):
        for a, b in zip([*first.values, second.values], [*again.values, second_again.values], strict=True):
            assert torch.equal(a, b)


@BOTH_PATHS
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_reaches_what_depends_on_it(emulator, which, kernel_size, limit):
    tensors = inputs((1, 6, 7, 2, 24))
    tensors[which][0, 2, 3, 1, 5] = float("nan")
    options = (kernel_size, (1, 2), 0.2)
    expected = exact(*tensors, *options)
    first, second = forward_backward(emulator, *tensors, *options, limit)
    for actual, wanted in zip([*first.values, second.values], expected, strict=True):
        assert torch.equal(actual.isnan(), wanted.isnan())
        assert_close(actual.nan_to_num(), wanted.nan_to_num())
    assert first.values[0].isnan().any()


@BOTH_PATHS
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_scores_far_apart(emulator, kernel_size, limit):
    tensors = inputs((1, 5, 6, 2, 24))
    tensors[0] *= 200.0  # scores of some hundreds: exp overflows without the maximum
    expected, logsumexp, _ = exact(*tensors, kernel_size, (1, 2), 1.0)
    output, lse = launch(emulator, tensors[:3], kernel_size, (1, 2), 1.0, limit).values
    assert torch.isfinite(output).all()
    assert torch.allclose(lse.double(), logsumexp, rtol=1e-6, atol=1e-5)
    # The scores' own rounding, some hundreds times 2^-24, is what separates the two.
    assert (output - expected).abs().max() <= logsumexp.abs().max() * 2**-22 * expected.abs().max()


@BOTH_PATHS
@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 30), (5, 31), (2, 30)])
def test_a_dilation_beyond_32_bits_is_like_one_beyond_the_image(emulator, kernel_size, dilation, limit):
    tensors = inputs((1, 4, 5, 1, 24))
    near, far = (
        forward_backward(emulator, *tensors, kernel_size, (d,), 0.2, limit) for d in (dilation, dilation + 2**40)
    )
    assert torch.equal(near[0].values[0], far[0].values[0])
    assert torch.equal(near[1].values, far[1].values)
    check(emulator, tensors, kernel_size, (dilation,), 0.2, limit)


def test_a_window_too_large_for_shared_memory_goes_direct(emulator):
    first, _ = check(emulator, inputs((1, 12, 12, 1, 24)), 3, (3,), 0.2, 20_000)
    assert first.plan["shared"] == "0"


@pytest.mark.parametrize("name", ["msda_core_k3_d123", "msda_core_k5_d12"])
@BOTH_PATHS
def test_vectors(emulator, name, limit):
    path = VECTORS / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"the vector file {name}.npz is not there; TERSOR_VECTORS names the folder of the vectors")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    heads, kernel_size, dilation, scale = (meta["hyper"][n] for n in ("num_heads", "kernel_size", "dilation", "scale"))
    q, k, v = (
        torch.from_numpy(arrays[f"in_{n}"]).permute(0, 2, 3, 1).unflatten(3, (heads, -1)) for n in ("q", "k", "v")
    )
    grad_output = torch.from_numpy(arrays["in_gout"]).unflatten(3, (heads, -1))
    first, second = forward_backward(emulator, q, k, v, grad_output, kernel_size, dilation, scale, limit)
    actual = {"out_y": first.values[0].flatten(3)}
    for n, gradient in zip("qkv", second.values.unbind(3), strict=True):
        actual[f"grad_{n}"] = gradient.flatten(3).permute(0, 3, 1, 2)
    rerun = meta["float32_rerun_error"]
    for key, array in actual.items():
        expected = torch.from_numpy(arrays[key]).double()
        error = (array - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error <= max(1e-5, 10 * rerun["out_y" if key == "out_y" else "worst_grad"])


def test_more_than_the_kernels_take_is_refused(emulator):
    with pytest.raises(AssertionError, match="head_dim from 1 to 256, got 257"):
        launch(emulator, inputs((1, 2, 2, 1, 257))[:3], 3, (1,), 1.0, SHARED)
    with pytest.raises(AssertionError, match="windows up to 2\\^30 wide"):
        launch(emulator, inputs((1, 2**15, 1, 1, 1))[:3], 2**15 - 1, (2**40,), 1.0, SHARED)


DEFECTS = ["early exit", "different barriers", "missing lane", "beyond shared memory", "uninitialised"]
DEFECTS += ["read before the barrier", "overwritten before the barrier"]


@pytest.mark.parametrize("kind", range(len(DEFECTS)), ids=DEFECTS)
def test_the_emulation_sees_defects(emulator, kind):
    done = subprocess.run([emulator, str(kind)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "emulation:" in done.stderr or "AddressSanitizer" in done.stderr


def test_the_emulation_runs_a_sound_kernel(emulator):
    done = subprocess.run([emulator, str(len(DEFECTS))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
