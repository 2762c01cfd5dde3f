"""CF-ViT (arXiv 2203.03821): a coarse pass for all images, a second one with finer tokens where it is not sure.

The state dicts have the published models' keys, so that their checkpoints load with
:func:`tersor.models.load_checkpoint`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import (
    bucket_size,
    class_scores,
    compact_unsure,
    gather_tokens,
    rank_tokens,
    resize_align_corners,
    resplit_index,
    resplit_tokens,
)
from tersor._checks import as_int, check_share
from tersor.models._tokens import (
    NO_BOX,
    Box,
    ConvStem,
    PatchEmbedding,
    TokenTransformer,
    check_box,
    check_square,
    cross_entropy,
    draw_box,
    exchange,
    kl_to_detached,
    token_label_loss,
)
from tersor.models.layers import Mlp
from tersor.tokens.resplit_tokens import split_count

_PATCH = 16  # pixels; the fine grid has twice the coarse one's side
_FIRST_SCORED = 3  # block whose class attention enters the average first, spec 2.1
VARIANTS: dict[str, dict[str, Any]] = {
    "cf_deit_small": {"dim": 384, "depth": 12, "num_heads": 6},
    "cf_lvvit_small": {"dim": 384, "depth": 16, "num_heads": 6},
    # Ours, for demos on a CPU: fine images of 128 x 128.
    "cf_deit_nano": {"grid": 4, "dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "num_classes": 10},
}


class CoarsePass(NamedTuple):
    """What the coarse pass leaves to the fine one."""

    features: Tensor  # (B, 1 + N, dim), after the last norm
    scores: Tensor | None  # (B, N), None without selection
    embedded: Tensor  # (B, 1 + N, dim), before the first block

    def rows(self, index: Tensor) -> CoarsePass:
        """Those of some images."""
        scores = None if self.scores is None else self.scores[index]
        return CoarsePass(self.features[index], scores, self.embedded[index])


class CoarseState(NamedTuple):
    """The coarse pass up to its last block's attention, where only some tokens go on."""

    tokens: Tensor  # (B, 1 + N, dim), before the last block
    normed: Tensor  # (B, 1 + N, dim), after that block's first norm
    keys_values: Tensor  # (B, 1 + N, 2, heads, head_dim)
    scores: Tensor  # (B, N)
    embedded: Tensor  # (B, 1 + N, dim), before the first block

    def rows(self, index: Tensor) -> CoarseState:
        """Those of some images."""
        return CoarseState(*(tensor[index] for tensor in self))


class Inference(NamedTuple):
    """Result of :meth:`CFViT.infer`."""

    logits: Tensor  # (B, num_classes)
    unsure: Tensor  # (B,) bool: logits are the fine pass's
    confidence: Tensor  # (B,) float32: largest probability after the coarse pass


