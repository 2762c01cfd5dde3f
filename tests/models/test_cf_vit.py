"""CF-ViT: sizes, keys, the eager way, two-stage inference, the training switch, token labels, transforms, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from token_models import block_keys, giga_macs, images, stem_keys
from window_formula import error, randomize

import tersor
from tersor.models import (
    CFLVViT,
    CFViT,
    cf_deit_nano,
    cf_deit_small,
    cf_lvvit_loss,
    cf_lvvit_small,
    cf_vit_loss,
    eager_tokens,
    load_checkpoint,
)
from tersor.models._tokens import NO_BOX
from tersor.models.cf_vit import laid_out, spread
from tersor.models.layers import DropPath

SMALL: dict[str, Any] = {"grid": 3, "dim": 12, "depth": 5, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5}


def small(build: Any = CFViT, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomize(build(**SMALL | options), 0.15)


BOTH = pytest.mark.parametrize("build", [CFViT, CFLVViT])


# Size and keys


@pytest.mark.parametrize(
    ("build", "grid", "parameters", "published"),
    [
        (cf_deit_small, 7, 23_252_200, (1.10, 4.00)),
        (cf_deit_small, 9, 23_313_640, (1.83, 6.70)),
        (cf_lvvit_small, 7, 27_058_064, (1.57, 6.18)),
        (cf_lvvit_small, 9, 27_119_504, (2.62, 10.3)),
    ],
)
def test_parameters_and_macs(build: Any, grid: int, parameters: int, published: tuple[float, float]) -> None:
    """The published figures are of another count of the same work: 2% is their distance from products alone."""
    with torch.device("meta"):
        model, x = build(grid=grid).eval(), torch.empty(1, 3, 32 * grid, 32 * grid)
    assert sum(p.numel() for p in model.parameters()) == parameters
    coarse = giga_macs(lambda: model.class_logits(model.coarse_pass(model.check_images(x, None)).features))
    eager = giga_macs(eager_tokens.cf_vit, model, x)
    assert (coarse, eager) == pytest.approx(published, rel=0.02)
    count = grid**2
    skipped = 4 * (count - math.ceil(count / 2)) * 384 * (64 * 8 * 8 if build is cf_lvvit_small else 3 * 16 * 16)
    skipped += (count - math.ceil(count / 2)) * 2 * 384**2 * (3 if build is cf_lvvit_small else 4)
    if build is cf_deit_small:
        length, chosen = 1 + count, math.ceil(count / 2)
        skipped += block(length) - last_block(length, 1 + chosen) - 384**2  # the class token's query is made twice
        skipped += block(length + 3 * chosen) - last_block(length + 3 * chosen, 1)
    assert giga_macs(model, x) == pytest.approx(eager - skipped / 1e9, abs=1e-6)


def block(tokens: int) -> int:
    """Multiply-adds of DeiT-S."""
    return 12 * tokens * 384**2 + 2 * tokens**2 * 384


def last_block(tokens: int, used: int) -> int:
    """Keys and values of all tokens, everything else of those that are used."""
    return 2 * tokens * 384**2 + used * (10 * 384**2 + 2 * tokens * 384)


@pytest.mark.parametrize(("grid", "giga"), [(7, (1.0634, 3.7262)), (9, (1.7660, 6.2704))])
def test_macs_of_deit_by_hand(grid: int, giga: tuple[float, float]) -> None:
    count, head = grid**2, 384 * 1000
    chosen = math.ceil(count / 2)
    length = 1 + count + 3 * chosen
    coarse = 11 * block(1 + count) + last_block(1 + count, 1 + chosen) + 384**2 + count * 768 * 384 + head
    fine = 11 * block(length) + last_block(length, 1) + 4 * chosen * 768 * 384 + chosen * 8 * 384**2 + head
    assert (coarse / 1e9, (coarse + fine) / 1e9) == pytest.approx(giga, abs=1e-4)
    with torch.device("meta"):
        model, x = cf_deit_small(grid=grid).eval(), torch.empty(1, 3, 32 * grid, 32 * grid)
    assert giga_macs(model, x) == (coarse + fine) / 1e9


@pytest.mark.parametrize(("build", "depth"), [(cf_deit_small, 12), (cf_lvvit_small, 16)])
def test_state_dict_has_the_published_keys(build: Any, depth: int) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    token_labels = build is cf_lvvit_small
    layers = ["patch_embed.proj", "norm", "head", "reuse_block.0", "reuse_block.1.fc1", "reuse_block.1.fc2"]
    layers += ["aux_head"] if token_labels else []
    keys = {"cls_token", "pos_embed_list.0", "pos_embed_list.1"} | block_keys(depth, not token_labels)
    keys |= {f"{layer}.{p}" for layer in layers for p in ("weight", "bias")}
    assert set(state) == keys | (stem_keys() if token_labels else set())
    assert state["pos_embed_list.1"].shape == (1, 197, 384)
    assert state["reuse_block.1.fc1.weight"].shape == ((1152 if token_labels else 1536), 384)


def test_load_checkpoint() -> None:
    """The published file has lists of figures beside the weights."""
    source, target = small().eval(), CFViT(**SMALL).eval()
    load_checkpoint(target, {"model": source.state_dict(), "flop": [1.1, 4.0], "anytime_classification": []})
    x = images(2, 96)
    assert all(torch.equal(a, b) for a, b in zip(source(x), target(x), strict=True))


def test_initialisation_and_drop_path() -> None:
    torch.manual_seed(0)
    model = CFViT(**SMALL | {"dim": 48, "drop_path": 0.2})
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, torch.nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed_list[1].std().item() == pytest.approx(0.02, rel=0.1)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert not any(torch.equal(*model(images(2, 96))) for _ in range(2))


# The eager way


@BOTH
@pytest.mark.parametrize("selection", [True, False])
@pytest.mark.parametrize(("grid", "alpha"), [(3, 0.5), (2, 1.0), (4, 0.3)])
def test_is_the_eager_model(build: Any, selection: bool, grid: int, alpha: float) -> None:
    """In float64: both logits, and the gradients of all parameters and of the images."""
    model = small(build, grid=grid, alpha=alpha, selection=selection).double().eval()
    x = images(3, 32 * grid, dtype=torch.float64).requires_grad_()
    coarse_images = tersor.resize_align_corners(x.detach(), 16 * grid).requires_grad_()
    weights = torch.randn(2, 3, 5, dtype=torch.float64)
    gradients = []
    for way in (model, lambda x, c: eager_tokens.cf_vit(model, x, c)):
        outputs = torch.stack(way(x, coarse_images))
        tensors = [x, coarse_images, *model.parameters()]
        gradients.append([outputs, *torch.autograd.grad((outputs * weights).sum(), tensors, allow_unused=True)])
    names = ["logits", "images", "coarse images", *(name for name, _ in model.named_parameters())]
    for name, ours, exact in zip(names, *gradients, strict=True):
        assert (ours is None) == (exact is None), name
        assert ours is None or error(ours, exact) < 1e-9, name
    unused = [name for name, gradient in zip(names, gradients[0], strict=True) if gradient is None]
    assert unused == ([] if selection or build is CFLVViT else ["pos_embed_list.1"]), "quirk of the published DeiT"


@pytest.mark.parametrize("grid", [7, 8, 9])
def test_other_grids_in_float32(grid: int) -> None:
    model, x = small(grid=grid).eval(), images(2, 32 * grid)
    with torch.no_grad():
        for ours, exact in zip(model(x), eager_tokens.cf_vit(model.double(), x.double()), strict=True):
            assert error(ours, exact) < 5e-4, "the float64 images are resized with other coordinates"
        coarse = tersor.resize_align_corners(x, 16 * grid)
        exact = eager_tokens.cf_vit(model, x.double(), coarse.double())
        for ours, other in zip(model.float()(x, coarse), exact, strict=True):
            assert error(ours, other) < 1e-5


def test_scores_are_the_average_from_the_fourth_block_on() -> None:
    model, x = small(depth=6).double().eval(), images(2, 48, dtype=torch.float64)
    with torch.no_grad():
        tokens, expected = model.sequence(model.patch_embed(x), model.pos_embed_list[0]), torch.zeros(2, 9)
        for number, block in enumerate(model.blocks):
            tokens, weights = eager_tokens.block(block, tokens)
            if number >= 3:
                expected = 0.99 * expected + 0.01 * weights[:, :, 0, 1:].mean(1)
        coarse = model.coarse_pass(x)
    assert error(coarse.scores / expected.max(), expected / expected.max()) < 1e-6
    assert error(coarse.features, model.norm(tokens)) < 1e-12


def test_spread_and_laid_out() -> None:
    grid = torch.arange(9.0).view(1, 9, 1)
    expected = F.interpolate(grid.view(1, 1, 3, 3), scale_factor=2, mode="nearest").flatten()
    assert torch.equal(spread(grid, 3).flatten(), expected)
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    fine, kept = tersor.resplit_index(order, 0.5)
    tokens = torch.randn(2, fine.shape[1] + kept.shape[1], 3)
    for image, ours in enumerate(laid_out(tokens, order, 0.5)):
        places = {f.item(): tokens[image, row] for row, f in enumerate(fine[image])}
        for row, patch in enumerate(kept[image].tolist()):
            for down, right in itertools.product((0, 1), (0, 1)):
                places[(2 * (patch // 3) + down) * 6 + 2 * (patch % 3) + right] = tokens[image, 20 + row]
        assert torch.equal(ours, torch.stack([places[place] for place in range(36)]))


# Two stages


@BOTH
def test_infer_on_both_sides_of_the_threshold(build: Any) -> None:
    model, x = small(build).eval(), images(5, 96)
    with torch.no_grad():
        coarse, fine = model(x)
    confidence = torch.softmax(coarse, 1).amax(1)
    threshold = confidence.sort().values[2:4].mean().item()
    result = model.infer(x, threshold)
    assert torch.equal(result.unsure, confidence < threshold)
    assert result.unsure.sum() == 3
    assert error(result.confidence, confidence) < 1e-6
    assert error(result.logits[~result.unsure], coarse[~result.unsure]) < 1e-6
    assert error(result.logits[result.unsure], fine[result.unsure]) < 1e-6
    assert error(result.logits, eager_tokens.cf_vit_infer(model, x, threshold)) < 1e-5
    given = model.infer(x, threshold, coarse_images=tersor.resize_align_corners(x, 48))
    assert torch.equal(given.logits, result.logits)
    assert not result.logits.requires_grad


@BOTH
def test_infer_with_none_and_all_unsure(build: Any) -> None:
    model, x = small(build).eval(), images(3, 96)
    with torch.no_grad():
        coarse, fine = model(x)
    none, every = model.infer(x, 0.0), model.infer(x, 1.0)
    assert error(none.logits, coarse) < 1e-6  # the last block runs for other tokens with it
    assert not none.unsure.any()
    assert error(every.logits, fine) < 1e-6
    assert every.unsure.all()


@BOTH
def test_an_empty_batch(build: Any) -> None:
    model = small(build).eval()
    result = model.infer(images(0, 96), 0.5)
    assert [tuple(t.shape) for t in result] == [(0, 5), (0,), (0,)]
    assert [tuple(t.shape) for t in model(images(0, 96))] == [(0, 5)] * 2


@pytest.mark.parametrize(("bucket", "expected"), [(None, 3), (1, 3), (2, 4), (4, 4), (32, 5)])
def test_buckets(bucket: int | None, expected: int) -> None:
    model, x = small().eval(), images(5, 96)
    threshold = model.infer(x, 0.0).confidence.sort().values[2:4].mean().item()
    sizes: list[int] = []
    handle = model.reuse_block.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    result = model.infer(x, threshold, bucket=bucket)
    handle.remove()
    assert sizes == [expected]
    assert result.unsure.sum() == 3
    assert error(result.logits, eager_tokens.cf_vit_infer(model, x, threshold)) < 1e-5


def test_infer_without_selection_uses_all_fine_tokens() -> None:
    model, x = small(selection=False).eval(), images(3, 96)
    with torch.no_grad():
        assert torch.equal(model.infer(x, 1.0).logits, model(x)[1])
        assert error(model(x)[1], eager_tokens.cf_vit_infer(model, x, 1.0)) < 1e-5


def test_only_used_patches_are_embedded_and_read() -> None:
    """What the chosen patches do not cover may be NaN without a trace."""
    model, x = small().eval(), images(2, 96)
    coarse_images = tersor.resize_align_corners(x, 48)
    with torch.no_grad():
        _, fine = model(x, coarse_images)
        order = tersor.rank_tokens(model.coarse_pass(coarse_images).scores)
        index, _ = tersor.resplit_index(order, 0.5)
        chosen = torch.zeros(2, 36, dtype=torch.bool).scatter_(1, index, True)
        mask = chosen.view(2, 1, 6, 6).repeat_interleave(16, 2).repeat_interleave(16, 3)
        assert torch.equal(model(x.where(mask, torch.nan), coarse_images)[1], fine)


# Training


def test_the_switch() -> None:
    model, x = small(), images(2, 96)
    assert model.selection
    model.selection = False
    lengths: list[int] = []
    model.blocks[3].mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    model(x)
    model.selection = True
    model(x)
    assert lengths == [10, 37, 10, 1 + 4 * 5 + 4]
    assert not any("selection" in key for key in model.state_dict())


def test_losses() -> None:
    coarse, fine = torch.randn(2, 4, 5, dtype=torch.float64).requires_grad_().unbind(0)
    target = torch.softmax(torch.randn(4, 5, dtype=torch.float64), 1)
    q, p = fine.softmax(1).detach(), coarse.softmax(1)
    expected = -(target * fine.log_softmax(1)).sum(1).mean() + (q * (q / p).log()).sum() / 4
    loss = cf_vit_loss(coarse, fine, target)
    torch.testing.assert_close(loss, expected)
    for ours, exact in zip(*(torch.autograd.grad(v, (coarse, fine)) for v in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, exact)
    hard = torch.tensor([0, 3, 2, 4])
    torch.testing.assert_close(cf_vit_loss(coarse, fine, hard), cf_vit_loss(coarse, fine, F.one_hot(hard, 5).double()))
    assert cf_vit_loss(coarse.bfloat16(), fine.bfloat16(), target).dtype == torch.float32


def test_nano_learns_a_batch() -> None:
    torch.manual_seed(0)
    model, x, target = cf_deit_nano(grid=2, in_chans=1, depth=4, num_classes=4), images(8, 64, 1), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(40):
        model.selection = step >= 20
        optimizer.zero_grad()
        cf_vit_loss(*model(x), target).backward()
        optimizer.step()
    result = model.eval().infer(x, 0.9)
    assert (result.logits.argmax(1) == target).all()
    assert cf_vit_loss(*model(x), target) < 0.1


# torch's own transforms


@pytest.mark.parametrize(("build", "batches"), [(CFViT, (2, 3)), (CFLVViT, (2,))])
def test_compiles_in_one_graph(build: Any, batches: tuple[int, ...]) -> None:
    """Also with another batch, whose size torch takes for a variable."""
    model = small(build, depth=4).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in batches:
        gradients = []
        for way in (model, compiled):
            outputs = torch.stack(way(images(batch, 96)))
            gradients.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(model.head.parameters()))])
        for ours, exact in zip(*gradients, strict=True):
            assert error(ours, exact) < 1e-5


@BOTH
def test_bfloat16_autocast_trains(build: Any) -> None:
    model, x = small(build), images(2, 96)
    options = {"box": (0, 1, 2, 3)} if build is CFLVViT else {}
    loss = cf_vit_loss if build is CFViT else cf_lvvit_loss
    exact = loss(*model(x, **options), torch.tensor([1, 2]))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*model(x, **options), torch.tensor([1, 2]))
    found.backward()
    assert abs(found - exact) < 0.05 * exact
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    half = model.bfloat16().eval().infer(x.bfloat16(), 1.0)
    assert half.logits.dtype == torch.bfloat16
    assert half.logits.isfinite().all()


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "CFViT: depth must be at least 4 with selection, as the first 3 blocks give no scores, got 3"),
        ({"grid": 0}, "grid and in_chans must be at least 1, got 0 and 3"),
        ({"in_chans": 0}, "grid and in_chans must be at least 1, got 3 and 0"),
        ({"alpha": 0.0}, "alpha must be above 0 and at most 1, got 0.0"),
        ({"alpha": 1.5}, "alpha must be above 0 and at most 1, got 1.5"),
        ({"decay": 2.0}, "decay must be from 0 to 1, got 2.0"),
        ({"num_heads": 5}, r"dim \(12\) must be a positive multiple of num_heads \(5\)"),
        ({"skip_lam": 0.0}, "skip_lam must be above 0, got 0.0"),
        ({"num_classes": 0}, "CFViT: num_classes must be at least 1, got 0"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFViT(**SMALL | options)


def test_few_blocks_run_without_selection() -> None:
    model = small(depth=2, selection=False)
    assert model(images(1, 96))[1].shape == (1, 5)
    with pytest.raises(ValueError, match="depth must be at least 4 with selection"):
        model.selection = True


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (
            torch.zeros(2, 3, 96, 80),
            ValueError,
            r"CFViT: images must be \(B, 3, S, S\) with S = 96, got",
        ),
        (torch.zeros(2, 3, 64, 64), ValueError, "with S = 96, got shape"),
        (torch.zeros(2, 1, 96, 96), ValueError, r"images must be \(B, 3, S, S\)"),
        (torch.zeros(3, 96, 96), ValueError, r"images must be \(B, 3, S, S\)"),
        (torch.zeros(2, 3, 96, 96, dtype=torch.uint8), TypeError, r"images must be float16.*got torch\.uint8"),
        ([1], TypeError, r"images must be a torch\.Tensor, got list"),
    ],
)
def test_refuses_images(bad: Any, kind: type[Exception], message: str) -> None:
    model = small().eval()
    with pytest.raises(kind, match=message):
        model(bad)
    with pytest.raises(kind, match=message):
        model.infer(bad, 0.5)


def test_refuses_more() -> None:
    model, x = small(), images(2, 96)
    with pytest.raises(ValueError, match=r"coarse_images must be \(B, 3, S, S\) with S = 48, got shape"):
        model(x, x)
    with pytest.raises(ValueError, match=r"coarse_images must be as many as images \(2\), got 1"):
        model(x, images(1, 48))
    with pytest.raises(RuntimeError, match=r"infer needs the model in evaluation mode, call model\.eval\(\)"):
        model.infer(x, 0.5)
    model.eval()
    for threshold in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold must be from 0 to 1, got"):
            model.infer(x, threshold)
    with pytest.raises(ValueError, match="multiple must be at least 1, got 0"):
        model.infer(x, 1.0, bucket=0)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        model(x.fill_(math.nan))
    labelled, x = small(CFLVViT), images(2, 96)
    for box in ((0, 0, 4, 1), (2, 0, 1, 1), (0, 0, 1), (-1, 0, 1, 1)):
        with pytest.raises(ValueError, match="CFLVViT: box must be"):
            labelled(x, box=box)
    with pytest.raises(ValueError, match="box must be None in evaluation"):
        labelled.eval()(x, box=NO_BOX)
