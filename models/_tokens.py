"""What the models that choose their tokens share: attention, blocks, embeddings, and the token labels of LV-ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import class_attention_qkvpacked, gather_patches, prune_tokens
from tersor._checks import as_int, check_floating
from tersor.models._super_resolution import check_sizes
from tersor.models.layers import DropPath, Layer, Mlp, apply_linear, init_linear
from tersor.tokens.class_attention import attend_qkvpacked

Box = tuple[int, int, int, int]  # of patches: first row, first column, and those behind the last ones
NO_BOX: Box = (0, 0, 0, 0)
_STEM_CHANNELS = 64


class TokenAttention(nn.Module):
    """Self-attention over a sequence: ``(B, n, dim)`` to ``(B, n, dim)``.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: heads.
        qkv_bias: whether the fused projection has a bias.
        linear: called like ``torch.nn.Linear``, for both projections.

    Raises:
        ValueError: ``dim`` is not a positive multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, linear: Layer = nn.Linear) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"TokenAttention: dim ({dim}) must be a positive multiple of num_heads ({num_heads})")
        self.num_heads = num_heads
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = linear(dim, dim)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """With ``residual`` the sum of both."""
        return apply_linear(self.proj, attend_qkvpacked(self.project(input)).flatten(2), residual=residual)

    def scored(
        self, input: Tensor, average: Tensor | None = None, decay: float = 0.0, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Also the class token's attention to the others, see :func:`tersor.class_attention_ema`."""
        output, scores = class_attention_qkvpacked(self.project(input), average, decay)
        return apply_linear(self.proj, output.flatten(2), residual=residual), scores

    def project(self, input: Tensor) -> Tensor:
        """``(B, n, dim)`` to query, key and value, ``(B, n, 3, heads, head_dim)``."""
        return apply_linear(self.qkv, input).unflatten(2, (3, self.num_heads, -1))

    def queries(self, input: Tensor) -> Tensor:
        """``(B, m, dim)`` to ``(B, m, heads, head_dim)``."""
        return apply_linear(self.qkv, input, outputs=slice(input.shape[2])).unflatten(2, (self.num_heads, -1))

    def keys_values(self, input: Tensor) -> Tensor:
        """``(B, n, dim)`` to ``(B, n, 2, heads, head_dim)``."""
        pairs = apply_linear(self.qkv, input, outputs=slice(input.shape[2], None))
        return pairs.unflatten(2, (2, self.num_heads, -1))

    def answer(self, query: Tensor, keys_values: Tensor) -> Tensor:
        """The branch for a few queries alone: ``(B, m, heads, head_dim)`` to ``(B, m, dim)``."""
        key, value = keys_values.permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query.transpose(1, 2), key, value)
        return apply_linear(self.proj, output.transpose(1, 2).flatten(2))


class TokenBlock(nn.Module):
    """x + attention(norm1(x)) / skip_lam, then x + mlp(norm2(x)) / skip_lam, over tokens ``(B, n, dim)``.

    Args:
        dim, num_heads, mlp_ratio: channels; heads; hidden channels of the MLP as a multiple of ``dim``.
        drop_path: stochastic-depth rate of both branches.
        qkv_bias: whether the fused projection has a bias.
        eps: of the layer norms.
        skip_lam: what the branches are divided by; LV-ViT's name.
        linear: called like ``torch.nn.Linear``, for all four layers.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        skip_lam: float = 1.0,
        linear: Layer = nn.Linear,
    ) -> None:
        super().__init__()
        if not skip_lam > 0:
            raise ValueError(f"TokenBlock: skip_lam must be above 0, got {skip_lam}")
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = TokenAttention(dim, num_heads, qkv_bias, linear)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), linear=linear)
        self.drop_path = DropPath(drop_path)
        self.scale = 1.0 / skip_lam

    def forward(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return self.tail(self.attn(self.norm1(input), input))
        return self.tail(self.add(input, self.attn(self.norm1(input))))

    def scored(self, input: Tensor, average: Tensor | None, decay: float) -> tuple[Tensor, Tensor]:
        """Also the averaged attention of the class token, :func:`tersor.class_attention_ema`."""
        if self.is_plain():
            x, scores = self.attn.scored(self.norm1(input), average, decay, input)
            return self.tail(x), scores
        branch, scores = self.attn.scored(self.norm1(input), average, decay)
        return self.tail(self.add(input, branch)), scores

    def class_token(self, input: Tensor) -> Tensor:
        """``forward(input)[:, :1]``, of which the other tokens' queries, projections and MLP are not needed."""
        normed = self.norm1(input)
        return self.finish(input[:, :1], normed[:, :1], self.attn.keys_values(normed))

    def finish(self, input: Tensor, normed: Tensor, keys_values: Tensor) -> Tensor:
        """The block's output for some tokens ``(B, m, dim)``, from their ``norm1`` and all tokens' keys and values."""
        return self.tail(self.add(input, self.attn.answer(self.attn.queries(normed), keys_values)))

    def pruned(self, input: Tensor, count: int) -> Tensor:
        """Keeps the class token and the ``count`` others that it attends to most, by falling attention.

        The residual sum, the choice and ``norm2`` are one operator, :func:`tersor.prune_tokens`.
        """
        branch, scores = self.attn.scored(self.norm1(input))
        norm = self.norm2
        tokens, normalized, _ = prune_tokens(
            scores, input, self.drop_path(branch), norm.weight, norm.bias, count, self.scale, norm.eps
        )
        return self.mlp(normalized, tokens) if self.is_plain() else self.add(tokens, self.mlp(normalized))

    def tail(self, input: Tensor) -> Tensor:
        if self.is_plain():
            return self.mlp(self.norm2(input), input)
        return self.add(input, self.mlp(self.norm2(input)))

    def is_plain(self) -> bool:
        """Whether a branch is added as it is, which :func:`apply_linear` can do in one go."""
        return self.scale == 1 and (not self.training or self.drop_path.rate == 0)

    def add(self, input: Tensor, branch: Tensor) -> Tensor:
        return torch.add(input, self.drop_path(branch), alpha=self.scale)


