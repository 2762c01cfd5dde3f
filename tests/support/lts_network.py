"""A small network that freezes its weights, and its training, for the tests of the layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.freezing import FreezeSchedule, FrozenSGD, LtsConv2d, LtsLinear, frozen_weights, initialize_

SCHEDULE = FreezeSchedule(2, 7, 1, momentum=0.9)  # the first weight freezes in step 3, the third of the second epoch
BOUNDS = (".lower", ".upper")


def network(bits: int = 2, schedule: FreezeSchedule | None = SCHEDULE, **options: Any) -> nn.Sequential:
    """For ``(N, 3, 5, 5)`` images and 4 classes."""
    torch.manual_seed(0)
    options |= {"bits": bits, "schedule": schedule}
    return nn.Sequential(
        LtsConv2d(3, 8, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        LtsConv2d(8, 8, 3, stride=2, padding=1, groups=2, **options),
        nn.ReLU(),
        nn.Flatten(),
        LtsLinear(8 * 9, 4, **options),
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 6, 3, 5, 5, generator=generator)
    return list(zip(images, torch.randint(0, 4, (count, 6), generator=generator), strict=True))


def optimizers(model: nn.Module, frozen: bool = False) -> list[torch.optim.Optimizer]:
    """SGD for the weights, with powers of two, of which a product is exact in any order; Adam for the bounds."""
    named = dict(model.named_parameters())
    others = [p for name, p in named.items() if not name.endswith(BOUNDS)]
    kind, options = (FrozenSGD, {"masks": frozen_weights(model)}) if frozen else (torch.optim.SGD, {})
    sgd = kind(others, lr=2**-5, momentum=0.5, weight_decay=2**-10, **options)
    return [sgd, torch.optim.Adam([p for name, p in named.items() if name.endswith(BOUNDS)], 1e-3)]


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    model.zero_grad()
    F.cross_entropy(output, batch[1]).backward()
    for optimizer in optimizers:
        optimizer.step()
    return output.detach()


def trained(steps: int, **options: Any) -> nn.Sequential:
    model = network(**options)
    initialize_(model, batches(1)[0][0])
    chosen = optimizers(model, frozen=options.get("saved") is False)
    for batch in batches(steps):
        step(model, chosen, batch)
    return model


def lts_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (LtsConv2d, LtsLinear))]


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
