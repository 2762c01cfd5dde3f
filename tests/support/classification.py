"""What the tests of the classification networks share: sizes, published keys, training, checkpoints by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.freezing import FreezeSchedule, authors_state_dict, frozen_ratio, initialize_
from tersor.models import load_by_position

NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
STATE_KEYS = ("uW", "lW", "uA", "lA", "init", "prev_Qweight", "distance", "unchange_step", "saved_weight")


def images(batch: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def published(build: Callable[..., nn.Module]) -> tuple[int, int]:
    """Numbers of published keys and of parameters."""
    with torch.device("meta"):
        model = build()
    return len(authors_state_dict(model)), sum(p.numel() for p in model.parameters())


def macs(build: Callable[..., nn.Module], size: int) -> int:
    """Multiply-adds of the convolutions and linear layers for one image; computes none of them."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # weight[0]: what one output value sums over

    with torch.device("meta"):
        model = build().eval()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(count)
        with torch.no_grad():
            model(torch.empty(1, 3, size, size))
    return total


def layer_keys(name: str, quantized: bool, bias: bool = False) -> list[str]:
    keys = ["weight", *["bias"] * bias, *(STATE_KEYS if quantized else ())]
    return [f"{name}.{key}" for key in keys]


def norm_keys(name: str) -> list[str]:
    return [f"{name}.{key}" for key in NORM_KEYS]


def train(model: nn.Module, steps: int, size: int, lr: float) -> tuple[list[float], list[float]]:
    """Initialises the bounds and trains; the loss and the share of frozen weights of every step."""
    torch.manual_seed(3)
    input, target = images(8, size), torch.arange(8) % 4
    initialize_(model, input)
    bounds = {name: p for name, p in model.named_parameters() if name.endswith((".lower", ".upper"))}
    others = [p for name, p in model.named_parameters() if name not in bounds]
    optimizers = [torch.optim.SGD(others, lr, momentum=0.9), torch.optim.Adam(bounds.values(), 1e-4)]
    losses, ratios = [], []
    for _ in range(steps):
        loss = F.cross_entropy(model(input), target)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        ratios.append(frozen_ratio(model))
    return losses, ratios


def check_training(model: nn.Module, schedule: FreezeSchedule, size: int, lr: float) -> None:
    """Every parameter learns, steps lower the loss, and weights freeze."""
    losses, ratios = train(model, schedule.total_steps, size, lr)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.isfinite().all(), name
    assert sum(losses[-4:]) / 4 < 0.75 * losses[0]
    assert ratios == sorted(ratios)
    assert ratios[schedule.warmup_steps] == 0 < ratios[-1]


def check_by_position(plain: nn.Module, build: Callable[..., nn.Module], names: Iterable[str], size: int) -> None:
    """A checkpoint under other names loads: with 32 bits the output is the plain network's, with 2 it is not."""
    with torch.no_grad():
        for value in plain.state_dict().values():  # so that no two entries of one shape are alike
            value.copy_(torch.rand_like(value.float()).add(0.5) / max(value[0].numel() if value.dim() > 1 else 1, 1))
    state = dict(zip(names, plain.state_dict().values(), strict=True))
    model = build(bits=32).eval()
    load_by_position(model, state)
    input = images(2, size)
    assert torch.equal(model(input), plain.eval()(input))
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    model = build(bits=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_by_position(model, old)
    kept = ("num_batches_tracked", *(key for key in before if ".quantize_" in key))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.endswith(kept), key
    initialize_(model, input)
    assert not torch.equal(model.eval()(input), plain(input))


def check_refused(model: nn.Module, state: dict[str, Tensor], match: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=match):
        load_by_position(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "nothing is loaded"
