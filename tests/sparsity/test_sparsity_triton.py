"""What is special to the Triton kernels of N:M sparsity: groups over bytes, layouts, many combinations, spills.

The kernels run on CPU tensors in Triton's interpreter, which is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m pytest tests/sparsity/test_sparsity_triton.py``. It computes bfloat16 wrongly, hence
float32 and float16 only. The compiler's tests run without that variable.
"""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import tersor
from tersor import _backends, _operator

pytest.importorskip("triton", reason="triton is not installed")

import ahead_of_time_triton as ahead
import triton

from tersor.triton_kernels.sparsity import _groups, nm_remove, nm_sparsify, srste_sparsify

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity in the interpreter

OPERATORS = [name for name, op in _operator.REGISTRY.items() if op.place.startswith("sparsity/")]
DTYPES = [torch.float32, torch.float16]
PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 16), (5, 7)]
INF, NAN = float("inf"), float("nan")
ops = torch.ops.tersor


def shapes(m):
    """Empty; one group; bits that end within a byte; groups over taps and filters; several programs and a tail."""
    return [(0, m), (1, m), (m, 3), (m, 5, 3, 1), (5, m, 1, 1), (3, m + 1, m, 2), (m, 300 // m)]


def layouts(tensor):
    """The tensor in order, transposed, with gaps, and channels last."""
    yield tensor
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, tensor], -1)[..., 0]
    if tensor.dim() == 4:
        yield tensor.to(memory_format=torch.channels_last)


def same(ours, theirs):
    """Bit for bit, the signs of zeros too, with one NaN for all."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[theirs.element_size()]
    nans = [t.isnan() for t in (ours, theirs)] if theirs.is_floating_point() else []
    pair = [torch.where(t.isnan(), NAN, t) if nans else t for t in (ours, theirs)]
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*(t.view(whole) for t in pair))


def both(function, *given):
    """The results on Triton and of the reference, as tuples of contiguous tensors; strides are the reference's."""
    results = []
    for backend in ("triton", "reference"):
        with tersor.use_backend(backend):
            found = function(*given)
        results.append(found if isinstance(found, tuple) else (found,))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert ours.numel() == 0 or ours.stride() == theirs.stride()
    return [tuple(t.contiguous() for t in found) for found in results]


def scores_of(weight, n, m):
    """One alive of a group as a mean, one of all NaN and some negative, and zeros of both signs."""
    shape = weight.numel() // m, math.comb(m, n)
    scores = torch.where(
        torch.rand(shape) < 1 / shape[1], torch.randn(shape), torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
    )
    scores.view(-1)[-1:] = NAN
    return scores


@pytest.fixture
def on_triton(monkeypatch):
    """Says so if that backend would not run the operators; small tiles, since the interpreter is slow."""
    monkeypatch.setattr(_groups, "ELEMENTS", 256)
    monkeypatch.setattr(nm_remove, "ELEMENTS", 256)
    monkeypatch.setattr(nm_remove, "HELD", 32)
    with tersor.use_backend("triton"):
        assert sorted(OPERATORS) == [
            "nm_matmul",
            "nm_packed_conv2d",
            "nm_remove",
            "nm_sparsify_backward",
            "nm_sparsify_forward",
            "nm_unpack",
            "srste_sparsify_backward",
            "srste_sparsify_forward",
        ]
        assert {_backends.running(name, "cpu") for name in OPERATORS} == {"triton"}


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=str)
def test_sparsify(n, m, dtype, on_triton):
    """Mask, output and the weight's gradient bit for bit, the scores' within the rounding of their sums."""
    for shape in shapes(m):
        weight, grad_output = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight.view(-1)[::5] = -0.0
        scores = scores_of(weight, n, m)
        mask = None  # of the scores; given from the second layout on
        for given in layouts(weight):
            ours, theirs = both(ops.nm_sparsify_forward, given, scores, mask, n, m)
            assert all(map(same, ours, theirs))
            mask = theirs[1]
        assert weight.numel() <= m or 0 < sum(map(int.bit_count, mask.tolist())) < weight.numel()
        for own_grad, own in zip(layouts(grad_output), reversed(list(layouts(weight))), strict=True):
            ours, theirs = both(ops.nm_sparsify_backward, own_grad, own, scores, mask, n, m)
            assert same(ours[0], theirs[0])
            # Sums of n products, in whatever order: n roundings of at most their absolute values' sum.
            bar = n * 2**-23 * n * (weight.float() * grad_output.float()).abs().amax() if weight.numel() else 0
            assert ((ours[1] - theirs[1]).abs() <= bar).all()
            assert not ours[1][scores == 0].any()


