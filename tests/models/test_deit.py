"""DeiT and the N:M variants: sizes, keys, which layers are sparse, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tersor.models import DeiT, deit_small, deit_small_nm, deit_tiny, deit_tiny_nm, resnet18_nm, resnet50_nm
from tersor.sparsity import NMConv2d, NMLinear, NMSchedule


def sparse_weights(model: torch.nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (NMConv2d, NMLinear)))


def test_published_sizes() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in deit_small().parameters()) == 22_050_664
        assert sum(p.numel() for p in deit_tiny().parameters()) == 5_717_416
        assert sparse_weights(deit_small_nm()) == 21_233_664


@pytest.mark.parametrize("pattern", [(2, 4), (1, 16)])
def test_published_share_of_resnet50(pattern: tuple[int, int]) -> None:
    model = resnet50_nm(*pattern)
    assert sparse_weights(model) == 23_445_504
    dense = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("alpha"))
    assert dense == 25_557_032
    scores = sum(p.numel() for name, p in model.named_parameters() if name.endswith("alpha"))
    assert scores == 23_445_504 // pattern[1] * math.comb(*pattern[::-1])


def test_keys() -> None:
    keys = list(resnet18_nm().state_dict())
    block = [k for k in keys if k.startswith("layer2.0.")]
    assert block[:3] == [f"layer2.0.conv1.{name}" for name in ("weight", "alpha", "index_list")]
    assert f"{block[0][:9]}downsample.0.alpha" in block
    assert {"conv1.alpha", "fc.alpha"}.isdisjoint(keys)
    keys = list(deit_tiny_nm(depth=1, image_size=32).state_dict())
    own = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert [k for k in keys if k.endswith("alpha")] == [f"{name}.alpha" for name in own]


def test_a_training_run_ends_with_two_of_four() -> None:
    torch.manual_seed(0)
    model = deit_tiny_nm(image_size=32, depth=2, dim=24, num_heads=3, num_classes=5)
    schedule = NMSchedule(model, final_epoch=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(4):
        schedule.start_epoch(epoch)
        for _ in range(2):
            schedule.step()
            loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.randint(5, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    schedule.finish()
    for layer in schedule.layers:
        kept = (layer.sparse_weight().detach().reshape(-1, 4) != 0).sum(1)
        assert torch.all(kept == 2)
        assert not layer.alpha.requires_grad


def test_the_cached_mask_is_dropped_once_the_scores_change() -> None:
    layer = NMLinear(16, 8)
    layer.remove_(5)
    assert (layer.sparse_weight() != 0).float().mean() == 0.5
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    assert (layer.sparse_weight() != 0).all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        DeiT(image_size=30)
    with pytest.raises(ValueError, match="input must be 32 high and wide, got 16 x 32"):
        deit_tiny(image_size=32, depth=1)(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="m must divide the 15 elements"):
        NMLinear(5, 3)
    with pytest.raises(ValueError, match="model must hold N:M layers"):
        NMSchedule(torch.nn.Linear(4, 4), 3)
    options: dict[str, Any] = {"final_epoch": 0}
    with pytest.raises(ValueError, match="final_epoch must be at least 1"):
        NMSchedule(NMLinear(4, 4), **options)
