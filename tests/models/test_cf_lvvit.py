"""CF-ViT on LV-ViT: the labels of tokens, boxes of patches that the images of a batch exchange, and batch norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from token_models import images
from torch import Tensor
from window_formula import error, randomize

import tersor
from tersor.models import CFLVViT, cf_lvvit_loss, eager_tokens, token_label_loss
from tersor.models._tokens import NO_BOX, draw_box
from tersor.models.cf_vit import laid_out, spread

SMALL: dict[str, Any] = {"grid": 3, "dim": 12, "depth": 5, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return randomize(CFLVViT(**SMALL | options), 0.15)


def by_image(tokens: Tensor, target: Tensor, token_target: Tensor | None) -> Tensor:
    each = target[:, None].expand(tokens.shape) if token_target is None else token_target
    return -(each * tokens.log_softmax(2)).sum(2).mean()


@pytest.mark.parametrize("given", [True, False])
def test_token_label_loss(given: bool) -> None:
    logits, tokens = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 16, 5, dtype=torch.float64)
    target, token_target = (torch.softmax(torch.randn_like(t), -1) for t in (logits, tokens))
    labels = token_target if given else None
    mixed = (1 - 6 / 16) * target + 6 / 16 * target.flip(0)
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean() + by_image(tokens, target, labels)
    output = (logits, tokens, (1, 0, 3, 3))
    torch.testing.assert_close(token_label_loss(output, target, labels), expected)
    coarse = (torch.randn_like(logits), tokens[:, :4], (0, 0, 1, 1))
    q, p = logits.softmax(1), coarse[0].softmax(1)
    expected = expected + (q * (q / p).log()).sum() / 3
    torch.testing.assert_close(cf_lvvit_loss(coarse, output, target, labels), expected)
    with pytest.raises(ValueError, match=r"token_target must be \(3, 16, 5\), got shape \(3, 4, 5\)"):
        token_label_loss(output, target, tokens[:, :4])


@pytest.mark.parametrize("selection", [True, False])
@pytest.mark.parametrize("batch", [2, 3])
def test_a_box_of_everything_flips_the_batch(batch: int, selection: bool) -> None:
    model, x = small(selection=selection).double(), images(batch, 96, dtype=torch.float64)
    with torch.no_grad():
        plain, mixed = model(x, box=NO_BOX), model(x, box=(0, 0, 3, 3))
    for one, other, side in zip(plain, mixed, (3, 6), strict=True):
        assert error(other[0], one[0].flip(0)) < 1e-10
        assert error(other[1], one[1]) < 1e-10, "the tokens are back in their own image"
        assert (one[1].shape, other[2]) == ((batch, side**2, 5), (0, 0, side, side))


@pytest.mark.parametrize("selection", [True, False])
def test_a_box_step_by_step(selection: bool) -> None:
    """The published order of things, written out for a batch with an image that is its own partner."""
    model, x = small(selection=selection).double(), images(3, 96, dtype=torch.float64)
    coarse_images = tersor.resize_align_corners(x, 48)

    def exchanged(maps: Tensor, top: int, left: int, bottom: int, right: int) -> Tensor:  # (B, C, H, W)
        result = maps.clone()
        for image in range(3):
            result[image, :, top:bottom, left:right] = maps[2 - image, :, top:bottom, left:right]
        return result

    def embedded(pixels: Tensor, box: Any, table: Tensor) -> Tensor:
        maps = exchanged(model.patch_embed.proj(model.patch_embed.stem(pixels)), *box)
        return torch.cat([model.cls_token.expand(3, 1, -1), maps.flatten(2).transpose(1, 2)], 1) + table

    def outputs(features: Tensor, side: int, box: Any, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens = model.aux_head(features[:, 1:])
        tokens = tokens if order is None else laid_out(tokens, order, 0.5)
        maps = exchanged(tokens.transpose(1, 2).unflatten(2, (side, side)), *box)
        return model.head(features[:, 0]), maps.flatten(2).transpose(1, 2)

    box, fine_box = (1, 0, 3, 2), (2, 0, 6, 4)
    coarse = embedded(coarse_images, box, model.pos_embed_list[0])
    tokens, average = coarse, torch.zeros(())
    for number, block in enumerate(model.blocks):
        tokens, weights = eager_tokens.block(block, tokens)
        average = 0.99 * average + 0.01 * weights if number >= 3 else average
    features = model.norm(tokens)
    reused = F.pad(spread(model.reuse_block(features[:, 1:]), 3), (0, 0, 1, 0))
    fine, order = embedded(x, fine_box, model.pos_embed_list[1]) + reused, None
    if selection:
        scores = average.mean(1)[:, 0, 1:]
        fine, order = eager_tokens.resplit(scores, coarse, fine), tersor.rank_tokens(scores)
    expected = outputs(features, 3, box), outputs(model.features(fine), 6, fine_box, order)
    ours = model(x, box=box)
    for one, other in zip(ours, expected, strict=True):
        assert error(one[0], other[0]) < 1e-10
        assert error(one[1], other[1]) < 1e-10
    assert [one[2] for one in ours] == [box, fine_box]


def test_chosen_patches_train_like_all_of_them() -> None:
    """An empty box elsewhere than at the corner takes the way of the mixed maps, which embeds every patch."""
    model, x = small().double(), images(2, 96, dtype=torch.float64)
    target = torch.tensor([1, 4])
    gradients = []
    for box in (NO_BOX, (1, 1, 1, 1)):
        loss = cf_lvvit_loss(*model(x, box=box), target)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        assert error(one, other) < 1e-9, name


def test_batch_norms_see_coarse_and_fine_images_separately() -> None:
    model, x = small(), images(2, 96)
    norm = model.patch_embed.bn1
    before = norm.running_mean.clone()
    model(x, box=NO_BOX)
    assert norm.num_batches_tracked == 2
    expected = before
    for pixels in (tersor.resize_align_corners(x, 48), x):
        expected = 0.9 * expected + 0.1 * model.patch_embed.conv1(pixels).mean((0, 2, 3))
    assert error(norm.running_mean, expected) < 1e-5


def test_drawn_boxes() -> None:
    torch.manual_seed(0)
    boxes = [draw_box(7) for _ in range(200)]
    assert all(0 <= top <= bottom <= 7 and 0 <= left <= right <= 7 for top, left, bottom, right in boxes)
    shares = torch.tensor([(bottom - top) * (right - left) / 49 for top, left, bottom, right in boxes])
    assert 0.1 < shares.mean() < 0.5
    model, x = small(), images(2, 96)
    assert len({model(x)[0][2] for _ in range(10)}) > 1
    model.mix_token = False
    assert {model(x)[0][2] for _ in range(3)} == {NO_BOX}
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert draw_box(14, generators[0]) == draw_box(14, generators[1])