@interpreted
def test_sparsify_many_combinations(on_triton):
    """More than a program reads at once, in the last of them too."""
    n, m = 3, 10
    weight = torch.randn(3, 2 * m)
    for combination in (0, 15, 16, math.comb(m, n) - 1):
        scores = torch.zeros(6, math.comb(m, n))
        scores[1, combination] = -1.0
        ours, theirs = both(ops.nm_sparsify_forward, weight, scores, None, n, m)
        assert all(map(same, ours, theirs))
        assert sum(map(int.bit_count, ours[1].tolist())) == n
        ours, theirs = both(ops.nm_sparsify_backward, weight, weight, scores, ours[1], n, m)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours[1].count_nonzero() == 1


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (3, 12)], ids=str)
def test_compact_scores(n, m, dtype, on_triton):
    """Every bit is that of all scores; one stored, some, one chunk and more, in memory with gaps too."""
    count = math.comb(m, n)
    with tersor.use_backend("triton"):
        for stored in sorted({1, count // 3 + 1, min(count, 40)}):
            weight, grad_output = torch.randn(11, m).to(dtype), torch.randn(11, m).to(dtype)
            weight[2, 0] = INF
            numbers = torch.rand(11, count).argsort(1)[:, :stored].sort(1).values
            scores = (torch.randn(11, stored) * 2).round() / 2  # ties and zeros
            full = torch.zeros(11, count).scatter(1, numbers, scores)
            given = torch.stack([numbers, numbers], -1)[..., 0].to(torch.uint8 if count <= 256 else torch.int16)
            ours = ops.nm_sparsify_forward(weight, scores, None, n, m, given)
            theirs = ops.nm_sparsify_forward(weight, full, None, n, m)
            assert all(map(same, ours, theirs))
            ours = ops.nm_sparsify_backward(grad_output, weight, scores, theirs[1], n, m, given)
            theirs = ops.nm_sparsify_backward(grad_output, weight, full, theirs[1], n, m)
            assert same(ours[0], theirs[0])
            assert same(ours[1], theirs[1].gather(1, numbers))
            k = stored // 2
            own, reference = scores.clone(), scores.clone()
            mask = ops.nm_remove(own, k, n, m, given)
            with tersor.use_backend("reference"):
                expected = ops.nm_remove(reference, k, n, m, given)
            assert same(mask, expected)
            assert same(own, reference)


@interpreted
def test_numbers_beyond_the_combinations_stay_inside_memory(on_triton):
    weight, scores = torch.ones(1, 4), torch.ones(1, 2)
    with tersor.use_backend("triton"):
        output, mask = ops.nm_sparsify_forward(weight, scores, None, 2, 4, torch.tensor([[0, 255]], dtype=torch.uint8))
        assert output.tolist() == [[1, 1, 0, 0]]
        grads = ops.nm_sparsify_backward(weight, weight, scores, mask, 2, 4, torch.tensor([[0, 6]], dtype=torch.uint8))
        assert grads[1].tolist() == [[2, 0]]
        scores = torch.ones(1, 2)
        numbers = torch.tensor([[-1, 0]], dtype=torch.int16)
        assert ops.nm_remove(scores, 0, 4, 12, numbers).tolist() == [15, 0]


@interpreted
def test_a_given_mask_is_packed_anew(on_triton):
    """The bits beyond the last element come out as 0."""
    weight = torch.randn(1, 4)
    ours, theirs = both(ops.nm_sparsify_forward, weight, torch.ones(1, 6), torch.tensor([255], dtype=torch.uint8), 2, 4)
    assert ours[1].tolist() == theirs[1].tolist() == [15]


@interpreted
def test_sparsify_values_that_are_not_finite(on_triton):
    weight, grad_output = torch.randn(8, 8), torch.randn(8, 8)
    weight[0, 0], weight[1, 1], grad_output[2, 2], grad_output[3, 3] = NAN, INF, NAN, -INF
    scores = torch.rand(16, 6)
    scores[::2, :4] = 0
    ours, theirs = both(ops.nm_sparsify_forward, weight, scores, None, 2, 4)
    assert all(map(same, ours, theirs))
    ours, theirs = both(ops.nm_sparsify_backward, grad_output, weight, scores, ours[1], 2, 4)
    assert same(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-6, atol=1e-6, equal_nan=True)
    assert ours[1].isnan().any()


def removed(scores, k, n, m):
    """The mask and the scores after the removal."""
    own = torch.empty_like(scores).copy_(scores)
    return ops.nm_remove(own, k, n, m), own


@interpreted
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (2, 3), (2, 9)], ids=str)
def test_remove(n, m, on_triton):
    """Few combinations, many, and more than a program holds: ties, zeros of both signs, infinities, any k."""
    count = math.comb(m, n)
    for number, groups in enumerate((0, 3, 40 if count < 16 else 12)):
        scores = torch.randn(groups, count)
        scores[1:] = (scores[1:] * 2).round() / 2  # ties and zeros
        scores[torch.rand(groups, count) < 0.05] = INF
        scores[torch.rand(groups, count) < 0.05] = -INF
        scores[scores == 0.5] = -0.0
        for k in {0, count // 2, count - 1} if number == 1 else {count // 3}:
            ours, theirs = both(removed, scores, k, n, m)
            assert all(map(same, ours, theirs)), (groups, k)
        if number == 1:  # where nothing changes
            again, before = both(removed, theirs[1], k, n, m)
            assert all(map(same, again, before))


@interpreted
def test_remove_ties_and_gaps(on_triton):
    """Of equal scores the lower index goes, across what is read at once; in place where memory has gaps."""
    scores = torch.full((2, 45), 0.25)
    for k in (1, 31, 32, 33, 44):
        own = both(removed, scores, k, 2, 10)[0][1]
        assert not own[:, :k].any()
        assert (own[:, k:] == 0.25).all()
    with_gaps = torch.rand(5, 6, 2)[..., 0]
    ours, theirs = both(removed, with_gaps, 3, 2, 4)
    assert all(map(same, ours, theirs))
    own = with_gaps.clone()
    with tersor.use_backend("triton"):
        ops.nm_remove(with_gaps, 3, 2, 4)
        ops.nm_remove(own, 3, 2, 4)
    assert torch.equal(with_gaps, own)
    assert ((own == 0).sum(1) == 3).all()


@interpreted
def test_remove_refuses(on_triton):
    scores = torch.rand(3, 6)
    scores[1, 2] = NAN
    with tersor.use_backend("triton"):
        with pytest.raises(ValueError, match="scores must not be NaN, got 1 that are"):
            ops.nm_remove(scores, 1, 2, 4)
        with pytest.raises(ValueError, match=r"scores must be float32 of shape \(G, 4\)"):
            ops.nm_remove(scores.nan_to_num(), 1, 1, 4)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS, ids=str)
