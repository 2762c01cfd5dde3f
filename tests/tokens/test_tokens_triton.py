"""The Triton kernels of the token operators on CPU tensors, in Triton's interpreter.

The interpreter is chosen when Triton is imported, so these tests need a process of their own:
``TRITON_INTERPRET=1 python -m pytest tests/tokens/test_tokens_triton.py``. It computes bfloat16 wrongly, hence float32
and float16 only.
"""

import importlib
import os

import pytest
import torch

import tersor
from tersor import _backends
from tersor._operator import REGISTRY

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a process with TRITON_INTERPRET=1, which make test starts", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN and infinity in the interpreter

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _triton():
    """Every test runs on the Triton backend, in memory that is filled with NaN, which no result may keep."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills it
    with tersor.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def call(name, *args):
    found = getattr(torch.ops.tersor, name).default(*args)
    return found if isinstance(found, (tuple, list)) else (found,)


def both(name, *args):
    """The results of the kernel and of the reference; the kernel's are contiguous and of the same kind."""
    assert _backends.running(name, "cpu") == "triton"
    ours, theirs = call(name, *args), REGISTRY[name].reference(*args)
    theirs = theirs if isinstance(theirs, (tuple, list)) else (theirs,)
    for own, other in zip(ours, theirs, strict=True):
        assert own.shape == other.shape
        assert own.dtype == other.dtype
        assert own.is_contiguous()
    return ours, theirs


def check_equal(name, *args):
    """Bit for bit, but for the signs of zeros."""
    for own, other in zip(*both(name, *args), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


def check_close(name, *args, exact=()):
    """To a few roundings, and bit for bit the results whose places are named in ``exact``."""
    for i, (own, other) in enumerate(zip(*both(name, *args), strict=True)):
        tolerance = 0 if i in exact or not own.is_floating_point() else 4 * torch.finfo(own.dtype).eps
        size = other[other.isfinite()].abs().max().clamp(min=1).item() if other.isfinite().any() else 1.0
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance * size, equal_nan=True)


def layouts(tensor):
    """The tensor in order, with gaps in its rows, with gaps between them, and transposed."""
    yield tensor
    yield torch.stack([tensor, tensor], -1)[..., 0]
    yield torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)


def scores_of(*shape, dtype=torch.float32):
    """Scores with many ties, zeros of both signs, infinities and NaN."""
    scores = torch.randint(-2, 3, shape).to(dtype)
    scores = torch.where(torch.rand(shape) < 0.2, -0.0, scores)
    for value in (NAN, INF, -INF):
        scores = torch.where(torch.rand(shape) < 0.05, value, scores)
    return scores.to(dtype)


def permutations(batch, count):
    return torch.rand(batch, count).argsort(1)


