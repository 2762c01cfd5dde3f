"""Token Merging's choice: which tokens join which, by the similarity of their keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._batching import fold, unfold
from tersor._checks import accumulate_dtype, as_int, check_floating
from tersor._operator import operator


def match_tokens(keys: Tensor, count: int, protected: int = 1) -> tuple[Tensor, int]:
    r"""Where each token goes when the ``count`` most similar pairs of tokens are merged.

    Tokens at even places are the set a, those at odd places the set b. With :math:`k_i` the mean of token i's keys over
    the heads, the token i of a could join

    .. math:: j(i) = \operatorname{argmax}_{j \in b} \frac{k_i \cdot k_j}{|k_i| \, |k_j|}

    and the ``count`` tokens of a whose similarity to theirs is greatest do. Several may join the same one. Equal
    similarities go by the lower place, and one that is NaN, as of a key that is zero, comes after all others.

    The new order is the published one: the tokens of a that are left, then those of b, each in their order. Protected
    tokens stay in front and nothing joins them.

    Args:
        keys: ``(B, n, heads, head_dim)``, float16, bfloat16, float32 or float64, any strides. It gets no gradient.
        count: how many tokens are to go, at least 0. No more than half of those that are not protected do.
        protected: tokens at the front that are not merged: 1 for a class token, 2 for a class and a distillation token,
            or 0. Without a class token the published way leaves a's tokens in the order of similarity; here they keep
            theirs.

    Returns:
        The new place of each token, ``(B, n)``, int64, and how many places there are: n less ``count``, or less half of
        what is not protected. With none to merge, the tokens stay where they are. These are the arguments of
        :func:`merge_tokens`, and :func:`gather_tokens` by the same index takes merged tokens apart again. Similarities
        are in float32 (float64 for float64).

    Raises:
        TypeError: ``keys`` is not a floating-point tensor, or ``count`` or ``protected`` not an int.
        ValueError: ``keys`` has another shape, ``count`` is negative or ``protected`` not 0, 1 or 2.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461.
    """
    name = "match_tokens"
    check_floating(name, keys=keys)
    if keys.dim() != 4 or min(keys.shape[1:]) < 1:
        raise ValueError(
            f"{name}: keys must be (B, n, heads, head_dim) with all but B at least 1, got shape {tuple(keys.shape)}"
        )
    count, protected = as_int(name, count=count), as_int(name, protected=protected)
    if count < 0:
        raise ValueError(f"{name}: count must be at least 0, got {count}")
    if protected not in (0, 1, 2):
        raise ValueError(f"{name}: protected must be 0, 1 or 2, got {protected}")
    batch, length = keys.shape[:2]
    count = max(0, min(count, (length - protected) // 2))
    if count == 0:
        return torch.arange(length, device=keys.device).repeat(batch, 1), length
    return _match.without_gradient(keys.detach(), count, protected), length - count


def _reference(keys: Tensor, count: int, protected: int) -> Tensor:
    batch, length = keys.shape[:2]
    mean = keys.to(accumulate_dtype(keys.dtype)).mean(2)
    unit = mean / mean.norm(dim=2, keepdim=True)
    first, second = int(protected > 0), int(protected > 1)  # of a and of b, those before them are protected
    similarity = unit[:, 2 * first :: 2] @ unit[:, 1 + 2 * second :: 2].transpose(1, 2)
    best, partner = similarity.masked_fill(similarity.isnan(), float("-inf")).max(2)
    merged = first + torch.argsort(best, dim=1, descending=True, stable=True)[:, :count]

    kept = torch.ones((batch, (length + 1) // 2), dtype=torch.bool, device=keys.device).scatter(1, merged, False)
    place_a = kept.cumsum(1) - 1
    place_b = (length + 1) // 2 - count + torch.arange(length // 2, device=keys.device).expand(batch, -1)
    if protected > 1:  # the distillation token, first of b, comes right after the class token, first of a
        place_a = torch.where(place_a > 0, place_a + 1, 0)
        place_b = torch.cat([torch.ones_like(place_b[:, :1]), place_b[:, 1:]], 1)
    joined = torch.gather(place_b, 1, second + partner)
    joined = torch.cat([place_a[:, :first], joined], 1)
    index = torch.empty((batch, length), dtype=torch.int64, device=keys.device)
    index[:, ::2], index[:, 1::2] = torch.where(kept, place_a, joined), place_b
    return index


def _fake(keys: Tensor, count: int, protected: int) -> Tensor:
    return keys.new_empty(keys.shape[:2], dtype=torch.int64)


def _vmap(info: Any, in_dims: Any, keys: Tensor, count: int, protected: int) -> tuple[Tensor, int]:
    return unfold(_match.overload(fold(keys, in_dims[0], info.batch_size), count, protected), info), 0


_match = operator(
    "match_tokens(Tensor keys, SymInt count, int protected) -> Tensor", reference=_reference, fake=_fake, vmap=_vmap
)