class CFViT(TokenTransformer):
    """Coarse-to-fine DeiT: one set of weights for a grid of ``grid`` x ``grid`` patches and one of twice the side.

    With N = ``grid^2``, the fine pass has ``1 + 4 k + N - k`` tokens, k = ``ceil(alpha * N)``: the coarse tokens that
    the class token attends to most, on average over layers, are replaced by four. Of the fine image only their patches
    are embedded.

    Args:
        grid: patches along a side of the coarse image.
        dim, depth, num_heads, mlp_ratio, qkv_bias, eps, skip_lam: of the blocks, see ``TokenBlock``.
        num_classes: size of the outputs.
        in_chans: channels of the image.
        alpha: share of the coarse tokens that are split, above 0, at most 1.
        decay: of the class attention's average, which begins with the fourth block.
        drop_path: stochastic-depth rate of the last block; those before have evenly less.
        selection: see :attr:`selection`.

    Shape:
        ``(B, in_chans, 32 * grid, 32 * grid)`` to two times ``(B, num_classes)``.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Chen et al., "CF-ViT: A General Coarse-to-Fine Method for Vision Transformer", arXiv 2203.03821.
    """

    embedding: type[ConvStem] | None = None
    position_always = False  # published: without selection DeiT's fine pass has no positions

    def __init__(
        self,
        grid: int = 7,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        alpha: float = 0.5,
        decay: float = 0.99,
        drop_path: float = 0.0,
        selection: bool = True,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        skip_lam: float = 1.0,
    ) -> None:
        name = type(self).__name__
        if as_int(name, grid=grid) < 1 or as_int(name, in_chans=in_chans) < 1:
            raise ValueError(f"{name}: grid and in_chans must be at least 1, got {grid} and {in_chans}")
        check_share(name, above_zero=True, alpha=alpha)
        check_share(name, decay=decay)
        convolutions = self.embedding
        embed = PatchEmbedding(_PATCH, in_chans, dim) if convolutions is None else convolutions(in_chans, dim)
        sizes = (dim, depth, num_heads, mlp_ratio, num_classes, drop_path, qkv_bias, eps, skip_lam)
        super().__init__(embed, (grid, 2 * grid), *sizes, aux_head=convolutions is not None)
        self.reuse_block = nn.Sequential(nn.LayerNorm(dim, eps=eps), Mlp(dim, int(dim * mlp_ratio)))
        self.grid, self.in_chans, self.alpha, self.decay = grid, in_chans, float(alpha), float(decay)
        self.num_classes = num_classes
        self.selection = selection
        self.initialize()

    @property
    def selection(self) -> bool:
        """Whether the fine pass keeps coarse tokens. Published training sets it to False up to epoch 200 of 300.

        Without it all 4 N fine tokens are used. The switch is not part of the state dict.
        """
        return self._selection

    @selection.setter
    def selection(self, value: bool) -> None:
        if value and len(self.blocks) <= _FIRST_SCORED:
            raise ValueError(
                f"{type(self).__name__}: depth must be at least {_FIRST_SCORED + 1} with selection, as the first "
                f"{_FIRST_SCORED} blocks give no scores, got {len(self.blocks)}"
            )
        self._selection = bool(value)

    def forward(self, images: Tensor, coarse_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both passes, for all images.

        Args:
            images: ``(B, in_chans, 32 * grid, 32 * grid)``.
            coarse_images: ``(B, in_chans, 16 * grid, 16 * grid)``; None: ``images``, resized by
                :func:`tersor.resize_align_corners`.

        Returns:
            The coarse and the fine pass's logits, ``(B, num_classes)`` each.
        """
        coarse_images = self.check_images(images, coarse_images)
        if self.goes_on_with_some():
            state = self.coarse_state(coarse_images)
            order, chosen = self.ranked(state.scores)
            features = self.finish(state, F.pad(1 + chosen, (1, 0)))
            tokens = self.chosen_tokens(images, features[:, 1:], order, state.embedded)
            return self.head(features[:, 0]), self.classify(tokens)
        coarse = self.coarse_pass(coarse_images)
        tokens, _ = self.fine_tokens(images, coarse)
        return self.coarse_logits(coarse.features), self.classify(tokens)

    @torch.no_grad()
    def infer(
        self, images: Tensor, threshold: float, coarse_images: Tensor | None = None, bucket: int | None = None
    ) -> Inference:
        r"""The coarse pass, and the fine pass for those images whose largest probability is below the threshold.

        Args:
            images, coarse_images: as for :meth:`forward`.
            threshold: from 0 to 1.
            bucket: the number of images in the fine pass is rounded up to a multiple of it (:func:`tersor.bucket_size`)
                by sure ones, whose second result is not used: few shapes, for compiled code. None: not rounded.

        Returns:
            The logits with ``unsure`` and ``confidence``. A GPU is waited for once, for the number of unsure images.

        Raises:
            RuntimeError: the model is in training mode.
            TypeError, ValueError: an argument is not as stated.
        """
        if self.training:
            raise RuntimeError(f"{type(self).__name__}: infer needs the model in evaluation mode, call model.eval()")
        coarse_images = self.check_images(images, coarse_images)
        state = self.coarse_state(coarse_images) if self.goes_on_with_some() else None
        if state is not None:
            logits = self.head(self.finish(state)[:, 0])
        else:
            coarse = self.coarse_pass(coarse_images)
            logits = self.coarse_logits(coarse.features)
        index, number = compact_unsure(logits, threshold)
        confidence = torch.softmax(logits.float(), 1).amax(1)
        unsure = torch.zeros_like(confidence, dtype=torch.bool)
        batch, count = images.shape[0], int(number)
        if count == 0:
            return Inference(logits, unsure, confidence)
        rows = index[: bucket_size(count, batch, 1 if bucket is None else bucket)]
        if state is not None:
            own = state.rows(rows)
            order, chosen = self.ranked(own.scores)
            tokens = self.chosen_tokens(images, self.finish(own, 1 + chosen), order, own.embedded, rows)
        else:
            tokens, _ = self.fine_tokens(images, coarse.rows(rows), rows)
        fine = self.classify(tokens)
        index = index[:count]
        return Inference(logits.index_copy(0, index, fine[:count]), unsure.index_fill(0, index, True), confidence)

    def goes_on_with_some(self) -> bool:
        """Whether of the last coarse block only the class token and the tokens to be split are used."""
        return self.selection and self.aux_head is None

    def coarse_state(self, coarse_images: Tensor) -> CoarseState:
        """The coarse pass up to the last block's attention."""
        embedded = self.sequence(self.patches(coarse_images, self.grid), self.pos_embed_list[0])
        x, scores = self.scored_blocks(embedded, len(self.blocks) - 1)
        last = self.blocks[-1]
        normed = last.norm1(x)
        pairs = last.attn.keys_values(normed)
        key = pairs[:, :, 0]
        query = last.attn.queries(normed[:, :1]).expand_as(key)  # only the class token's is read
        scores = class_scores(query, key, scores, self.decay)
        return CoarseState(x, normed, pairs, scores, embedded)

    def finish(self, state: CoarseState, index: Tensor | None = None) -> Tensor:
        """The coarse features ``(B, m, dim)`` of the tokens ``index`` ``(B, m)``; None: of the class token."""
        rows = (t[:, :1] if index is None else gather_tokens(t, index) for t in (state.tokens, state.normed))
        return self.norm(self.blocks[-1].finish(*rows, state.keys_values))

    def ranked(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The ranking ``(B, N)`` and its first k, those that are split."""
        order = rank_tokens(scores)
        return order, order[:, : split_count(order.shape[1], self.alpha)]

    def chosen_tokens(
        self, images: Tensor, features: Tensor, order: Tensor, embedded: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """The fine pass's sequence ``(M, n, dim)`` from the coarse features ``(M, k, dim)`` of the chosen tokens."""
        fine, _ = resplit_index(order, self.alpha)
        patches, reuse = self.patch_embed.chosen(images, fine, rows), self.reuse_block(features)
        position = self.pos_embed_list[1]
        return resplit_tokens(None, embedded, patches, reuse, position, self.cls_token, self.alpha, order=order)[0]

    def coarse_pass(self, coarse_images: Tensor, box: Box = NO_BOX) -> CoarsePass:
        """All blocks over the coarse tokens, with the average of the class token's attention if it is needed."""
        embedded = self.sequence(self.patches(coarse_images, self.grid, box), self.pos_embed_list[0])
        x, scores = self.scored_blocks(embedded, len(self.blocks))
        return CoarsePass(self.norm(x), scores, embedded)

    def scored_blocks(self, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor | None]:
        """The first blocks, and with selection the average of the class token's attention in those that are scored."""
        x, scores = tokens, None
        for number, block in enumerate(self.blocks[:depth]):
            if self.selection and number >= _FIRST_SCORED:
                x, scores = block.scored(x, scores, self.decay)
            else:
                x = block(x)
        return x, scores

    def fine_tokens(
        self, images: Tensor, coarse: CoarsePass, rows: Tensor | None = None, box: Box = NO_BOX
    ) -> tuple[Tensor, Tensor | None]:
        """The fine pass's sequence ``(M, n, dim)``, and with selection the ranking ``(M, N)`` that it is built by.

        Args:
            images: the fine images ``(B, in_chans, 32 * grid, 32 * grid)``.
            coarse: of the M images.
            rows: ``(M,)`` int64, which images they are; None: all, M = B.
            box: of patches on the fine grid, exchanged with the batch's other end.
        """
        position, side = self.pos_embed_list[1], 2 * self.grid
        if coarse.scores is None or box != NO_BOX:
            patches = self.patches(images if rows is None else images[rows], side, box)
            reuse = self.reuse_block(coarse.features[:, 1:])
            if coarse.scores is not None:
                return resplit_tokens(
                    coarse.scores, coarse.embedded, patches, reuse, position, self.cls_token, self.alpha
                )
            patches = patches + spread(reuse, self.grid)
            return self.sequence(patches, position if self.position_always else None), None
        order, chosen = self.ranked(coarse.scores)
        features = gather_tokens(coarse.features, 1 + chosen)
        return self.chosen_tokens(images, features, order, coarse.embedded, rows), order

    def coarse_logits(self, features: Tensor) -> Tensor:
        return self.class_logits(features)

    def check_images(self, images: Tensor, coarse_images: Tensor | None) -> Tensor:
        """Refuses what does not fit, and makes the coarse images if there are none."""
        name, side = type(self).__name__, _PATCH * self.grid
        check_square(name, "images", images, self.in_chans, [2 * side])
        if coarse_images is None:
            return resize_align_corners(images, side)
        check_square(name, "coarse_images", coarse_images, self.in_chans, [side])
        if coarse_images.shape[0] != images.shape[0]:
            raise ValueError(
                f"{name}: coarse_images must be as many as images ({images.shape[0]}), got {coarse_images.shape[0]}"
            )
        return coarse_images


class CFLVViT(CFViT):
    """Coarse-to-fine LV-ViT: convolutions in front, halved branches, and a head for the tokens, which have labels.

    Evaluation gives the class token's logits plus a quarter of the other tokens' largest; those of the coarse pass are
    divided by 1.25, as published.

    Args:
        mix_token: whether in training a box of patches is exchanged between the images of the batch.

    The other arguments are those of :class:`CFViT`.

    Shape:
        ``(B, in_chans, 32 * grid, 32 * grid)`` to two times ``(B, num_classes)``; in training to two times what
        :func:`token_label_loss` takes: ``(B, num_classes)``, ``(B, tokens of the grid, num_classes)`` and the box.

    Source: Chen et al., arXiv 2203.03821.
    """

    embedding = ConvStem
    position_always = True

    def __init__(
        self,
        grid: int = 7,
        dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        alpha: float = 0.5,
        decay: float = 0.99,
        drop_path: float = 0.0,
        selection: bool = True,
        qkv_bias: bool = False,
        eps: float = 1e-5,
        skip_lam: float = 2.0,
        mix_token: bool = True,
    ) -> None:
        super().__init__(
            grid, dim, depth, num_heads, mlp_ratio, num_classes, in_chans, alpha, decay, drop_path, selection,
            qkv_bias, eps, skip_lam,
        )  # fmt: skip
        self.mix_token = mix_token

    def forward(self, images: Tensor, coarse_images: Tensor | None = None, box: Box | None = None) -> tuple[Any, Any]:
        """As :meth:`CFViT.forward`; in training two times logits, the tokens' logits and their box.

        Args:
            box: in training, of patches on the coarse grid: first row, first column, and those behind the last ones;
                image b gets the box of image B - 1 - b. None: drawn if ``mix_token`` is set.
        """
        name = type(self).__name__
        if not self.training:
            if box is not None:
                raise ValueError(f"{name}: box must be None in evaluation, got {box}")
            return super().forward(images, coarse_images)
        coarse_images = self.check_images(images, coarse_images)
        if box is None:
            box = draw_box(self.grid) if self.mix_token else NO_BOX
        box = top, left, bottom, right = check_box(name, box, self.grid)
        fine_box = (2 * top, 2 * left, 2 * bottom, 2 * right)
        coarse = self.coarse_pass(coarse_images, box)
        tokens, order = self.fine_tokens(images, coarse, box=fine_box)
        logits, others = self.token_logits(self.features(tokens))
        if order is not None:
            others = laid_out(others, order, self.alpha)
        first, first_others = self.token_logits(coarse.features)
        return (
            (first, exchange(first_others, self.grid, box), box),
            (logits, exchange(others, 2 * self.grid, fine_box), fine_box),
        )

    def coarse_logits(self, features: Tensor) -> Tensor:
        return self.class_logits(features) / 1.25  # published of this pass alone


def spread(tokens: Tensor, side: int) -> Tensor:
    """Each token of a grid four times, on the grid of twice the side: ``(B, side^2, C)`` to ``(B, 4 side^2, C)``."""
    batch, _, channels = tokens.shape
    grid = tokens.view(batch, side, 1, side, 1, channels)
    return grid.expand(-1, -1, 2, -1, 2, -1).reshape(batch, 4 * side**2, channels)


def laid_out(tokens: Tensor, order: Tensor, alpha: float) -> Tensor:
    """The fine sequence's tokens, ``(B, 4 k + N - k, C)``, on the fine grid; a coarse one at all its four places."""
    places, _ = resplit_index(order, 1.0)  # the four corners of every coarse token, by rank
    count, kept = order.shape[1], resplit_index(order, alpha)[1].shape[1]
    chosen = count - kept
    ranks = torch.arange(count, device=tokens.device)
    corners = torch.arange(4, device=tokens.device)[:, None]
    sources = torch.where(ranks < chosen, corners * chosen + ranks, 3 * chosen + ranks)  # [4, N]
    return gather_tokens(tokens, sources.flatten()[places.argsort(1)])


def cf_vit_loss(coarse: Tensor, fine: Tensor, target: Tensor) -> Tensor:
    r"""The fine logits learn the target, the coarse logits the fine ones.

    .. math:: \mathrm{CE}(f, y) + \frac{1}{B} \sum_b \sum_c q \log \frac{q}{p}, \quad
        q = \mathrm{softmax}(f) \text{ without gradient}, \quad p = \mathrm{softmax}(c)

    Args:
        coarse, fine: logits ``(B, K)``, as :class:`CFViT` returns them.
        target: class indices ``(B,)`` or probabilities ``(B, K)``.

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Source: Chen et al., "CF-ViT", arXiv 2203.03821.
    """
    return cross_entropy(fine, target) + kl_to_detached(coarse, fine)


def cf_lvvit_loss(
    coarse: tuple[Tensor, Tensor, Box],
    fine: tuple[Tensor, Tensor, Box],
    target: Tensor,
    token_target: Tensor | None = None,
) -> Tensor:
    """:func:`token_label_loss` of the fine pass, plus the coarse class logits' divergence as in :func:`cf_vit_loss`.

    Args:
        coarse, fine: what :class:`CFLVViT` returns in training.
        target, token_target: as for :func:`token_label_loss`, tokens on the fine grid.

    Returns:
        The loss, a float32 scalar (float64 for float64).

    Source: Chen et al., "CF-ViT", arXiv 2203.03821.
    """
    return token_label_loss(fine, target, token_target) + kl_to_detached(coarse[0], fine[0])


def cf_deit_small(grid: int = 7, **options: Any) -> CFViT:
    """384 channels, 12 blocks: 23.3 M parameters; published for a ``grid`` of 7 and 9; options as :class:`CFViT`."""
    return CFViT(**VARIANTS["cf_deit_small"] | {"grid": grid} | options)


def cf_lvvit_small(grid: int = 7, **options: Any) -> CFLVViT:
    """384 channels, 16 blocks: 27.1 M parameters; published for a ``grid`` of 7 and 9; options as :class:`CFLVViT`."""
    return CFLVViT(**VARIANTS["cf_lvvit_small"] | {"grid": grid} | options)


def cf_deit_nano(**options: Any) -> CFViT:
    """64 channels, 6 blocks, images of 128 x 128 pixels: for demos; options as :class:`CFViT`."""
    return CFViT(**VARIANTS["cf_deit_nano"] | options)