def resplit_problem(batch, count, channels, chosen, dtype=torch.float32, order=None, own_cls=False):
    """The tensors of tokens; with ``order`` the fine patches and the reused tokens are the chosen ones alone."""
    parents = count if order is None else chosen
    shapes = [
        (batch, 1 + count, channels), (batch, 4 * parents, channels), (batch, parents, channels),
        (1, 1 + 4 * count, channels), (batch if own_cls else 1, 1, channels),
    ]  # fmt: skip
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "channels", "chosen"),
    [
        (2, 16, 40, 9),  # two blocks of tokens forward, and of channels backward
        (1, 1, 1, 1),
        (3, 4, 5, 4),
        (1, 81, 1, 41),  # more tokens than are compared at a time
        (1, 4, 130, 1),
        (0, 4, 8, 2),
        (2, 4, 0, 2),
        (35, 4, 3, 2),  # more images than a block of the backward
    ],
)
def test_resplit_tokens(batch, count, channels, chosen, dtype):
    tokens = resplit_problem(batch, count, channels, chosen, dtype, own_cls=batch == 2)
    scores = scores_of(batch, count)
    check_equal("resplit_tokens_forward", *tokens, scores, None, chosen)
    ranked = torch.argsort(scores, dim=1, descending=True, stable=True)
    grad = torch.randn(batch, 1 + 3 * chosen + count, channels).to(dtype)
    for cls_rows in {1, batch}:
        args = (grad, ranked, chosen, False, True, True, True, True, cls_rows)
        check_close("resplit_tokens_backward", *args, exact=(0, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resplit_tokens_with_an_order(dtype):
    batch, count, channels, chosen = 2, 16, 24, 7
    order = permutations(batch, count)
    order[0, 2] = order[0, 12]  # one is split and stays
    order[1, 3], order[1, 8] = 16, -5  # out of range
    order[1, 5] = order[1, 4]  # one is split twice
    tokens = resplit_problem(batch, count, channels, chosen, dtype, order)
    check_equal("resplit_tokens_forward", *tokens, None, order, chosen)
    check_equal("resplit_tokens_forward", *tokens[:2], None, None, tokens[4], None, order, chosen)
    grad = torch.randn(batch, 1 + 3 * chosen + count, channels).to(dtype)
    for selected in (True, False):
        args = (grad, order, chosen, selected, True, True, True, True, 1)
        check_close("resplit_tokens_backward", *args, exact=(0, 1, 2))


def test_resplit_tokens_scores_of_any_type():
    tokens = resplit_problem(2, 9, 8, 4)
    for dtype in (torch.float16, torch.float64):
        check_equal("resplit_tokens_forward", *tokens, scores_of(2, 9, dtype=dtype), None, 4)
    close = 1 + torch.rand(2, 9, dtype=torch.float64) * 1e-12
    check_equal("resplit_tokens_forward", *tokens, close, None, 4)


def test_resplit_tokens_of_any_strides():
    tokens, scores = resplit_problem(2, 16, 8, 5), scores_of(2, 16)
    expected = call("resplit_tokens_forward", *tokens, scores, None, 5)
    grad = torch.randn(expected[0].shape)
    gradients = call("resplit_tokens_backward", grad, expected[1], 5, False, True, True, True, True, 1)
    for given in zip(*map(layouts, (*tokens, scores, grad, expected[1])), strict=True):
        *inputs, last_scores, last_grad, order = given
        for own, other in zip(call("resplit_tokens_forward", *inputs, last_scores, None, 5), expected, strict=True):
            assert torch.equal(own, other)
        again = call("resplit_tokens_backward", last_grad, order, 5, False, True, True, True, True, 1)
        assert all(torch.equal(own, other) for own, other in zip(again, gradients, strict=True))


@pytest.mark.parametrize("selected", [False, True])
def test_resplit_tokens_gradients_that_are_wanted(selected):
    order = permutations(3, 9)
    grad = torch.randn(3, 1 + 12 + 9, 4)
    names = ("coarse", "fine", "reuse", "position")
    every = call("resplit_tokens_backward", grad, order, 4, selected, True, True, True, True, 1)
    for name in names:
        needs = [name == other for other in names]
        found = call("resplit_tokens_backward", grad, order, 4, selected, *needs, 0)
        for own, other, need in zip(found, every, (*needs, False), strict=True):
            assert torch.equal(own, other) if need else own.numel() == 0
    found = call("resplit_tokens_backward", grad, order, 4, selected, False, False, False, False, 3)
    assert torch.equal(found[4], grad[:, :1])


def test_resplit_tokens_batches_that_are_not_summed():
    """Then programs share the batch; here over more than one of them."""
    launcher = importlib.import_module("tersor.triton_kernels.tokens.resplit_tokens")
    batch = launcher.SPAN + 3
    grad, order = torch.randn(batch, 1 + 3 + 4, 2), permutations(batch, 4)
    check_equal("resplit_tokens_backward", grad, order, 1, False, True, True, True, False, batch)


def prune_problem(batch, length, channels, dtype=torch.float32):
    shapes = [(batch, length, channels), (batch, length, channels), (channels,), (channels,)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "count"),
    [(2, 17, 40, 9), (3, 2, 1, 1), (1, 140, 7, 139), (2, 5, 130, 3), (0, 5, 8, 3), (2, 4, 0, 2)],
)
def test_prune_tokens(batch, length, channels, count, dtype):
    tensors, scores = prune_problem(batch, length, channels, dtype), scores_of(batch, length - 1)
    options = (0.7, 1e-5)
    check_close("prune_tokens_forward", *tensors, scores, count, *options, exact=(0, 2))
    tokens, _, index = REGISTRY["prune_tokens_forward"].reference(*tensors, scores, count, *options)
    grads = (torch.randn(tokens.shape).to(dtype), torch.randn(tokens.shape).to(dtype))
    for need_branch, need_parameters in ((True, True), (False, False)):
        needs = (need_branch, need_parameters)
        check_close("prune_tokens_backward", *grads, tokens, tensors[2], index, length, *options, *needs)


def test_prune_tokens_reads_none_that_is_dropped():
    tensors, scores = prune_problem(2, 6, 4), torch.rand(2, 5)
    expected = call("prune_tokens_forward", *tensors, scores, 2, 1.0, 1e-6)
    dropped = torch.argsort(scores, dim=1, descending=True)[:, 2:, None] + 1
    for tensor in tensors[:2]:
        tensor.scatter_(1, dropped.expand(-1, -1, 4), NAN)
    for own, other in zip(call("prune_tokens_forward", *tensors, scores, 2, 1.0, 1e-6), expected, strict=True):
        assert torch.equal(own, other)


def test_prune_tokens_scores_of_any_type():
    tensors = prune_problem(2, 10, 8)
    for scores in (scores_of(2, 9, dtype=torch.float16), 1 + torch.rand(2, 9, dtype=torch.float64) * 1e-12):
        check_close("prune_tokens_forward", *tensors, scores, 4, 1.0, 1e-6, exact=(0, 2))


def test_prune_tokens_of_any_strides():
    tensors, scores = prune_problem(2, 9, 8), scores_of(2, 8)
    expected = call("prune_tokens_forward", *tensors, scores, 5, 0.5, 1e-6)
    tokens, _, index = expected
    grads = [torch.randn(tokens.shape) for _ in range(2)]
    tail = (9, 0.5, 1e-6, True, True)
    gradients = call("prune_tokens_backward", *grads, tokens, tensors[2], index, *tail)
    vectors = [torch.stack([t, t], -1)[..., 0] for t in tensors[2:]]
    for given in zip(*map(layouts, (*tensors[:2], scores, *grads, tokens, index)), strict=True):
        x, y, s, outer, grad, t, i = given
        for own, other in zip(call("prune_tokens_forward", x, y, *vectors, s, 5, 0.5, 1e-6), expected, strict=True):
            assert torch.equal(own, other)
        again = call("prune_tokens_backward", outer, grad, t, vectors[0], i, *tail)
        assert all(torch.equal(own, other) for own, other in zip(again, gradients, strict=True))


def test_prune_tokens_too_wide_for_a_program(monkeypatch):
    launcher = importlib.import_module("tersor.triton_kernels.tokens.prune_tokens")
    tensors, scores = prune_problem(1, 3, 9), torch.rand(1, 2)
    monkeypatch.setattr(launcher, "LONGEST_ROW", 8)
    monkeypatch.setattr(launcher, "launch", None)
    check_equal("prune_tokens_forward", *tensors, scores, 1, 1.0, 1e-6)
    tokens, _, index = call("prune_tokens_forward", *tensors, scores, 1, 1.0, 1e-6)
    check_equal("prune_tokens_backward", tokens, tokens, tokens, tensors[2], index, 3, 1.0, 1e-6, True, True)


def class_problem(batch, length, heads, head_dim, dtype=torch.float32):
    return torch.randn(batch, heads, head_dim).to(dtype), torch.randn(batch, length, heads, head_dim).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "head_dim"),
    [(2, 50, 3, 16), (1, 2, 1, 1), (2, 7, 5, 70), (1, 301, 3, 5), (0, 5, 2, 4)],
)
def test_class_scores(batch, length, heads, head_dim, dtype):
    query, key = class_problem(batch, length, heads, head_dim, dtype)
    average = torch.rand(batch, length - 1)
    check_close("class_scores", query, key, None, head_dim**-0.5, 0.0)
    check_close("class_scores", query, key, average, head_dim**-0.5, 0.99)
    for own, other in zip(*both("class_scores", query, key, average, 0.5, 0.9), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("length", [40, 300])
def test_class_scores_are_equal_where_keys_are(length):
    """Equal keys have equal scores, wherever they are, as rankings are decided by that."""
    query, key = class_problem(2, length, 6, 8)
    key[:, length - 2] = key[:, 1]
    key[:, length // 2] = key[:, 1]
    (scores,) = call("class_scores", query, key, None, 0.3, 0.0)
    assert torch.equal(scores[:, 0], scores[:, length - 3])
    assert torch.equal(scores[:, 0], scores[:, length // 2 - 1])


@pytest.mark.parametrize("length", [5, 300])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_class_scores_that_are_not_finite(value, length):
    """One infinite logit, a whole row of them, and a query that makes all of a head's so."""
    query, key = class_problem(4, length, 2, 3)
    query[:3, :, :] = query[:3].abs()
    key[0, length // 2, 1] = value
    key[1, :, 0] = value
    key[2, 1:, 1] = value
    query[3, 0, 1] = value
    check_close("class_scores", query, key, None, 0.5, 0.0)


def test_class_scores_of_any_strides():
    query, key = class_problem(2, 9, 3, 8)
    average = torch.rand(2, 8)
    (expected,) = call("class_scores", query, key, average, 0.5, 0.9)
    packed = torch.randn(2, 9, 3, 3, 8)
    packed[:, 0, 0], packed[:, :, 1] = query, key
    q, k, _ = packed.unbind(2)
    given = [(q[:, 0], k), *zip(layouts(query), layouts(key), strict=True)]
    for (q, k), mean in zip(given, [average, *layouts(average)], strict=True):
        assert torch.equal(call("class_scores", q, k, mean, 0.5, 0.9)[0], expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 49), (1, 1), (2, 130), (2, 32), (0, 4)], ids=str)
def test_rank_tokens(shape, dtype):
    check_equal("rank_tokens", scores_of(*shape, dtype=dtype))
    check_equal("rank_tokens", torch.randn(shape).to(dtype))


def test_rank_tokens_of_any_strides_and_numbers(monkeypatch):
    scores = scores_of(3, 20)
    (expected,) = call("rank_tokens", scores)
    for given in (*layouts(scores), scores[:1].expand(3, 20)[:, 4:]):
        check_equal("rank_tokens", given)
    tiny = torch.tensor([[0.0, 1e-45, -1e-45, -0.0, 1e-38, 3.4e38, -3.4e38, INF, -INF, NAN, -NAN]])
    check_equal("rank_tokens", tiny)
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.tokens._rank"), "MOST", 19)
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.tokens.rank_tokens"), "launch", None)
    assert torch.equal(call("rank_tokens", scores)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "count"),
    [(2, 17, 40, 9), (1, 1, 1, 3), (3, 100, 5, 70), (1, 3, 600, 2), (2, 5, 4, 0), (0, 3, 4, 2), (2, 3, 0, 2)],
)
def test_gather_tokens(batch, length, channels, count, dtype):
    """With tokens that come several times."""
    tokens, grad = torch.randn(batch, length, channels).to(dtype), torch.randn(batch, count, channels).to(dtype)
    index = torch.randint(0, length, (batch, count))
    check_equal("gather_tokens_forward", tokens, index)
    check_equal("gather_tokens_backward", grad, index, length)


def test_gather_tokens_out_of_range():
    index = torch.tensor([[0, 3, -1, 2**40, -(2**40), 2**32 + 1, 1]])
    check_equal("gather_tokens_forward", torch.randn(1, 3, 4), index)
    check_equal("gather_tokens_backward", torch.randn(1, 7, 4), index, 3)
    check_equal("gather_tokens_forward", torch.randn(1, 0, 4), index)
    check_equal("gather_tokens_backward", torch.randn(1, 7, 4), index, 0)


def test_gather_tokens_of_any_strides():
    tokens, index, grad = torch.randn(2, 9, 8), torch.randint(0, 9, (2, 12)), torch.randn(2, 12, 8)
    expected = *call("gather_tokens_forward", tokens, index), *call("gather_tokens_backward", grad, index, 9)
    for x, i, g in zip(*map(layouts, (tokens, index, grad)), strict=True):
        assert torch.equal(call("gather_tokens_forward", x, i)[0], expected[0])
        assert torch.equal(call("gather_tokens_backward", g, i, 9)[0], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "count"),
    [
        ((2, 2, 6, 4), 2, 5),
        ((1, 3, 28, 14), 14, 3),
        ((3, 1, 3, 3), 1, 4),
        ((2, 1, 32, 32), 16, 4),
        ((0, 3, 4, 4), 2, 3),
    ],
)
def test_gather_patches(shape, size, count, dtype):
    batch, channels, height, width = shape
    patches, length = height // size * (width // size), channels * size**2
    images = torch.randn(shape).to(dtype)
    index = torch.randint(0, patches, (batch, count))
    check_equal("gather_patches_forward", images, index, None, size)
    check_equal("gather_patches_backward", torch.randn(batch, count, length).to(dtype), index, None, size, shape)
    rows = torch.randint(0, max(batch, 1), (batch + 3 if batch else 0,))
    index = torch.randint(0, patches, (len(rows), count))
    check_equal("gather_patches_forward", images, index, rows, size)
    check_equal("gather_patches_backward", torch.randn(len(rows), count, length).to(dtype), index, rows, size, shape)


def test_gather_patches_out_of_range():
    images, shape = torch.randn(2, 2, 4, 6), (2, 2, 4, 6)
    index = torch.tensor([[0, 6, -1, 5], [2**40, 2, -(2**40), 2**32], [1, 2, 3, 1], [0, 1, 2, 3]])
    rows, grad = torch.tensor([1, 1, -1, 2]), torch.randn(4, 4, 8)
    check_equal("gather_patches_forward", images, index, rows, 2)
    check_equal("gather_patches_backward", grad, index, rows, 2, shape)
    check_equal("gather_patches_forward", images, index[:2], None, 2)
    check_equal("gather_patches_backward", grad[:2], index[:2], None, 2, shape)


def test_gather_patches_of_any_strides():
    images, index, rows = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (3, 5)), torch.tensor([1, 0, 1])
    grad = torch.randn(3, 5, 48)
    expected = call("gather_patches_forward", images, index, rows, 4)[0]
    gradient = call("gather_patches_backward", grad, index, rows, 4, images.shape)[0]
    forms = [*layouts(images), images.to(memory_format=torch.channels_last)]
    for x, i, g in zip(forms, [*layouts(index), index], [*layouts(grad), grad], strict=True):
        assert torch.equal(call("gather_patches_forward", x, i, rows.repeat_interleave(2)[::2], 4)[0], expected)
        assert torch.equal(call("gather_patches_backward", g, i, rows, 4, images.shape)[0], gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("shape", [(5, 10), (1, 1), (70, 3), (0, 4), (3, 1100)], ids=str)
def test_compact_unsure(shape, alone, dtype, monkeypatch):
    """In one launch and in two, with images of NaN, of infinities, and of one class alone."""
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.tokens.compact_unsure"), "ALONE", alone * 2**20)
    logits = (torch.randn(shape) * 3).to(dtype)
    for threshold in (0.0, 0.6, 1.0):
        check_equal("compact_unsure", logits, threshold)
    if shape[0] > 2:
        logits[0, -1], logits[1, 0], logits[2] = NAN, INF, -INF
        logits[-1, 1:] = -INF
        check_equal("compact_unsure", logits, 0.6)
        for given in layouts(logits):
            check_equal("compact_unsure", given, 0.6)


def test_compact_unsure_is_strict(monkeypatch):
    """A confidence that equals the threshold is sure, and more images than are counted at a time keep their order."""
    monkeypatch.setattr(importlib.import_module("tersor.triton_kernels.tokens.compact_unsure"), "IMAGES", 32)
    logits = torch.tensor([[1.0, 1.0], [1.0, 2.0], [0.0, 0.0]]).repeat(30, 1)
    check_equal("compact_unsure", logits, 0.5)
    check_equal("compact_unsure", logits, 0.51)
    check_equal("compact_unsure", logits.half(), 0.51)


def test_rerun_is_bitwise_the_same():
    tokens, scores = resplit_problem(3, 9, 8, 4), scores_of(3, 9)
    _, order = call("resplit_tokens_forward", *tokens, scores, None, 4)
    pruned, summands = prune_problem(2, 9, 8), scores_of(2, 8)
    kept, _, index = call("prune_tokens_forward", *pruned, summands, 5, 1.0, 1e-6)
    for name, *args in (
        ("resplit_tokens_forward", *tokens, scores, None, 4),
        ("resplit_tokens_backward", torch.randn(3, 22, 8), order, 4, False, True, True, True, True, 1),
        ("prune_tokens_forward", *pruned, summands, 5, 1.0, 1e-6),
        ("prune_tokens_backward", *torch.randn(2, 2, 6, 8), kept, pruned[2], index, 9, 1.0, 1e-6, True, True),
        ("class_scores", *class_problem(2, 9, 3, 8), None, 0.3, 0.0),
        ("gather_tokens_backward", torch.randn(2, 12, 4), torch.randint(0, 3, (2, 12)), 3),
    ):
        for own, other in zip(call(name, *args), call(name, *args), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)


def test_every_operator_of_the_family_runs_here():
    """``resize_align_corners`` has no operator of its own."""
    names = [name for name, op in REGISTRY.items() if op.place.startswith("tokens/")]
    assert names
    assert {_backends.running(name, "cpu") for name in names} == {"triton"}


def test_mismatched_tensors_are_refused():
    """The public functions check before; the operators themselves must not read outside a tensor either."""
    tokens, order = resplit_problem(2, 4, 3, 2), permutations(2, 4)
    for i in range(5):
        bad = [*tokens[:i], tokens[i][..., :2], *tokens[i + 1 :]]
        with pytest.raises(ValueError, match="must be"):
            call("resplit_tokens_forward", *bad, torch.rand(2, 4), None, 2)
    grad, pruned = torch.randn(2, 11, 3), prune_problem(2, 4, 3)
    refused = [
        ("resplit_tokens_forward", *tokens, torch.rand(2, 3), None, 2),
        ("resplit_tokens_forward", *tokens, torch.rand(2, 4), order[:1], 2),
        ("resplit_tokens_forward", *tokens, torch.rand(2, 4), None, 5),
        ("resplit_tokens_backward", grad[:, 1:], order, 2, False, True, True, True, True, 1),
        ("resplit_tokens_backward", grad, order, 2, False, True, True, True, True, 3),
        ("prune_tokens_forward", *pruned, torch.rand(2, 3), 4, 1.0, 1e-6),
        ("prune_tokens_forward", *pruned[:3], pruned[3][:2], torch.rand(2, 3), 2, 1.0, 1e-6),
        ("prune_tokens_backward", *pruned[:2], pruned[0], pruned[2], order[:, :3], 5, 1.0, 1e-6, True, True),
        ("class_scores", torch.randn(2, 3, 4), torch.randn(2, 5, 3, 5), None, 1.0, 0.0),
        ("class_scores", torch.randn(2, 3, 4), torch.randn(2, 5, 3, 4), torch.rand(2, 5), 1.0, 0.0),
        ("gather_tokens_forward", pruned[0], order[:1]),
        ("gather_tokens_backward", pruned[0], order[:, :3], 4),
        ("gather_patches_forward", torch.randn(2, 1, 4, 4), order, None, 3),
        ("gather_patches_forward", torch.randn(2, 1, 4, 4), order, torch.tensor([0]), 2),
        ("gather_patches_backward", torch.randn(2, 4, 3), order, None, 2, (2, 1, 4, 4)),
    ]
    for name, *args in refused:
        with pytest.raises(ValueError, match=r"must (be|have)"):
            call(name, *args)


def test_float64_is_refused_by_the_kernels_and_runs_on_the_reference():
    launcher = importlib.import_module("tersor.triton_kernels.tokens.gather_tokens")
    tokens, index = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, 2], [1, 1]])
    with pytest.raises(TypeError, match=r"float16, bfloat16 and float32, got torch\.float64"):
        launcher.gather_tokens_forward(tokens, index)
    check_equal("gather_tokens_forward", tokens, index)