def test_srste(n, m, dtype, on_triton):
    """Bit for bit: ties, zeros of both signs, infinities and NaN of both signs."""
    for shape in shapes(m):
        weight, grad_output = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        weight = torch.where(torch.rand(shape) < 0.5, (weight * 2).round() / 2, weight)
        for value in (INF, -INF, NAN, -NAN):
            weight[torch.rand(shape) < 0.05] = value
        for given in layouts(weight):
            ours, theirs = both(ops.srste_sparsify_forward, given, n, m)
            assert all(map(same, ours, theirs))
        grad_output.view(-1)[::3] = -0.0
        for own_grad, own in zip(layouts(grad_output), reversed(list(layouts(weight))), strict=True):
            grads = both(ops.srste_sparsify_backward, own_grad, own, theirs[1], m, 0.3)
            assert same(grads[0][0], grads[1][0])


@interpreted
def test_refusals(on_triton):
    """What would read outside a tensor."""
    weight, mask = torch.rand(2, 4), torch.zeros(1, dtype=torch.uint8)
    with tersor.use_backend("triton"):
        with pytest.raises(ValueError, match=r"scores must be float32 of shape \(2, 6\)"):
            ops.nm_sparsify_forward(weight, torch.rand(1, 6), None, 2, 4)
        with pytest.raises(ValueError, match="frozen must have shape"):
            ops.nm_sparsify_forward(weight, torch.rand(2, 6), mask[:0], 2, 4)
        with pytest.raises(ValueError, match="grad_output must be as weight"):
            ops.nm_sparsify_backward(weight[:1], weight, torch.rand(2, 6), mask, 2, 4)
        with pytest.raises(ValueError, match="grad_output must be as weight"):
            ops.srste_sparsify_backward(weight.half(), weight, mask, 4, 0.1)
        with pytest.raises(ValueError, match="m must divide the 8 elements"):
            ops.srste_sparsify_forward(weight, 1, 3)


CHANNELS_FIRST = {"INPUTS": 64, "TAPS": 9}
CASES = [
    ahead.Case(*case)
    for module in (nm_sparsify, srste_sparsify)
    for case in module.ahead_of_time_cases(CHANNELS_FIRST)
    if case[1].endswith(" fp16")
]


CASES += [
    ahead.Case(*case)
    for module in (nm_sparsify, nm_remove)
    for case in module.ahead_of_time_cases(compact=True)
    if case[1].endswith((" stored", " fp16"))
]


@compiled
@pytest.mark.parametrize("case", CASES, ids=[f"{c.name} {c.label}".replace(" ", "_") for c in CASES])
def test_single_loads_compile_without_spills(case, tmp_path):
    """Of channels first, and of compact scores' positions: the general test would refuse these.

    As it would 8 bytes of stack that nothing accesses.
    """
    assert ahead.compile_case(case, 90, tmp_path).spills <= 8
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    instructions = set(re.findall(r"\b([A-Z]+[0-9A-Z]*)(?:\.\w+)* ", said))
    assert {"LDG", "STG"} <= instructions
    assert not {"LDL", "STL"} & instructions
