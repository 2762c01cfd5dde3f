"""The published way to compute CF-ViT, SuperViT and Token Merging, in eager torch: the baseline of the benchmarks.

Every layer writes its attention matrix out, since a later step may ask for it. The class attention is averaged as whole
matrices, all patches are embedded and all tokens reused before some are chosen, and chosen tokens are copied by an
index into the flattened batch. The functions run a model's own weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor.models._tokens import TokenAttention, TokenBlock
from tersor.models.cf_vit import CFViT
from tersor.models.super_vit import SuperViT

_FIRST_SCORED = 3
_PRUNED = (3, 6, 9)


def attend(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, n, 3, heads, head_dim)`` to ``(B, n, heads, head_dim)`` and to the weights ``(B, heads, n, n)``."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, n, head_dim] each
    weights = (query @ key.transpose(-2, -1) * query.shape[3] ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def attention(layer: TokenAttention, input: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, n, dim)`` to the same and to the weights ``(B, heads, n, n)``."""
    output, weights = attend(layer.qkv(input).unflatten(2, (3, layer.num_heads, -1)))
    return layer.proj(output.reshape(input.shape)), weights


def class_scores(weights: Tensor) -> Tensor:
    """The class token's attention to the others, ``(B, n - 1)``, of weights ``(B, heads, n, n)``."""
    return weights.mean(1)[:, 0, 1:]


def select(input: Tensor, index: Tensor) -> Tensor:
    """Tokens ``(B, m, C)`` of ``(B, n, C)``, by rows of the flattened batch."""
    batch, length, channels = input.shape
    offset = torch.arange(batch, device=input.device)[:, None] * length
    return input.reshape(batch * length, channels)[(index + offset).flatten()].view(batch, -1, channels)


def add(layer: TokenBlock, input: Tensor, branch: Tensor) -> Tensor:
    """The residual sum; DeiT's code has no factor in it."""
    branch = layer.drop_path(branch)
    return input + (branch if layer.scale == 1 else branch * layer.scale)


def block(layer: TokenBlock, input: Tensor) -> tuple[Tensor, Tensor]:
    """A whole block, and its attention weights."""
    branch, weights = attention(layer.attn, layer.norm1(input))
    x = add(layer, input, branch)
    return add(layer, x, mlp(layer.mlp, layer.norm2(x))), weights


def mlp(layer: Any, input: Tensor) -> Tensor:
    return layer.fc2(layer.act(layer.fc1(input)))


# CF-ViT


def resplit(scores: Tensor, coarse: Tensor, fine: Tensor, alpha: float = 0.5) -> Tensor:
    """The fine pass's sequence, gathered from the coarse ``(B, 1 + N, C)`` and the fine tokens ``(B, 1 + 4 N, C)``."""
    count = scores.shape[1]
    side, chosen = math.isqrt(count), math.ceil(alpha * count)
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    best, rest = order[:, :chosen], order[:, chosen:]
    first = best // side * 4 * side + best % side * 2
    children = torch.cat([first, first + 1, first + 2 * side, first + 2 * side + 1], 1)
    index = torch.cat([torch.zeros_like(children[:, :1]), 1 + children], 1)
    return torch.cat([select(fine, index), select(coarse, 1 + rest)], 1)


def fine_sequence(patches: Tensor, reuse: Tensor, position: Tensor | None, cls: Tensor) -> Tensor:
    """All fine tokens ``(B, 1 + 4 N, C)``, of patches ``(B, 4 N, C)``, with those of the coarse grid in them."""
    fine = torch.cat([cls.expand(patches.shape[0], -1, -1), patches], 1)
    side = math.isqrt(reuse.shape[1])
    reused = F.interpolate(reuse.transpose(1, 2).unflatten(2, (side, side)), scale_factor=2, mode="nearest")
    reused = reused.flatten(2).transpose(1, 2)
    fine = fine + torch.cat([torch.zeros_like(reused[:, :1]), reused], 1)
    return fine if position is None else fine + position


def fine_embedding(model: CFViT, images: Tensor, features: Tensor, position: bool = True) -> Tensor:
    """:func:`fine_sequence` of the images and the coarse pass's features ``(B, 1 + N, C)``."""
    norm, reuse = model.reuse_block
    reused = mlp(reuse, norm(features[:, 1:]))
    table = model.pos_embed_list[1] if position else None
    return fine_sequence(model.patch_embed(images), reused, table, model.cls_token)


