"""Small models, recipes and a training loop that one process and several run alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import compress
from tersor.compress import Binarize, FakeQuantize, Freeze, NMSparse
from tersor.models.deit import DeiT

STEPS, BATCH = 6, 8


def _freeze(granularity: str) -> list[Any]:
    """Everything is frozen by the last step of the schedule; layers are left out as a whole from then on."""
    options: Any = {"warmup": 0.2, "granularity": granularity, "tile": (4, 4), "momentum": 0.5, "every": 2}
    return [FakeQuantize(3, method="lts"), Freeze(**options)]


RECIPES: dict[str, list[Any]] = {
    "lsq": [FakeQuantize(4)],
    "ddtb": [FakeQuantize(4, method="ddtb")],
    "lts": [FakeQuantize(4, method="lts")],
    "lbc": [NMSparse(2, 4)],
    "srste": [NMSparse(2, 4, method="srste")],
    "lsq and srste": [FakeQuantize(4), NMSparse(2, 4, method="srste")],
    **{f"freeze by {each}": _freeze(each) for each in ("element", "tile", "channel", "layer")},
    "all": [*_freeze("tile"), NMSparse(2, 4)],
    "recu": [Binarize("recu")],
    "reste": [Binarize("reste")],
}
TRANSFORMER = ("lsq", "lts", "lbc", "srste", "freeze by tile", "freeze by layer", "all", "reste")
CASES = [*(("convolutions", recipe) for recipe in RECIPES), *(("transformer", recipe) for recipe in TRANSFORMER)]
HALF = ("lsq", "srste", "all", "recu", "reste")


class Convolutions(nn.Module):
    """Without BatchNorm, whose statistics would be a process's own; of odd sizes, which do not halve."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1))
        self.second = nn.Sequential(nn.GroupNorm(2, 12), nn.ReLU(), nn.Conv2d(12, 7, 3, padding=1))
        self.widen = nn.Conv2d(7, 4, 1)
        self.gate = nn.Conv2d(4, 1, 1, bias=False)  # one output, one group: nothing is left for a second process
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.widen(self.second(self.first(self.stem(images))))
        return self.head((maps * self.gate(maps).sigmoid()).mean((2, 3)))

    def parts(self) -> list[nn.Module]:
        """What FSDP2 puts together at a time."""
        return [self.first, self.second]


class Transformer(DeiT):
    def __init__(self) -> None:
        super().__init__(image_size=8, patch_size=4, dim=16, depth=2, num_heads=2, num_classes=5)

    def parts(self) -> list[nn.Module]:
        return [*self.blocks]


def prepared(model: str, recipe: str, dtype: torch.dtype = torch.float64) -> Any:
    """Ready to train; the same on every call."""
    made = prepared_without_calibration(model, recipe, dtype)
    compress.calibrate_(made, data(0, dtype)[0])
    return made


def prepared_without_calibration(model: str, recipe: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    made = Convolutions() if model == "convolutions" else Transformer()
    transforms = RECIPES[recipe]
    exclude = "widen" if any(isinstance(each, NMSparse) for each in transforms) else ()
    rule = compress.Rule(*transforms, exclude=exclude)
    return compress.prepare_(made.to(dtype), compress.Recipe(rule), steps=STEPS)


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(5, (BATCH,), generator=generator)


def optimizer_of(model: nn.Module, kind: str = "SGD") -> torch.optim.Optimizer:
    groups = compress.parameter_groups(model, weight_decay=1e-3)
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01)


def train(
    model: nn.Module, optimizer: Any, rank: int = 0, world: int = 1, steps: Any = range(STEPS + 3)
) -> list[float]:
    """Losses of this process's share of every batch; one evaluation comes at the worst place, before the step."""
    losses = []
    model.train()
    for step in steps:
        images, labels = (each.chunk(world)[rank] for each in data(step, next(model.parameters()).dtype))
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 3:
            model.eval()
            with torch.no_grad():
                model(images)
            model.train()
        compress.step(model)
    return losses
