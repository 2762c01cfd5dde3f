"""Token Merging's choice, against loops: partners, ranking, ties, protected tokens, NaN."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from subject import Subject
from torch import Tensor

import tersor

NAN = float("nan")


def _count(length: int) -> int:
    return (length + 2) // 4


def _function(keys: Any) -> Tensor:
    length = keys.shape[1] if isinstance(keys, Tensor) and keys.dim() == 4 else 4
    return tersor.match_tokens(keys, _count(length))[0].to(keys.dtype)


def _exact(keys: Tensor) -> Tensor:
    return _by_loops(keys, _count(keys.shape[1]), 1).to(keys)


def _by_loops(keys: Tensor, count: int, protected: int) -> Tensor:
    """The published steps, token by token, in float64."""
    found = []
    for image in keys.detach().double().sum(2).cpu():
        vectors = [[*map(float, vector)] for vector in image]
        a, b = range(0, len(vectors), 2), range(1, len(vectors), 2)
        pairs = []  # similarity, place and partner of a's tokens
        for i in a[protected > 0 :]:
            best, partner = -math.inf, b[protected > 1]
            for j in b[protected > 1 :]:
                similarity = _cosine(vectors[i], vectors[j])
                if similarity > best:  # NaN never is
                    best, partner = similarity, j
            pairs.append((-best, i, partner))
        joined = {i: partner for _, i, partner in sorted(pairs)[:count]}
        order = [*[i for i in a if i not in joined], *b]
        if protected > 1:
            order = [0, 1, *[i for i in order if i > 1]]
        place = {token: number for number, token in enumerate(order)}
        found.append([place[joined.get(i, i)] for i in range(len(vectors))])
    return torch.tensor(found, dtype=torch.int64, device=keys.device).view(keys.shape[:2])


def _cosine(one: list[float], other: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(y * y for y in other))
    product = sum(x * y for x, y in zip(one, other, strict=True))
    return product / length if length > 0 and math.isfinite(length) else NAN


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return (torch.randn(size, device=device).to(dtype),)


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return (*_inputs(size, dtype, device), min(_count(size[1]), (size[1] - 1) // 2), 1)


SUBJECTS = [
    Subject(
        _function, _exact, _inputs, (), ("match_tokens",), _raw,
        [(2, 10, 3, 5), (3, 11, 2, 6), (1, 3, 1, 1), (2, 50, 3, 16), (1, 197, 2, 33)],
        quantizer=True, differentiable=False, autocast=False, name="match_tokens",
    )
]  # fmt: skip


@given(st.integers(0, 3), st.integers(1, 40), st.integers(1, 3), st.integers(0, 25), st.integers(0, 2), st.booleans())
def test_any_shape(batch: int, length: int, heads: int, count: int, protected: int, tied: bool) -> None:
    keys = torch.randn(batch, length, heads, 5)
    if tied:  # four coordinates of one size have a length of two of it: cosines are exact, and mostly equal
        keys = torch.randint(0, 2, (batch, length, 1, 4)) * 2.0 - 1
        keys = torch.cat([keys, torch.zeros(batch, length, heads, 4)], 2)
    index, places = tersor.match_tokens(keys, count, protected)
    merged = max(0, min(count, (length - protected) // 2))
    assert places == length - merged
    if merged == 0:
        assert torch.equal(index, torch.arange(length).expand(batch, length))
        return
    assert torch.equal(index, _by_loops(keys, merged, protected))
    assert all(sorted(set(image)) == [*range(places)] for image in index.tolist())


@pytest.mark.parametrize("protected", [0, 1, 2])
@pytest.mark.parametrize("length", [9, 10, 35, 130])
def test_protected_tokens(length: int, protected: int, run: tuple[str, str]) -> None:
    """They are most similar to all others, yet stay alone and in front."""
    keys = torch.randn(2, length, 2, 6, device=run[0])
    keys[:, :2] = keys.mean(1, keepdim=True)
    count = length // 2 - 1
    index, places = tersor.match_tokens(keys, count, protected)
    assert torch.equal(index, _by_loops(keys, min(count, (length - protected) // 2), protected))
    copies = torch.zeros(2, places, dtype=torch.int64, device=run[0]).scatter_add(1, index, torch.ones_like(index))
    assert index[:, :protected].tolist() == [[*range(protected)]] * 2
    assert (copies[:, :protected] == 1).all()


def test_equal_similarities_go_by_place(run: tuple[str, str]) -> None:
    """Of all keys alike, the first tokens of a join the first of b."""
    keys = torch.full((1, 12, 2, 4), 0.5, device=run[0])
    assert tersor.match_tokens(keys, 2)[0].tolist() == [[0, 4, 4, 5, 4, 6, 1, 7, 2, 8, 3, 9]]
    assert tersor.match_tokens(keys, 2, 0)[0].tolist() == [[4, 4, 4, 5, 0, 6, 1, 7, 2, 8, 3, 9]]
    assert tersor.match_tokens(keys, 2, 2)[0].tolist() == [[0, 1, 5, 5, 5, 6, 2, 7, 3, 8, 4, 9]]
    many = torch.full((1, 1300, 1, 3), 0.5, device=run[0])
    assert torch.equal(tersor.match_tokens(many, 400)[0], _all_alike(1300, 400, run[0]))


def _all_alike(length: int, count: int, device: str) -> Tensor:
    left = length // 2 - count
    index = torch.empty(1, length, dtype=torch.int64, device=device)
    index[0, 1::2] = left + torch.arange(length // 2, device=device)
    index[0, ::2] = torch.arange(length // 2, device=device) - count
    index[0, 2 : 2 * count + 2 : 2] = left
    index[0, 0] = 0
    return index


def test_every_token_of_a_may_join_the_same_one(run: tuple[str, str]) -> None:
    keys = torch.zeros(1, 9, 1, 3, device=run[0])
    keys[0, ::2, 0, 0] = 1
    keys[0, 1::2, 0, 1] = 1
    keys[0, 5, 0, 0] = 3
    assert tersor.match_tokens(keys, 4)[0].tolist() == [[0, 1, 3, 2, 3, 3, 3, 4, 3]]


def test_nan_comes_last_and_is_in_range(run: tuple[str, str]) -> None:
    keys = torch.randn(1, 9, 1, 4, device=run[0]).abs()
    keys[0, 2], keys[0, 4], keys[0, 1] = NAN, 0, float("inf")
    index, places = tersor.match_tokens(keys, 2)
    assert places == 7
    assert index[0, [0, 2, 4]].tolist() == [0, 1, 2], "they join only when nothing else is left"
    assert index[0, [6, 8]].min() > 3, "and nothing joins one that is not a number while there are others"
    assert tersor.match_tokens(keys, 4)[0][0, [2, 4]].tolist() == [1, 1], "then the first of b"
    nothing = torch.full((2, 10, 2, 3), NAN, device=run[0])
    assert torch.equal(tersor.match_tokens(nothing, 3)[0], tersor.match_tokens(torch.ones_like(nothing), 3)[0])
    assert torch.equal(tersor.match_tokens(nothing, 3, 2)[0], tersor.match_tokens(torch.ones_like(nothing), 3, 2)[0])


def test_wide_keys_of_one_head(run: tuple[str, str]) -> None:
    keys = torch.randn(2, 20, 1, 200, device=run[0])
    assert torch.equal(tersor.match_tokens(keys, 5)[0], _by_loops(keys, 5, 1))


def test_views_of_a_fused_projection(run: tuple[str, str]) -> None:
    qkv = torch.randn(2, 17, 3, 2, 8, device=run[0])
    assert torch.equal(tersor.match_tokens(qkv[:, :, 1], 5)[0], tersor.match_tokens(qkv[:, :, 1].clone(), 5)[0])


def test_more_tokens_than_a_gpu_counts(run: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    if run[1] != "triton":
        pytest.skip("its limit alone")
    launcher = importlib.import_module("tersor.triton_kernels.tokens.match_tokens")
    monkeypatch.setattr(launcher, "MOST", 8)
    monkeypatch.setattr(launcher, "launch", None)
    keys = torch.randn(2, 17, 2, 6, device=run[0])
    assert torch.equal(tersor.match_tokens(keys, 5)[0], _by_loops(keys, 5, 1))


def test_bad_input() -> None:
    keys = torch.randn(2, 9, 3, 4)
    with pytest.raises(ValueError, match=r"keys must be \(B, n, heads, head_dim\) with all but B at least 1, got"):
        tersor.match_tokens(keys[0], 2)
    with pytest.raises(ValueError, match=r"got shape \(2, 0, 3, 4\)"):
        tersor.match_tokens(keys[:, :0], 2)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        tersor.match_tokens(keys, -1)
    with pytest.raises(TypeError, match="count must be an int, got float"):
        tersor.match_tokens(keys, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="protected must be 0, 1 or 2, got 3"):
        tersor.match_tokens(keys, 2, 3)
    with pytest.raises(TypeError, match="protected must be an int, got bool"):
        tersor.match_tokens(keys, 2, True)


def test_a_count_out_of_range_is_refused_by_the_operator(run: tuple[str, str]) -> None:
    if run[1] == "reference":
        pytest.skip("nothing of it reads outside a tensor")
    for count, protected in ((5, 1), (0, 1), (2, 3), (5, 0)):
        with pytest.raises((RuntimeError, ValueError), match="must be"):
            torch.ops.tersor.match_tokens(torch.randn(2, 9, 2, 4, device=run[0]), count, protected)