def cf_vit_coarse(model: CFViT, coarse_images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features and embedding ``(B, 1 + N, C)``, and the average ``(B, heads, 1 + N, 1 + N)`` of the weights."""
    embedded = model.sequence(model.patch_embed(coarse_images), model.pos_embed_list[0])
    x, average = embedded, None
    for number, layer in enumerate(model.blocks):
        x, weights = block(layer, x)
        if number >= _FIRST_SCORED:
            average = (1 - model.decay) * weights + (0 if average is None else model.decay * average)
    return model.norm(x), embedded, x.new_zeros(x.shape[0]) if average is None else average


def cf_vit_fine(model: CFViT, images: Tensor, features: Tensor, embedded: Tensor, average: Tensor) -> Tensor:
    """Logits of the fine pass."""
    fine = fine_embedding(model, images, features, model.selection or model.position_always)
    x = resplit(class_scores(average), embedded, fine, model.alpha) if model.selection else fine
    for layer in model.blocks:
        x, _ = block(layer, x)
    return model.class_logits(model.norm(x))


def cf_vit(model: CFViT, images: Tensor, coarse_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What ``model(images, coarse_images)`` returns in evaluation."""
    coarse = cf_vit_coarse(model, _coarse_images(model, images, coarse_images))
    return model.coarse_logits(coarse[0]), cf_vit_fine(model, images, *coarse)


@torch.no_grad()
def cf_vit_infer(model: CFViT, images: Tensor, threshold: float, coarse_images: Tensor | None = None) -> Tensor:
    """The logits of ``model.infer(images, threshold, coarse_images)``, with boolean indices, each of which waits."""
    coarse = cf_vit_coarse(model, _coarse_images(model, images, coarse_images))
    logits = model.coarse_logits(coarse[0])
    unsure = logits.softmax(1).max(1).values < threshold
    if unsure.any():
        logits[unsure] = cf_vit_fine(model, images[unsure], *(tensor[unsure] for tensor in coarse))
    return logits


def _coarse_images(model: CFViT, images: Tensor, coarse_images: Tensor | None) -> Tensor:
    if coarse_images is not None:
        return coarse_images
    return F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=True)


# SuperViT


def prune(scores: Tensor, input: Tensor, count: int) -> Tensor:
    """The class token of ``(B, n, C)`` and the ``count`` others that have the highest scores ``(B, n - 1)``."""
    kept = 1 + torch.argsort(scores, dim=1, descending=True, stable=True)[:, :count]
    return select(input, torch.cat([torch.zeros_like(kept[:, :1]), kept], 1))


def pruned_block(layer: TokenBlock, input: Tensor, keep_rate: float) -> Tensor:
    """The block that drops tokens, ``ceil(keep_rate * n)`` besides the class token are left."""
    branch, weights = attention(layer.attn, layer.norm1(input))
    x = add(layer, input, branch)
    x = prune(class_scores(weights), x, math.ceil(keep_rate * input.shape[1]))
    return add(layer, x, mlp(layer.mlp, layer.norm2(x)))


def super_vit(model: SuperViT, images: Tensor, size: int, keep_rate: float = 1.0) -> Tensor:
    """What ``model(images, size, keep_rate)`` returns in evaluation."""
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=True)
    x = model.sequence(model.patch_embed(images), model.pos_embed_list[model.sizes.index(size)])
    for number, layer in enumerate(model.blocks):
        prune = number in _PRUNED and keep_rate != 1
        x = pruned_block(layer, x, keep_rate) if prune else block(layer, x)[0]
    return model.class_logits(model.norm(x))


# Token Merging


def match(keys: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``(B, n, heads, head_dim)``: places in a that are left and that are merged, and in b what these join.

    Each is ``(B, m, 1)``. The class token is first in a, and stays.
    """
    metric = keys.mean(2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    scores[:, 0] = -math.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    merged, left = order[:, :count], order[:, count:]
    return left.sort(1)[0], merged, partner[..., None].gather(1, merged)


def merge(keys: Tensor, sizes: Tensor, input: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, n, C)`` and their sizes ``(B, n, 1)`` with ``count`` of them merged into others."""
    left, merged, partner = match(keys, count)

    def add(x: Tensor) -> Tensor:
        batch, _, channels = x.shape
        a, b = x[:, ::2], x[:, 1::2]
        source = a.gather(1, merged.expand(batch, -1, channels))
        total = b.scatter_reduce(1, partner.expand(batch, -1, channels), source, "sum")
        return torch.cat([a.gather(1, left.expand(batch, -1, channels)), total], 1)

    tokens, total = add(input * sizes), add(sizes)
    return tokens / total, total