class PatchEmbedding(nn.Module):
    """Square patches to tokens: ``(B, in_chans, H, W)`` to ``(B, H W / patch_size^2, dim)``, row by row."""

    weights_read_directly = ("proj",)  # for tersor.compress

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, input: Tensor) -> Tensor:
        return self.proj(self.stem(input)).flatten(2).transpose(1, 2)

    def stem(self, input: Tensor) -> Tensor:
        """What the last convolution, whose stride is its kernel's size, reads."""
        return input

    def chosen(self, input: Tensor, index: Tensor, rows: Tensor | None = None) -> Tensor:
        """Only the tokens ``index``, ``(M, m)``, of the images ``rows``, ``(M,)`` or all: ``(M, m, dim)``."""
        patches = gather_patches(input, index, self.proj.kernel_size[0], rows)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class ConvStem(PatchEmbedding):
    """LV-ViT's embedding of 16 x 16 pixels: three convolutions with batch norms, then one over squares of 8 x 8."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(8, _STEM_CHANNELS, dim)
        channels = _STEM_CHANNELS
        self.conv1 = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def stem(self, input: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(input)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)))

    def chosen(self, input: Tensor, index: Tensor, rows: Tensor | None = None) -> Tensor:
        return super().chosen(self.stem(input if rows is None else input[rows]), index)


class TokenTransformer(nn.Module):
    """Embedding, class token, a table of positions for each grid, blocks, norm and heads.

    Args:
        embed: the patch embedding.
        sides: of the square grids of patches, one table of positions each.
        dim, depth, num_heads, mlp_ratio, qkv_bias, eps, skip_lam: of the blocks, see :class:`TokenBlock`.
        num_classes: size of the output.
        drop_path: stochastic-depth rate of the last block; those before have evenly less.
        aux_head: whether there is a second head, for the tokens.
    """

    blocks: Any  # a ModuleList of TokenBlock, of which type checkers know only that they are modules

    def __init__(
        self,
        embed: PatchEmbedding,
        sides: Sequence[int],
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        drop_path: float,
        qkv_bias: bool,
        eps: float,
        skip_lam: float,
        aux_head: bool,
    ) -> None:
        super().__init__()
        check_sizes(type(self).__name__, dim=dim, depth=depth, num_classes=num_classes)
        self.patch_embed = embed
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_list = nn.ParameterList([nn.Parameter(torch.zeros(1, 1 + side**2, dim)) for side in sides])
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [TokenBlock(dim, num_heads, mlp_ratio, rate, qkv_bias, eps, skip_lam) for rate in rates]
        )
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, num_classes)
        self.aux_head = nn.Linear(dim, num_classes) if aux_head else None

    def initialize(self) -> None:
        """Linear layers, class token and positions from a normal distribution of deviation 0.02."""
        self.apply(init_linear)
        for parameter in (self.cls_token, *self.pos_embed_list):
            nn.init.trunc_normal_(parameter, std=0.02)

    def patches(self, images: Tensor, side: int, box: Box = NO_BOX) -> Tensor:
        """The embedded patches ``(B, side^2, dim)``, those in the box exchanged with the batch's other end."""
        return exchange(self.patch_embed(images), side, box)

    def sequence(self, patches: Tensor, position: Tensor | None) -> Tensor:
        """The class token in front of the patches, plus position."""
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        return tokens if position is None else tokens + position

    def classify(self, tokens: Tensor) -> Tensor:
        """All blocks, norm and heads: ``(B, n, dim)`` to ``(B, num_classes)``.

        Where only the class token has a head, the last block is computed for it alone.
        """
        if self.aux_head is not None:
            return self.class_logits(self.features(tokens))
        x = tokens
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(self.blocks[-1].class_token(x))[:, 0])

    def features(self, tokens: Tensor) -> Tensor:
        """All blocks and the last norm: ``(B, n, dim)`` to ``(B, n, dim)``."""
        x = tokens
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def token_logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits ``(B, K)``, and of every other token ``(B, n - 1, K)``."""
        assert self.aux_head is not None
        return self.head(features[:, 0]), self.aux_head(features[:, 1:])

    def class_logits(self, features: Tensor) -> Tensor:
        """The head's logits of the class token, plus a quarter of the other tokens' largest where they have a head."""
        if self.aux_head is None:
            return self.head(features[:, 0])
        logits, others = self.token_logits(features)
        return logits + 0.25 * others.max(1).values


def check_square(where: str, name: str, images: Any, channels: int, sides: Sequence[int]) -> None:
    """Floating-point ``(B, channels, side, side)`` with one of the sides."""
    check_floating(where, **{name: images})
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or shape[2] not in sides:
        allowed = " or ".join(str(side) for side in sides)
        raise ValueError(f"{where}: {name} must be (B, {channels}, S, S) with S = {allowed}, got shape {shape}")


# Token labelling: LV-ViT's exchange of a box of patches, and its losses


def draw_box(side: int, generator: torch.Generator | None = None) -> Box:
    """A box on a grid of that side whose area is uniformly distributed before it is cut at the edges."""
    share, row, column = torch.rand(3, generator=generator).tolist()
    half = int(side * math.sqrt(1 - share)) // 2
    top, left = int(row * side), int(column * side)
    return max(0, top - half), max(0, left - half), min(side, top + half), min(side, left + half)


def check_box(where: str, box: Any, side: int) -> Box:
    """Four ints, of rows and columns of a grid of that side."""
    if not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"{where}: box must be (row, column, row behind, column behind), got {box!r}")
    top, left, bottom, right = (as_int(where, box=value) for value in box)
    if not (0 <= top <= bottom <= side and 0 <= left <= right <= side):
        raise ValueError(f"{where}: box must be from 0 to {side} and its ends not before its beginnings, got {box}")
    return top, left, bottom, right


def exchange(tokens: Tensor, side: int, box: Box) -> Tensor:
    """Swaps the box of image b with that of image B - 1 - b, ``(B, side^2, C)``; twice is the identity."""
    top, left, bottom, right = box
    if top >= bottom or left >= right:
        return tokens
    mixed = tokens.unflatten(1, (side, side)).clone()
    mixed[:, top:bottom, left:right] = tokens.flip(0).unflatten(1, (side, side))[:, top:bottom, left:right]
    return mixed.flatten(1, 2)


def soft_target(target: Tensor, classes: int) -> Tensor:
    """Class indices ``(B,)`` as one-hot rows; ``(B, K)`` stays as it is."""
    return F.one_hot(target, classes).float() if target.dim() == 1 else target


def mixed_target(target: Tensor, box: Box, tokens: int) -> Tensor:
    """``(B, K)``: an image's target and its partner's by the share of the tokens that come from each."""
    top, left, bottom, right = box
    share = (bottom - top) * (right - left) / tokens
    return target if share == 0 else (1 - share) * target + share * target.flip(0)


def token_label_loss(
    output: tuple[Tensor, Tensor, Box],
    target: Tensor,
    token_target: Tensor | None = None,
    cls_weight: float = 1.0,
    token_weight: float = 1.0,
) -> Tensor:
    r"""LV-ViT's loss: cross entropy of the class token plus that of all others.

    .. math:: w_c\,\mathrm{CE}(a, t') + w_t\,\frac{1}{n} \sum_j \mathrm{CE}(d_j, u_j), \quad
        t' = (1 - \lambda)\,t + \lambda\,\mathrm{flip}(t)

    with :math:`\lambda` the share of the tokens that the box exchanged with the other end of the batch.

    Args:
        output: class logits a ``(B, K)``, logits d ``(B, n, K)`` of the tokens in their own image's place, and the
            box on the tokens' grid: what a model with token labels returns in training.
        target: t, class indices ``(B,)`` or probabilities ``(B, K)``.
        token_target: u, probabilities ``(B, n, K)``; None: the image's target for each of its tokens.
        cls_weight, token_weight: of the two parts; CF-ViT has 1 and 1.

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Raises:
        ValueError: ``token_target`` has another shape than d.

    Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
    arXiv 2104.10858.
    """
    logits, others, box = output
    if token_target is not None and token_target.shape != others.shape:
        raise ValueError(
            f"token_label_loss: token_target must be {tuple(others.shape)}, got shape {tuple(token_target.shape)}"
        )
    target = soft_target(target, logits.shape[1])
    first = cross_entropy(logits, mixed_target(target, box, others.shape[1]))
    each = F.log_softmax(widened(others), 2)
    if token_target is None:
        return cls_weight * first - token_weight * (each.mean(1) * target).sum(1).mean()
    return cls_weight * first - token_weight * (each * token_target).sum(2).mean()


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch, of class indices ``(B,)`` or probabilities ``(B, K)``; at least in float32."""
    wide = widened(logits)
    return F.cross_entropy(wide, target.to(wide.dtype) if target.dim() == 2 else target)


def kl_to_detached(logits: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`\sum_c q \log (q / p) / B`, q the softmax of ``teacher``, without a gradient, p that of ``logits``."""
    targets = F.log_softmax(widened(teacher.detach()), 1)
    return F.kl_div(F.log_softmax(widened(logits), 1), targets, reduction="batchmean", log_target=True)


def widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
