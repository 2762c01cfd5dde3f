"""SuperViT (arXiv 2205.11397): one set of weights for several image sizes and several shares of tokens to keep.

The state dicts have the published models' keys, so that their checkpoints load with
:func:`tersor.models.load_checkpoint`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor import resize_align_corners
from tersor._checks import as_int, check_floating, check_share
from tersor.models._tokens import (
    NO_BOX,
    Box,
    ConvStem,
    PatchEmbedding,
    TokenTransformer,
    check_box,
    cross_entropy,
    draw_box,
    exchange,
    kl_to_detached,
    mixed_target,
    soft_target,
    token_label_loss,
)

_PATCH = 16  # pixels
_PRUNED = (3, 6, 9)  # blocks that drop tokens, counted from 0
KEEP_RATES = (0.5, 0.7)  # that training draws from
VARIANTS: dict[str, dict[str, Any]] = {
    "super_deit_small": {"dim": 384, "depth": 12, "num_heads": 6},
    "super_lvvit_small": {"dim": 384, "depth": 16, "num_heads": 6},
    # Ours, for demos on a CPU.
    "super_deit_nano": {
        "sizes": (64, 96, 128),
        "dim": 64,
        "depth": 7,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_classes": 10,
    },
}


class SuperViT(TokenTransformer):
    """A DeiT that takes images of several sizes and may drop tokens in its blocks 3, 6 and 9, counted from 0.

    A pruning block with n tokens, its class token among them, keeps the ``ceil(keep_rate * n)`` others that the class
    token attends to most.

    Args:
        sizes: of the square images, multiples of 16, each with a table of positions of its own; the last one is the
            full model's, which training teaches by the target in each step.
        dim, depth, num_heads, mlp_ratio, qkv_bias, eps, skip_lam: of the blocks, see ``TokenBlock``.
        num_classes: size of the output.
        in_chans: channels of the image.
        drop_path: stochastic-depth rate of the last block; those before have evenly less.

    Shape:
        ``(B, in_chans, H, W)`` to ``(B, num_classes)``.

    Raises:
        TypeError, ValueError: an option or the input is not as stated.

    Source: Lin et al., "Super Vision Transformer", arXiv 2205.11397.
    """

    embedding: type[ConvStem] | None = None

    def __init__(
        self,
        sizes: Sequence[int] = (128, 160, 192, 224),
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        skip_lam: float = 1.0,
    ) -> None:
        name = type(self).__name__
        sizes = tuple(as_int(name, sizes=size) for size in sizes)
        if not sizes or any(size < _PATCH or size % _PATCH for size in sizes) or len(set(sizes)) < len(sizes):
            raise ValueError(f"{name}: sizes must be different multiples of {_PATCH}, got {sizes}")
        if as_int(name, in_chans=in_chans) < 1:
            raise ValueError(f"{name}: in_chans must be at least 1, got {in_chans}")
        convolutions = self.embedding
        embed = PatchEmbedding(_PATCH, in_chans, dim) if convolutions is None else convolutions(in_chans, dim)
        options = (dim, depth, num_heads, mlp_ratio, num_classes, drop_path, qkv_bias, eps, skip_lam)
        sides = [size // _PATCH for size in sizes]
        super().__init__(embed, sides, *options, aux_head=convolutions is not None)
        self.sizes, self.in_chans, self.num_classes = sizes, in_chans, num_classes
        self.initialize()

    def forward(self, images: Tensor, size: int | None = None, keep_rate: float = 1.0) -> Tensor:
        """Logits ``(B, num_classes)``.

        Args:
            images: ``(B, in_chans, H, W)``.
            size: one of ``sizes``, that images of another size are resized to by :func:`tersor.resize_align_corners`;
                None: the images' own, which must be one of them.
            keep_rate: above 0, at most 1; 1 keeps all tokens in their order.
        """
        size = self.check_size(images, size)
        if self.aux_head is not None:
            return self.class_logits(self.image_features(images, size, keep_rate))
        tokens = self.tokens(images, size, keep_rate, len(self.blocks) - 1)
        return self.head(self.norm(self.blocks[-1].class_token(tokens))[:, 0])  # no other token has a head

    def image_features(self, images: Tensor, size: int, keep_rate: float, box: Box = NO_BOX) -> Tensor:
        """The normalised tokens after the last block: ``(B, tokens that are left, dim)``."""
        return self.norm(self.tokens(images, size, keep_rate, len(self.blocks), box))

    def tokens(self, images: Tensor, size: int, keep_rate: float, depth: int, box: Box = NO_BOX) -> Tensor:
        """The tokens after ``depth`` blocks: ``(B, tokens that are left, dim)``."""
        self.check_rate(keep_rate)
        patches = self.patches(resize_align_corners(images, size), size // _PATCH, box)
        x = self.sequence(patches, self.pos_embed_list[self.sizes.index(size)])
        for number, block in enumerate(self.blocks[:depth]):
            if number not in _PRUNED or keep_rate == 1:
                x = block(x)
                continue
            count = math.ceil(keep_rate * x.shape[1])
            x = block.pruned(x, operator.index(count))  # compiled code would take it for a symbol otherwise
        return x

    def check_size(self, images: Tensor, size: int | None) -> int:
        name = type(self).__name__
        check_floating(name, images=images)
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"{name}: images must be (B, {self.in_chans}, H, W), got shape {tuple(images.shape)}")
        if size is None:
            if images.shape[2] != images.shape[3] or images.shape[2] not in self.sizes:
                raise ValueError(
                    f"{name}: images must be square with one of the sizes {self.sizes} if size is None, "
                    f"got {images.shape[2]} x {images.shape[3]}"
                )
            return images.shape[2]
        if size not in self.sizes:
            raise ValueError(f"{name}: size must be one of {self.sizes}, got {size}")
        return as_int(name, size=size)

    def check_rate(self, keep_rate: float) -> None:
        name = type(self).__name__
        check_share(name, above_zero=True, keep_rate=keep_rate)
        if keep_rate != 1 and len(self.blocks) <= _PRUNED[0]:
            warnings.warn(
                f"{name}: keep_rate {keep_rate} drops no token, as the model has {len(self.blocks)} blocks and block "
                f"{_PRUNED[0]} (from 0) would be the first to prune",
                stacklevel=3,
            )


class SuperLVViT(SuperViT):
    """The LV-ViT variant: convolutions in front, halved branches, and a head for the tokens, trained by their labels.

    Args:
        mix_token: whether in training a box of patches is exchanged between the images of the batch.

    The other arguments are those of :class:`SuperViT`.

    Shape:
        ``(B, in_chans, H, W)`` to ``(B, num_classes)``: the class token's logits plus a quarter of the other kept
        tokens' largest. In training those of the class token alone; for the last size with ``keep_rate`` 1 what
        :func:`token_label_loss` takes: ``(B, num_classes)``, ``(B, tokens, num_classes)`` and the box.

    Source: Lin et al., arXiv 2205.11397.
    """

    embedding = ConvStem

    def __init__(
        self,
        sizes: Sequence[int] = (128, 160, 192, 224),
        dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path: float = 0.0,
        qkv_bias: bool = False,
        eps: float = 1e-5,
        skip_lam: float = 2.0,
        mix_token: bool = True,
    ) -> None:
        super().__init__(
            sizes, dim, depth, num_heads, mlp_ratio, num_classes, in_chans, drop_path, qkv_bias, eps, skip_lam
        )
        self.mix_token = mix_token

    def forward(self, images: Tensor, size: int | None = None, keep_rate: float = 1.0, box: Box | None = None) -> Any:
        """As :meth:`SuperViT.forward`, in training as the class says.

        Args:
            box: in training, of patches on the **last size's** grid, see :meth:`CFLVViT.forward`; other grids take
                :func:`scaled_box`. None: drawn if ``mix_token`` is set.
        """
        name, size = type(self).__name__, self.check_size(images, size)
        if not self.training:
            if box is not None:
                raise ValueError(f"{name}: box must be None in evaluation, got {box}")
            return super().forward(images, size, keep_rate)
        side, largest = size // _PATCH, self.sizes[-1] // _PATCH
        if box is None:
            box = draw_box(largest) if self.mix_token else NO_BOX
        box = scaled_box(check_box(name, box, largest), side, largest)
        features = self.image_features(images, size, keep_rate, box)
        if side != largest or keep_rate != 1:
            return self.head(features[:, 0])
        logits, others = self.token_logits(features)
        return logits, exchange(others, side, box), box


def scaled_box(box: Box, side: int, largest: int) -> Box:
    """A box of the last size's grid on one of that side, by the published rounding: ``int(b // (largest / side))``."""
    top, left, bottom, right = (int(entry // (largest / side)) for entry in box)
    return top, left, bottom, right


# Training


class SubnetworkLosses(NamedTuple):
    """Result of :func:`subnetwork_losses`, all without gradients."""

    losses: Tensor  # (4,), in the order in which they were computed
    logits: list[Tensor]  # (B, num_classes) each
    subnetworks: list[tuple[int, float]]  # size and keep rate of each


def draw_subnetworks(model: SuperViT, generator: torch.Generator | None = None) -> list[tuple[int, float]]:
    """Size and keep rate of a training step's four sub-networks: (last, 1), (last, r1), (s, 1), (s, r2).

    r1 and r2 are drawn from 0.5 and 0.7, s from the sizes but the last (which is taken if it is the only one).

    Args:
        model: whose ``sizes`` are drawn from.
        generator: of the CPU; None is torch's own.
    """

    def draw(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    largest = model.sizes[-1]
    first = draw(KEEP_RATES)
    size = draw(model.sizes[:-1] or model.sizes)
    return [(largest, 1.0), (largest, first), (size, 1.0), (size, draw(KEEP_RATES))]


def subnetwork_losses(
    model: SuperViT,
    images: Tensor,
    target: Tensor,
    subnetworks: Sequence[tuple[int, float]] | None = None,
    generator: torch.Generator | None = None,
    backward: Callable[[Tensor], Any] | None = torch.Tensor.backward,
    token_target: Tensor | None = None,
    box: Box | None = None,
) -> SubnetworkLosses:
    r"""A training step's four forward passes, each followed by its backward pass: one set of activations lives at once.

    For the sub-networks a, b, c, d the losses are :math:`\mathrm{CE}(a, y)`, :math:`\mathrm{KL}(a \,\|\, b)`,
    :math:`\mathrm{CE}(c, y)` and :math:`\mathrm{KL}(c \,\|\, d)`, with
    :math:`\mathrm{KL}(q \,\|\, p) = \sum_c q \log (q / p) / B` of the softmaxes and no gradient through the first.
    A :class:`SuperLVViT` in training has, as published, :func:`token_label_loss` for a,
    :math:`\mathrm{KL}(a \,\|\, b)`, the cross entropy of c with the mixed class target of a, and
    :math:`\mathrm{KL}(a \,\|\, d)`.

    Gradients add up in the parameters; the caller clears them and steps the optimiser.

    Args:
        model: in training mode or not.
        images: ``(B, in_chans, H, W)``, resized for each sub-network.
        target: class indices ``(B,)`` or probabilities ``(B, num_classes)``.
        subnetworks: four times size and keep rate; None: :func:`draw_subnetworks`.
        generator: of the CPU, for what is drawn; None is torch's own.
        backward: called with each loss, for instance ``lambda loss: scaler.scale(loss).backward()``; None: not at all.
        token_target: of a :class:`SuperLVViT`, see :func:`token_label_loss`.
        box: of a :class:`SuperLVViT` in training, on the last size's grid; None: drawn if its ``mix_token`` is set.

    Raises:
        TypeError, ValueError: an argument is not as stated.

    Source: Lin et al., "Super Vision Transformer", arXiv 2205.11397.
    """
    name = "subnetwork_losses"
    chosen = draw_subnetworks(model, generator) if subnetworks is None else list(subnetworks)
    if len(chosen) != 4:
        raise ValueError(f"{name}: subnetworks must be four pairs of size and keep rate, got {len(chosen)}")
    labelled = isinstance(model, SuperLVViT) and model.training
    if not labelled and (token_target is not None or box is not None):
        raise ValueError(f"{name}: token_target and box must be None unless the model is a SuperLVViT in training")
    options: dict[str, Any] = {}
    if labelled:
        largest = model.sizes[-1] // _PATCH
        if box is None:
            box = draw_box(largest, generator) if model.mix_token else NO_BOX
        if chosen[0] != (model.sizes[-1], 1):
            raise ValueError(f"{name}: the first of subnetworks must be ({model.sizes[-1]}, 1), got {chosen[0]}")
        options = {"box": box}
        target = soft_target(target, model.num_classes)
    losses: list[Tensor] = []
    logits: list[Tensor] = []
    for number, (size, rate) in enumerate(chosen):
        output = model(images, size, rate, **options)
        if number == 0 and labelled:
            loss = token_label_loss(output, target, token_target)
            output, others, used = output
            target = mixed_target(target, used, others.shape[1])
        elif number % 2 == 0:
            loss = cross_entropy(output, target)
        else:
            loss = kl_to_detached(output, logits[0 if labelled else number - 1])
        if backward is not None:
            backward(loss)
        losses.append(loss.detach())
        logits.append(output.detach())
    return SubnetworkLosses(torch.stack(losses), logits, chosen)


def super_deit_small(**options: Any) -> SuperViT:
    """384 channels, 12 blocks: 22.2 M parameters; options as :class:`SuperViT`."""
    return SuperViT(**VARIANTS["super_deit_small"] | options)


def super_lvvit_small(**options: Any) -> SuperLVViT:
    """384 channels, 16 blocks: 26.3 M parameters; options as :class:`SuperLVViT`."""
    return SuperLVViT(**VARIANTS["super_lvvit_small"] | options)


def super_deit_nano(**options: Any) -> SuperViT:
    """64 channels, 7 blocks, images of 64, 96 and 128 pixels: for demos; options as :class:`SuperViT`."""
    return SuperViT(**VARIANTS["super_deit_nano"] | options)
