"""What a compressed layer computes in training, against plain torch written out here, and how its schedules go."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed import COMPOSITIONS, KINDS, TinyResNet, batch, prepared, train
from torch import Tensor, nn

from tersor import compress
from tersor.compress import FakeQuantize, Freeze, NMSparse
from tersor.compress.layers import CompressedLayer
from tersor.compress.quantizers import InputBounds
from tersor.freezing.freeze_plan import freeze_plan
from tersor.freezing.mask import pack_mask, unpack_mask
from tersor.sparsity import NMConv2d, NMLinear, NMSchedule


def through(value: Tensor, rounded: Tensor) -> Tensor:
    """The second one with the gradient of the first."""
    return value + (rounded - value).detach()


def scaled(value: Tensor, factor: float) -> Tensor:
    """The value with its gradient times a factor."""
    return value * factor + (value * (1 - factor)).detach()


def between(x: Tensor, lower: Tensor, upper: Tensor, bits: int) -> Tensor:
    """DDTB: rounded between two bounds, with a rounded zero point."""
    s = (2**bits - 1) / (upper - lower)
    z = torch.round(s * lower).detach() + 2 ** (bits - 1)
    clipped = torch.maximum(torch.minimum(x, upper), lower)
    return (through(s * clipped - z, torch.round(s * clipped - z)) + z) / s


def plain_input(layer: Any, x: Tensor) -> Tensor:
    if layer.quantize_input is None:
        return x
    bounds, bits = layer.quantize_input, layer.quantize_input.bits
    factor = (x[0].numel() * (2**bits - 1)) ** -0.5
    return between(x, scaled(bounds.lower, factor), scaled(bounds.upper, factor), bits)


def plain_lsq(layer: Any, w: Tensor) -> Tensor:
    bits, scale = layer.quantization.bits, layer.quantize_weight.scale
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = scaled(scale, (w[0].numel() * high) ** -0.5)
    clamped = (w / scale).clamp(low, high)
    return through(clamped, torch.round(clamped)) * scale


def plain_ddtb(layer: Any, w: Tensor) -> Tensor:
    lower, upper = (torch.quantile(w.detach().flatten(), share) for share in (0.01, 0.99))
    return between(w, lower, upper, layer.quantization.bits)


def plain_lts(layer: Any, w: Tensor) -> Tensor:
    quantizer, bits = layer.quantize_weight, layer.quantization.bits
    factor = (w.numel() * (2**bits - 1)) ** -0.5
    lower, upper = scaled(quantizer.lower, factor), scaled(quantizer.upper, factor)
    frozen = unpack_mask(quantizer.frozen, w.shape)
    w = torch.where(frozen, quantizer.saved, w)
    places = ((w - lower) / (upper - lower)).clamp(0, 1)
    levels = through(places, torch.round(places * (2**bits - 1)) / (2**bits - 1))
    return (2 * levels - 1) * (upper - lower) / 2


def groups_of(w: Tensor) -> Tensor:
    """Fours along the input channels."""
    return w.movedim(1, -1).reshape(-1, 4)


def plain_srste(w: Tensor, decay: float) -> Tensor:
    smallest = groups_of(w).abs().argsort(dim=1, stable=True)[:, :2]
    kept = torch.ones_like(groups_of(w)).scatter(1, smallest, 0.0)
    mask = kept.view(w.movedim(1, -1).shape).movedim(-1, 1)
    output = through(w, mask * w)
    output.register_hook(lambda grad: grad + decay * (1 - mask) * w.detach())
    return output


def plain_lbc(layer: Any, w: Tensor) -> Tensor:
    """All pairs of four, in lexicographic order; positions that a score that is not zero keeps."""
    pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    alpha = layer.scores.alpha
    alive = (alpha != 0).double()
    mask = (alive @ pairs.double() > 0).double()
    groups = groups_of(w)
    learned = ((alive * alpha) @ pairs.double()) * groups.detach()  # whose gradient is B W g for each score
    output = mask * groups + learned - learned.detach()
    return output.view(w.movedim(1, -1).shape).movedim(-1, 1)


def plain_weight(layer: Any) -> Tensor:
    w, names = layer.weight, layer.quantization and layer.quantization.method
    sparse = layer.sparsity and layer.sparsity.method
    w = plain_srste(w, layer.sparsity.decay) if sparse == "srste" else w
    if names:
        w = {"lsq": plain_lsq, "ddtb": plain_ddtb, "lts": plain_lts}[names](layer, w)
    return plain_lbc(layer, w) if sparse == "lbc" else w


def plain(layer: Any, x: Tensor) -> Tensor:
    x, w = plain_input(layer, x), plain_weight(layer)
    if isinstance(layer, nn.Linear):
        return F.linear(x, w, layer.bias)
    return F.conv2d(x, w, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def layers_of(kind: str) -> tuple[nn.Module, Tensor]:
    if kind == "linear":
        return nn.Linear(8, 6).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    if kind == "groups":
        return nn.Conv2d(8, 6, 3, 2, (1, 2), groups=2).double(), torch.randn(3, 8, 7, 6, dtype=torch.float64)
    return nn.Conv2d(8, 6, 3, padding=2, dilation=2, bias=False).double(), torch.randn(3, 8, 7, 6, dtype=torch.float64)


WRITTEN = {name: each for name, each in COMPOSITIONS.items() if name not in ("recu", "reste", "ste", "approx")}
WRITTEN = {name: each for name, each in WRITTEN.items() if "5:8" not in name and "lbc, float" not in name}


@pytest.mark.parametrize("kind", ["convolution", "groups", "linear"])
@pytest.mark.parametrize("name", WRITTEN)
def test_output_and_gradients_are_those_written_out(kind: str, name: str) -> None:
    torch.manual_seed(1)
    layer, x = layers_of(kind)
    model: Any = compress.prepare_(layer, WRITTEN[name], steps=12).train()
    compress.calibrate_(model, x)
    for _ in range(5):
        compress.step(model)  # so that some scores are removed and some weights frozen
    if isinstance(model.sparsity, NMSparse) and model.scores is not None:
        assert 0 < int((model.scores.alpha == 0).sum()) < model.scores.alpha.numel()
    if model.freezing is not None:
        assert int(model.quantize_weight.counters[1]) > 0
        with torch.no_grad():
            model.weight += 0.1  # as an optimiser might, which the frozen ones must not show
        model.plan = None
    parameters = dict(model.named_parameters())
    grad = None
    found = []
    for compute in (model, lambda x: plain(model, x)):
        given = x.clone().requires_grad_()
        output = compute(given)
        grad = torch.randn_like(output) if grad is None else grad
        gradients = torch.autograd.grad(output, [given, *parameters.values()], grad)
        found.append([output, *gradients])
    for label, ours, theirs in zip(("output", "input", *parameters), *found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=lambda m, label=label: f"{label}: {m}")


def test_the_bounds_gradients_are_scaled_in_training_only() -> None:
    """By 1 / sqrt(elements per sample times 2^bits - 1)."""
    bounds = InputBounds(3, 99.0).double()
    bounds.set_(torch.tensor([-1.0, 1.5]))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    gradients = []
    for is_training in (True, False):
        bounds.train(is_training)
        gradients.append(torch.autograd.grad(bounds(x).pow(2).sum(), [bounds.lower, bounds.upper]))
    for scaled_one, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled_one, whole / math.sqrt(30 * 7))


def frozen_model(granularity: str, build: Callable[[], nn.Module] = TinyResNet, **options: Any) -> Any:
    freeze = Freeze(**({"warmup": 0.25, "granularity": granularity, "every": 1, "momentum": 0.5} | options))
    return prepared(build, (FakeQuantize(3, method="lts"), freeze), 8)


def lts_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, CompressedLayer)]


@pytest.mark.parametrize("granularity", ["element", "tile", "channel", "layer"])
def test_frozen_weights_keep_their_level_and_get_no_gradient(granularity: str) -> None:
    model = frozen_model(granularity, tile=(4, 4), quantile=0.3)
    for layer in lts_layers(model):
        for bound in (layer.quantize_weight.lower, layer.quantize_weight.upper):
            bound.requires_grad_(False)  # these move all levels
    optimizer = None
    before: list[Any] = [None] * len(lts_layers(model))
    share = []
    for i in range(8):
        _, optimizer = train(model, 1, optimizer, first=i)
        for k, layer in enumerate(lts_layers(model)):
            with torch.no_grad():
                weight = layer.compressed_weight()
            if before[k] is not None:
                mask, values = before[k]
                assert torch.equal(weight[mask], values[mask])
                grad = torch.zeros_like(weight) if layer.weight.grad is None else layer.weight.grad
                assert not grad[mask].any()
                assert grad[~mask].any() or mask.all()
            mask = unpack_mask(layer.quantize_weight.frozen, layer.weight.shape)
            before[k] = mask, weight
            blocks = {"channel": mask.flatten(1), "layer": mask.reshape(1, -1)}.get(granularity)
            assert blocks is None or ((blocks.all(1)) | ~blocks.any(1)).all()
        share.append(compress.report(model).total.frozen)
    assert share[:2] == [0, 0]  # a quarter of eight steps
    assert sorted(share) == share
    assert share[-1] > 0.5
    assert len(set(share)) > 2


def test_what_freezes_when_is_the_published_rule() -> None:
    """d' = (1 - m) |p - y| + m d, 1 / n where the level changed; frozen from step t on where d' <= r(t) / n."""
    steps, bits, momentum = 8, 3, 0.5
    model = frozen_model("element", lambda: nn.Linear(8, 8), momentum=momentum)
    n, quantizer = 2**bits - 1, model.quantize_weight
    distance, level, frozen = torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.bool)
    for t in range(steps):
        with torch.no_grad():
            model.weight += 0.02 * torch.randn(8, 8)
            model(torch.randn(1, 8))  # which must not count
        compress.step(model)
        places = (quantizer.effective(model.weight) - quantizer.lower) / (quantizer.upper - quantizer.lower)
        new = torch.round(places.clamp(0, 1) * n)
        away = (places - new / n).abs()
        distance = torch.where(new != level, 1 / n, (1 - momentum) * away + momentum * distance) if t else away
        distance = torch.where(torch.tensor(t == 1), away, distance) if t == 1 else distance
        level = new
        if t > 2:
            frozen |= distance <= (t - 2) / (steps - 2) / n
        assert torch.equal(unpack_mask(quantizer.frozen, (8, 8)), frozen), t
    assert frozen.sum() > 0


@pytest.mark.parametrize("level", ["rows", "columns", "tiles", "layer", "dense"])
@pytest.mark.parametrize("kind", ["convolution", "linear", "reflect"])
def test_what_a_plan_skips_is_zero_anyway(kind: str, level: str) -> None:
    torch.manual_seed(0)
    layer = {
        "convolution": nn.Conv2d(8, 8, 3, 2, 1),
        "linear": nn.Linear(8, 8),
        "reflect": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    }[kind]
    x = torch.randn(2, 8, 8, 8)
    model: Any = compress.prepare_(layer, (FakeQuantize(3, method="lts"), Freeze()), 8).train()
    compress.calibrate_(model, x)
    mask = torch.zeros(model.weight.shape, dtype=torch.bool)
    if level in ("rows", "layer"):
        mask[2:5] = True
    if level in ("columns", "tiles", "layer"):
        mask[:, 2:7] = True
    mask |= level == "layer"
    model.quantize_weight.frozen.copy_(pack_mask(mask))
    parameters = [model.weight, model.bias]
    expected = torch.autograd.grad(model(x).pow(2).sum(), parameters)
    model.plan = freeze_plan(model.quantize_weight.frozen, model.weight.shape, (2, 2), level=level)
    assert model.plan.level == level
    assert model.skips == (level != "dense")
    given = x.clone().requires_grad_()
    gradients = torch.autograd.grad(model(given).pow(2).sum(), [given, *parameters], allow_unused=True)
    model.plan = None
    theirs = torch.autograd.grad(model(given).pow(2).sum(), given)[0]
    torch.testing.assert_close(gradients[0], theirs, rtol=1e-4, atol=1e-5)
    for ours, dense in zip(gradients[1:], expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(dense) if ours is None else ours, dense, rtol=1e-4, atol=1e-4)
    assert not expected[0][mask].any()


@pytest.mark.parametrize(("n", "m", "power"), [(2, 4, 3), (1, 4, 2), (3, 8, 3)])
def test_scores_are_removed_as_by_the_published_schedule(n: int, m: int, power: int) -> None:
    """A training whose epochs are single steps, with the same gradients."""
    steps, end = 12, 6
    theirs: Any = nn.Sequential(NMConv2d(8, 8, 3, n=n, m=m), nn.Flatten(), NMLinear(8, 8, n=n, m=m))
    ours: Any = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    recipe = compress.Recipe(NMSparse(n, m, end=end / steps, power=power), skip_first=False, skip_last=False)
    compress.prepare_(ours, recipe, steps)
    schedule = NMSchedule(theirs, end, power, freeze=False)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01) for each in (ours, theirs)]
    alive = []
    for i in range(steps):
        schedule.start_epoch(i)
        schedule.step()
        for k in (0, 2):
            assert torch.equal(ours[k].scores.alpha, theirs[k].alpha)
            assert torch.equal(ours[k].compressed_weight(), theirs[k].sparse_weight())
        alive.append(int((ours[0].scores.alpha != 0).sum(1).max()))
        x = torch.randn(4, 8, 3, 3)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            optimizer.step()
        compress.step(ours)
    assert alive[0] == math.comb(m, n)
    assert alive[end:] == [1] * (steps - end)
    assert sorted(alive, reverse=True) == alive


@pytest.mark.parametrize("name", ["lsq", "ddtb+lbc", "lsq+srste", "lts+lbc+freeze", "lbc", "lsq, float input"])
def test_training_under_autocast(name: str) -> None:
    model = prepared(TinyResNet, COMPOSITIONS[name], 4)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch()[0])
            assert output.dtype == torch.bfloat16
            loss = F.cross_entropy(output.float(), batch()[1])
        loss.backward()
        torch.optim.SGD(compress.parameter_groups(model), lr=0.01).step()
        model.zero_grad()
        compress.step(model)
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["lsq", "ddtb", "lts", "lbc", "lsq+srste"])
def test_models_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        layer.weight[0] = 0  # a channel of zeros keeps a step that is no zero in half precision
    model: Any = compress.prepare_(layer, COMPOSITIONS[name], 2).train()
    x = torch.randn(4, 8, dtype=dtype)
    compress.calibrate_(model, x)
    output = model(x)
    assert output.dtype == dtype
    output.float().pow(2).sum().backward()
    assert model.weight.grad.dtype == dtype
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    compress.step(model)


@pytest.mark.parametrize("name", ["lsq+lbc", "ddtb", "lts+freeze"])
def test_memory_formats_and_checkpointing_change_nothing(name: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model: Any = compress.prepare_(nn.Conv2d(8, 8, 3, padding=1), COMPOSITIONS[name], 4).train()
    x = torch.randn(2, 8, 6, 6)
    compress.calibrate_(model, x)
    compress.step(model)
    expected = model(x)
    gradients = torch.autograd.grad(expected.sum(), [*model.parameters()])
    again = checkpoint(model, x, use_reentrant=False)
    assert torch.equal(again, expected)
    for ours, theirs in zip(torch.autograd.grad(again.sum(), [*model.parameters()]), gradients, strict=True):
        assert torch.equal(ours, theirs)
    output = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_says_what_is_done_to_it() -> None:
    model = compress.prepare_(nn.Linear(8, 8), (KINDS["lts"], KINDS["lbc"], KINDS["freeze"]), 4)
    for text in ("in_features=8", "4-bit lts, 4-bit input", "2:4 lbc", "freeze by tile"):
        assert text in repr(model)
