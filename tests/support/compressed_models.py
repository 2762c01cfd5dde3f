"""Small models, and one recipe for each thing that tersor.compress can do to a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tersor import compress
from tersor.compress import Binarize, FakeQuantize, Freeze, NMSparse, Recipe, Rule
from tersor.models.deit import DeiT
from tersor.models.resnet import BasicBlock, ResNet

STEPS = 6
SETTLING = Freeze(warmup=0.0, growth="fixing", rate=0.6, momentum=0.0, tile=(4, 4), quantile=0.5, every=2)
TRANSFORMS: dict[str, tuple[compress.transforms.Transform, ...]] = {
    "lsq": (FakeQuantize(4),),
    "ddtb": (FakeQuantize(4, method="ddtb"),),
    "lts": (FakeQuantize(4, method="lts"),),
    "weight": (FakeQuantize(3, 32),),
    "lbc": (NMSparse(2, 4),),
    "srste": (NMSparse(2, 4, method="srste"),),
    "freeze": (FakeQuantize(3, method="lts"), SETTLING),
    "all": (FakeQuantize(4, method="lts"), NMSparse(2, 4), SETTLING),
    "lsq-srste": (FakeQuantize(4, 8), NMSparse(2, 4, method="srste")),
    "ddtb-lbc": (FakeQuantize(4, method="ddtb"), NMSparse(2, 4)),
    "recu": (Binarize("recu"),),
    "reste": (Binarize("reste"),),
    "ste": (Binarize("ste"),),
}


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def build(kind: str) -> nn.Module:
    """ "resnet" with blocks "layer1", "layer2", or "vit"; 16 x 16 images, 4 classes."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "resnet":
        model = ResNet(BasicBlock, (1, 1), 8, 4, stem="cifar")
    else:
        model = DeiT(image_size=16, patch_size=4, dim=16, depth=1, num_heads=2, num_classes=4)
    for module in model.modules():  # so that no output is all but constant
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.3)
    return model


def prepared(kind: str, transforms: str, steps: int = STEPS) -> nn.Module:
    model = compress.prepare_(build(kind), Recipe(*TRANSFORMS[transforms]), steps)
    compress.calibrate_(model.train(), images(8))
    return model


def trained(kind: str, transforms: str) -> nn.Module:
    """In eval mode, after some steps."""
    return train(prepared(kind, transforms))


def train(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(compress.parameter_groups(model), lr=0.05)
    for seed in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images(8, seed)), torch.arange(8) % 4).backward()
        optimizer.step()
        compress.step(model)
    return model.eval()


class Several(nn.Module):
    """Models side by side, each by its own recipe, so that one compilation does for all."""

    def __init__(self, cases: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({f"{kind}-{transforms}": build(kind) for kind, transforms in cases})
        rules = []
        for kind, transforms in cases:
            ends = ("*.fc", "*.head", f"models.{kind}-{transforms}.conv1", "*.patch_embed.*")
            rules.append(Rule(*TRANSFORMS[transforms], layers=f"models.{kind}-{transforms}.*", exclude=ends))
        compress.prepare_(self, Recipe(*rules, skip_first=False, skip_last=False), STEPS)
        with torch.no_grad():
            compress.calibrate_(self.train(), images(8))

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        return {name: model(input) for name, model in self.models.items()}
