"""SuperViT: sizes, keys, lengths, the eager way, the training step, token labels, transforms of torch, refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from token_models import block_keys, giga_macs, images, stem_keys
from torch import Tensor
from window_formula import error, randomize

import tersor
from tersor.models import (
    SuperLVViT,
    SuperViT,
    draw_subnetworks,
    eager_tokens,
    load_checkpoint,
    subnetwork_losses,
    super_deit_nano,
    super_deit_small,
    super_lvvit_small,
    token_label_loss,
)
from tersor.models._tokens import NO_BOX, TokenBlock
from tersor.models.super_vit import scaled_box

SMALL: dict[str, Any] = {"sizes": (48, 64, 96), "dim": 12, "depth": 7, "num_heads": 2, "mlp_ratio": 2.0}
SMALL |= {"num_classes": 5}


def small(build: Any = SuperViT, **options: Any) -> Any:
    torch.manual_seed(0)
    return randomize(build(**SMALL | options), 0.15)


BOTH = pytest.mark.parametrize("build", [SuperViT, SuperLVViT])


# Size and keys

GIGA_MACS = {
    128: (0.74, 0.97, 1.44),
    160: (1.16, 1.51, 2.27),
    192: (1.67, 2.19, 3.32),
    224: (2.30, 3.01, 4.60),
}
LENGTHS = {  # after blocks 3, 6 and 9, spec 2.1
    (224, 0.5): (100, 51, 27),
    (224, 0.7): (139, 99, 71),
    (192, 0.5): (74, 38, 20),
    (192, 0.7): (103, 74, 53),
    (160, 0.5): (52, 27, 15),
    (160, 0.7): (72, 52, 38),
    (128, 0.5): (34, 18, 10),
    (128, 0.7): (47, 34, 25),
}


@pytest.mark.parametrize(
    ("build", "parameters", "tensors"), [(super_deit_small, 22_170_088, 155), (super_lvvit_small, 26_271_248, 207)]
)
def test_parameters(build: Any, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors
    labels = build is super_lvvit_small
    layers = ("patch_embed.proj", "norm", "head", *(["aux_head"] if labels else []))
    keys = {"cls_token"} | {f"pos_embed_list.{i}" for i in range(4)} | block_keys(len(model.blocks), not labels)
    keys |= {f"{layer}.{p}" for layer in layers for p in ("weight", "bias")} | (stem_keys() if labels else set())
    assert set(model.state_dict()) == keys
    assert [tuple(p.shape) for p in model.pos_embed_list] == [(1, n, 384) for n in (65, 101, 145, 197)]


@pytest.mark.parametrize("size", GIGA_MACS)
def test_macs_and_lengths(size: int) -> None:
    with torch.device("meta"):
        model, x = super_deit_small().eval(), torch.empty(1, 3, size, size)
    lengths: list[int] = []
    for number in (3, 6, 9):
        model.blocks[number].mlp.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    rates = (0.5, 0.7, 1.0)
    found = [giga_macs(model, x, size, rate) for rate in rates]
    whole = (size // 16) ** 2 + 1
    assert tuple(lengths) == LENGTHS[size, 0.5] + LENGTHS[size, 0.7] + (whole,) * 3
    eager = [giga_macs(eager_tokens.super_vit, model, x, size, rate) for rate in rates]
    assert eager == pytest.approx(GIGA_MACS[size], abs=0.0051)
    for rate, ours, theirs in zip(rates, found, eager, strict=True):  # of the last block the class token alone goes on
        length = LENGTHS[size, rate][2] if rate != 1 else whole
        skipped = (length - 1) * (10 * 384**2 + 2 * length * 384)
        assert ours == pytest.approx(theirs - skipped / 1e9, abs=1e-9)


def test_load_checkpoint() -> None:
    source, target = small().eval(), SuperViT(**SMALL).eval()
    load_checkpoint(target, {"model": source.state_dict(), "epoch": 299})
    assert torch.equal(target(images(2, 64)), source(images(2, 64)))


# The eager way


@BOTH
@pytest.mark.parametrize(("size", "rate"), [(48, 1.0), (96, 1), (64, 0.5), (96, 0.7), (48, 0.99), (64, 0.01)])
def test_is_the_eager_model(build: Any, size: int, rate: float) -> None:
    """In float64: logits, and the gradients of all parameters and of the images, which are resized unless they fit."""
    model = small(build).double().eval()
    x = tersor.resize_align_corners(images(3, 80, dtype=torch.float64), size).requires_grad_()
    gradients = []
    for logits in (model(x, size, rate), eager_tokens.super_vit(model, x, size, rate)):
        weights = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        tensors = [x, *model.parameters()]
        gradients.append([logits, *torch.autograd.grad((logits * weights).sum(), tensors, allow_unused=True)])
    names = ["logits", "images", *(name for name, _ in model.named_parameters())]
    for name, ours, exact in zip(names, *gradients, strict=True):
        assert (ours is None) == (exact is None), name
        assert ours is None or error(ours, exact) < 1e-9, name
    unused = {name for name, gradient in zip(names, gradients[0], strict=True) if gradient is None}
    own = f"pos_embed_list.{model.sizes.index(size)}"
    assert unused == {f"pos_embed_list.{i}" for i in range(3)} - {own}


def test_up_and_down_in_float32() -> None:
    model, x = small().eval(), images(2, 70)
    with torch.no_grad():
        for size in model.sizes:
            assert error(model(x, size, 0.7), eager_tokens.super_vit(model, x, size, 0.7)) < 1e-5
        wide = torch.randn(2, 3, 40, 110)
        assert model(wide, 64).shape == (2, 5)
        assert torch.equal(model(images(2, 64)), model(images(2, 64), 64))
        assert model(images(0, 64), 96, 0.5).shape == (0, 5)


def test_pruning_ranks_the_order_of_the_pruning_before() -> None:
    """Equal tokens have equal scores: the lower place first, in the order that the block before has left."""
    torch.manual_seed(0)
    block = TokenBlock(8, 2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    x[:, 3] = x[:, 1]
    kept = block.pruned(x, 4)
    assert kept.shape == (1, 5, 8)
    whole = block(x)
    rows = [int((whole[0] - row).abs().sum(1).argmin()) for row in kept[0]]
    assert rows[0] == 0
    place = rows.index(1)
    assert torch.equal(kept[0, place], kept[0, place + 1]), "the copy directly behind"


def test_keep_rate_one_does_not_sort() -> None:
    model = small().eval()
    x = images(2, 96)
    exact = [eager_tokens.super_vit(model, x, 96, rate) for rate in (1, 1.0)]
    assert torch.equal(model(x, 96, 1), model(x, 96, 1.0))
    assert error(model(x, 96, 1), exact[0]) < 1e-5


# Training


def test_training_step() -> None:
    """Four losses, the gradients of their sum, and each backward pass before the next forward pass."""
    model, x = small().double(), images(3, 96, dtype=torch.float64)
    target = torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1)
    subnetworks = [(96, 1), (96, 0.5), (64, 1), (64, 0.7)]
    events: list[str] = []
    handle = model.norm.register_forward_hook(lambda *_: events.append("forward"))

    def backward(loss: Tensor) -> None:
        events.append("backward")
        loss.backward()

    result = subnetwork_losses(model, x, target, subnetworks, backward=backward)
    handle.remove()
    assert events == ["forward", "backward"] * 4
    assert result.subnetworks == subnetworks
    a, b, c, d = (model(x, size, rate) for size, rate in subnetworks)

    def ce(logits: Tensor) -> Tensor:
        return -(target * logits.log_softmax(1)).sum(1).mean()

    def kl(teacher: Tensor, logits: Tensor) -> Tensor:
        q, p = teacher.detach().softmax(1), logits.softmax(1)
        return (q * (q / p).log()).sum() / 3

    expected = torch.stack([ce(a), kl(a, b), ce(c), kl(c, d)])
    torch.testing.assert_close(result.losses, expected)
    assert not result.losses.requires_grad
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(expected.sum(), list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None) == (name == "pos_embed_list.0"), name
        assert gradient is None or error(parameter.grad, gradient) < 1e-10, name
    unmoved = [p.grad for p in parameters.values()]
    again = subnetwork_losses(model, x, target, subnetworks, backward=None)
    torch.testing.assert_close(again.losses, result.losses)
    assert all(p.grad is g for p, g in zip(parameters.values(), unmoved, strict=True))


def test_drawn_subnetworks() -> None:
    with torch.device("meta"):
        model = super_deit_small()
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    drawn = [draw_subnetworks(model, generators[0]) for _ in range(100)]
    assert drawn == [draw_subnetworks(model, generators[1]) for _ in range(100)]
    assert {step[0] for step in drawn} == {(224, 1.0)}
    assert {step[1] for step in drawn} == {(224, 0.5), (224, 0.7)}
    assert {step[2] for step in drawn} == {(128, 1.0), (160, 1.0), (192, 1.0)}
    assert {step[3] for step in drawn} == {(size, rate) for size in (128, 160, 192) for rate in (0.5, 0.7)}
    assert all(step[2][0] == step[3][0] for step in drawn)
    assert len({(step[1][1], step[3][1]) for step in drawn}) == 4, "two independent rates"
    result = subnetwork_losses(small(), images(2, 96), torch.tensor([1, 2]), generator=generators[0])
    assert result.subnetworks[0] == (96, 1.0)


def test_scaled_box_rounds_as_published() -> None:
    assert scaled_box((7, 14, 14, 14), 12, 14) == (5, 11, 11, 11)
    assert scaled_box((0, 3, 7, 14), 14, 14) == (0, 3, 7, 14)
    assert scaled_box((1, 2, 9, 13), 8, 14) == (0, 1, 5, 7)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_box_of_everything_flips_the_batch(batch: int) -> None:
    model, x = small(SuperLVViT).double(), images(batch, 96, dtype=torch.float64)
    with torch.no_grad():
        (plain, tokens, _), (mixed, other_tokens, box) = model(x, box=NO_BOX), model(x, box=(0, 0, 6, 6))
        assert box == (0, 0, 6, 6)
        assert error(mixed, plain.flip(0)) < 1e-10
        assert error(other_tokens, tokens) < 1e-10
        plain, mixed = model(x, 48, 1, box=NO_BOX), model(x, 48, 1, box=(0, 0, 6, 6))
        assert isinstance(mixed, Tensor)
        assert error(mixed, plain.flip(0)) < 1e-10
        assert model(x, 96, 0.7).shape == (batch, 5)


def test_training_step_with_token_labels() -> None:
    model, x = small(SuperLVViT).double(), images(3, 96, dtype=torch.float64)
    target = torch.softmax(torch.randn(3, 5, dtype=torch.float64), 1)
    token_target = torch.softmax(torch.randn(3, 36, 5, dtype=torch.float64), 2)
    subnetworks, box = [(96, 1), (96, 0.5), (64, 1), (64, 0.7)], (1, 0, 5, 4)
    result = subnetwork_losses(model, x, target, subnetworks, token_target=token_target, box=box)
    output, b, c, d = (model(x, size, rate, box=box) for size, rate in subnetworks)
    a = output[0].softmax(1)
    mixed = (1 - 16 / 36) * target + 16 / 36 * target.flip(0)
    expected = [
        token_label_loss(output, target, token_target),
        (a * (a / b.softmax(1)).log()).sum() / 3,
        -(mixed * c.log_softmax(1)).sum(1).mean(),
        (a * (a / d.softmax(1)).log()).sum() / 3,  # published: the teacher of b, not c
    ]
    torch.testing.assert_close(result.losses, torch.stack(expected))
    assert error(result.logits[0], output[0]) < 1e-12
    drawn = subnetwork_losses(model, x, torch.tensor([1, 2, 0]), generator=torch.Generator().manual_seed(1))
    again = subnetwork_losses(model, x, torch.tensor([1, 2, 0]), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn.losses, again.losses)


def test_nano_learns_a_batch() -> None:
    torch.manual_seed(0)
    model = super_deit_nano(sizes=(32, 64), in_chans=1, num_classes=4)
    x, target, generator = images(8, 64, 1), torch.arange(8) % 4, torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        subnetwork_losses(model, x, target, generator=generator)
        optimizer.step()
    model.eval()
    for size in (32, 64):
        for rate in (1.0, 0.7, 0.5):
            assert (model(x, size, rate).argmax(1) == target).all()


# torch's own transforms


@pytest.mark.parametrize(("build", "calls"), [(SuperViT, ((1.0, 2), (0.5, 2))), (SuperLVViT, ((0.5, 2),))])
def test_compiles_in_one_graph(build: Any, calls: tuple[tuple[float, int], ...]) -> None:
    """The same compiled model at two rates, of which torch takes the second for a variable."""
    model = small(build, depth=4).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rate, batch in calls:
        gradients = []
        for way in (model, compiled):
            logits = way(images(batch, 96), 64, rate)
            gradients.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.blocks.parameters()))])
        for ours, exact in zip(*gradients, strict=True):
            assert error(ours, exact) < 1e-5


@BOTH
def test_bfloat16_autocast_trains(build: Any) -> None:
    model, x = small(build), images(2, 96)
    subnetworks, target = [(96, 1), (96, 0.7), (64, 1), (64, 0.5)], torch.tensor([1, 2])
    options = {"box": (0, 1, 2, 3)} if build is SuperLVViT else {}
    exact = subnetwork_losses(model, x, target, subnetworks, backward=None, **options).losses
    with torch.autocast("cpu", torch.bfloat16):
        found = subnetwork_losses(model, x, target, subnetworks, **options).losses
    assert found.dtype == torch.float32
    assert error(found, exact) < 0.05
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.bfloat16().eval()(x.bfloat16(), 64, 0.5).dtype == torch.bfloat16


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (48, 70)}, r"SuperViT: sizes must be different multiples of 16, got \(48, 70\)"),
        ({"sizes": (0,)}, r"multiples of 16, got \(0,\)"),
        ({"sizes": ()}, r"multiples of 16, got \(\)"),
        ({"sizes": (48, 48)}, "different multiples of 16"),
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_heads": 5}, r"dim \(12\) must be a positive multiple of num_heads \(5\)"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SuperViT(**SMALL | options)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((images(2, 96), 80), ValueError, r"SuperViT: size must be one of \(48, 64, 96\), got 80"),
        ((images(2, 80),), ValueError, r"square with one of the sizes \(48, 64, 96\) if size is None, got 80 x 80"),
        ((torch.zeros(2, 3, 96, 64),), ValueError, "got 96 x 64"),
        ((images(2, 96, 1), 96), ValueError, r"images must be \(B, 3, H, W\), got shape \(2, 1, 96, 96\)"),
        ((torch.zeros(3, 96, 96), 96), ValueError, r"images must be \(B, 3, H, W\)"),
        ((torch.zeros(2, 3, 96, 96, dtype=torch.uint8), 96), TypeError, r"got torch\.uint8"),
        ((images(2, 96), 96, 0.0), ValueError, "keep_rate must be above 0 and at most 1, got 0.0"),
        ((images(2, 96), 96, 1.1), ValueError, "keep_rate must be above 0 and at most 1, got 1.1"),
        ((images(2, 96), 96, math.nan), ValueError, "keep_rate must be above 0 and at most 1, got nan"),
        ((images(2, 96), 96, True), TypeError, "keep_rate must be a number, got bool"),
        ((images(2, 96), 96, "0.5"), TypeError, "keep_rate must be a number, got str"),
        ((images(2, 96) * math.nan, 96, 0.5), ValueError, "scores must not be NaN"),
    ],
)
def test_refuses_inputs(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        small().eval()(*arguments)


def test_too_few_blocks_to_prune_warn() -> None:
    model, x = small(depth=3).eval(), images(1, 96)
    with pytest.warns(UserWarning, match=r"keep_rate 0\.5 drops no token, as the model has 3 blocks and block 3"):
        pruned = model(x, 96, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(x, 96, 1.0), pruned)


def test_refuses_more() -> None:
    model, x, target = small(), images(2, 96), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="subnetworks must be four pairs of size and keep rate, got 1"):
        subnetwork_losses(model, x, target, [(96, 1.0)])
    with pytest.raises(ValueError, match="token_target and box must be None unless the model is a SuperLVViT"):
        subnetwork_losses(model, x, target, box=(0, 0, 1, 1))
    labelled = small(SuperLVViT)
    with pytest.raises(ValueError, match=r"the first of subnetworks must be \(96, 1\), got \(64, 1\)"):
        subnetwork_losses(labelled, x, target, [(64, 1), (96, 0.5), (64, 1), (64, 0.5)])
    with pytest.raises(ValueError, match="SuperLVViT: box must be from 0 to 6"):
        labelled(x, box=(0, 0, 7, 1))
    with pytest.raises(ValueError, match="box must be None in evaluation"):
        labelled.eval()(x, box=NO_BOX)
