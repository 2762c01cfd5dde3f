"""Packed layers compute what the trained ones did, from what their state dict holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_problem import packed_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.models.deit import deit_tiny_nm
from tersor.models.resnet import resnet18_nm, resnet50_nm
from tersor.sparsity import (
    NMConv2d,
    NMLinear,
    NMSchedule,
    PackedNMConv2d,
    PackedNMLinear,
    SrSte,
    convert_,
    unpack_semi_structured,
)


def finished(layer: Any) -> Any:
    """With one combination left per group, chosen at random."""
    with torch.no_grad():
        for module in layer.modules():
            if isinstance(module, (NMLinear, NMConv2d)):
                module.alpha.copy_(torch.rand_like(module.alpha) + 0.1)
    NMSchedule(layer, 1).finish()
    return layer


def close(packed: nn.Module, trained: nn.Module, input: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(packed(input), trained(input), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (1, 16), (3, 5)], ids=str)
def test_layers(pattern: tuple[int, int]) -> None:
    n, m = pattern
    linear, input = finished(NMLinear(3 * m, 7, n=n, m=m)), torch.randn(2, 5, 3 * m)
    close(PackedNMLinear(linear), linear, input)
    torch.testing.assert_close(
        PackedNMLinear(linear, activation="relu")(input), torch.relu(linear(input)), rtol=1e-4, atol=1e-5
    )
    window = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "bias": False}
    conv, image = finished(NMConv2d(4 * m, 6, 3, **window, n=n, m=m)), torch.randn(2, 4 * m, 11, 9)
    packed = PackedNMConv2d(conv)
    close(packed, conv, image)
    with torch.no_grad():
        assert torch.equal(packed.dense_weight(), conv.sparse_weight())
    same = finished(NMConv2d(m, 3, 3, padding="same", n=n, m=m))
    close(PackedNMConv2d(same), same, image[:, :m])


def test_conversion() -> None:
    """Packed where that can be, dense with the zeros where not, and everything else as it was."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        NMConv2d(8, 8, 3, padding=1, n=2, m=4),
        NMConv2d(8, 6, 3, n=2, m=16),  # groups straddle kernel positions
        NMConv2d(6, 8, 3, padding=1, padding_mode="circular", n=1, m=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        NMLinear(8, 9, n=1, m=4),
        NMLinear(9, 4, n=2, m=4),  # rows too
        nn.Linear(4, 4),
        nn.Linear(4, 2),
    )
    parametrize.register_parametrization(model[8], "weight", SrSte(1, 2))
    finished(model)
    input = torch.randn(2, 3, 12, 12)
    expected = model(input)
    assert convert_(model) is model
    kinds = [type(layer) for layer in model]
    packed, dense = PackedNMConv2d, nn.Conv2d
    assert kinds[:4] == [dense, packed, dense, dense]
    assert kinds[6:] == [PackedNMLinear, nn.Linear, PackedNMLinear, nn.Linear]
    torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-5)
    assert not any(parametrize.is_parametrized(layer) for layer in model)


@pytest.mark.parametrize("make", [lambda: resnet18_nm(n=2, m=4, num_classes=5), lambda: deit_tiny_nm(num_classes=5)])
def test_models(make: Any) -> None:
    torch.manual_seed(1)
    model = finished(make()).eval()
    input = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(input)
        found = convert_(model)(input)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert any(isinstance(m, (PackedNMLinear, PackedNMConv2d)) for m in model.modules())


def spread_statistics(model: nn.Module) -> None:
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)


@pytest.mark.parametrize("make", [lambda: resnet18_nm(n=2, m=4, num_classes=5), lambda: resnet50_nm(1, 4, 5)])
def test_folded_norms(make: Any) -> None:
    """No norm is left but the stem's, and no ReLU is lost or done where it was not."""
    torch.manual_seed(1)
    model = finished(make()).eval()
    spread_statistics(model)
    input = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = model(input)
        found = convert_(model, fold_norms=True)(input)
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 1e-4
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 1
    packed = [m for m in model.modules() if isinstance(m, PackedNMConv2d)]
    assert {"relu", "none"} == {m.activation for m in packed}
    again = convert_(finished(make()), fold_norms=True).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(input), found)


def test_folding_in_a_sequence() -> None:
    model = nn.Sequential(
        NMConv2d(4, 8, 3, n=2, m=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        NMConv2d(8, 8, 1, bias=False, n=1, m=4),
        nn.BatchNorm2d(8, affine=False),
        NMConv2d(8, 8, 1, n=2, m=4),
        nn.ReLU(),
        NMConv2d(8, 4, 1, n=2, m=4),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    finished(model).eval()
    spread_statistics(nn.ModuleList([model[1], model[4]]))
    input = torch.randn(2, 4, 6, 6)
    expected = model(input)
    convert_(model, fold_norms=True)
    torch.testing.assert_close(model(input), expected, rtol=1e-4, atol=1e-5)
    kinds = [type(layer) for layer in model]
    packed, gone = PackedNMConv2d, nn.Identity
    assert kinds == [packed, gone, gone, packed, gone, packed, nn.ReLU, packed, nn.BatchNorm2d]
    with pytest.raises(ValueError, match="norm must have 8 channels and running statistics, got 4"):
        model[0].fold_(nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="must have no activation yet, got 'relu'"):
        model[0].fold_(nn.BatchNorm2d(8))


def test_state_dict_is_all_there_is() -> None:
    trained, other = (finished(NMLinear(32, 12, n=2, m=8)) for _ in range(2))
    first, second = PackedNMLinear(trained), PackedNMLinear(other)
    assert {name: t.dtype for name, t in first.state_dict().items()} == {
        "values": torch.float32,
        "index": torch.uint8,
        "bias": torch.float32,
    }
    second.load_state_dict(first.state_dict())
    close(second, trained, torch.randn(3, 32))
    half = PackedNMLinear(trained).bfloat16()
    assert half.index.dtype == torch.uint8
    output = half(torch.randn(3, 32).bfloat16())
    assert output.dtype == torch.bfloat16


def test_damaged_state_is_refused() -> None:
    layer = PackedNMLinear(finished(NMLinear(32, 12, n=2, m=8)))
    state = layer.state_dict()
    state["index"] = torch.full_like(state["index"], 0b111)
    with pytest.raises(RuntimeError, match="index: 48 groups do not have 2 places below 8"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_semi_structured(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight.copy_(packed_weight((32, 64), *pattern)[0])
    packed = PackedNMLinear(layer.to(dtype), *pattern)
    theirs = packed.to_torch_semi_structured()
    assert isinstance(theirs, torch.sparse.SparseSemiStructuredTensorCUTLASS)
    assert (theirs.shape, theirs.dtype) == ((32, 64), dtype)
    assert torch.equal(unpack_semi_structured(theirs.packed, theirs.meta), layer.weight)


def test_bad_layers() -> None:
    linear = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="n and m must be given for a Linear"):
        PackedNMLinear(linear)
    with pytest.raises(ValueError, match="at most 2 of every 4"):
        PackedNMLinear(linear, 2, 4)
    with pytest.raises(TypeError, match=r"layer must be a torch\.nn\.Conv2d, got Linear"):
        PackedNMConv2d(linear, 2, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding_mode 'reflect'"):
        PackedNMConv2d(finished(NMConv2d(4, 4, 3, padding=1, padding_mode="reflect")))
    with pytest.raises(ValueError, match="activation must be one of"):
        PackedNMLinear(finished(NMLinear(8, 4)), activation="tanh")
    with pytest.raises(ValueError, match=r"PackedNMConv2d: layer must pad as much on either side"):
        PackedNMConv2d(finished(NMConv2d(4, 4, 2, padding="same")))
    with pytest.raises(ValueError, match="pattern must be 2:4, or 1:m"):
        PackedNMLinear(finished(NMLinear(16, 4, n=2, m=8))).to_torch_semi_structured()
    with pytest.raises(TypeError, match="float16 or bfloat16"):
        PackedNMLinear(finished(NMLinear(64, 32))).to_torch_semi_structured()


def test_bad_conversions() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        convert_(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold an N:M layer, got Linear without one"):
        convert_(nn.Linear(4, 4))
    model = nn.Sequential(finished(NMLinear(8, 4)), NMLinear(4, 4))
    with pytest.raises(ValueError, match="convert_: 1: nm_pack: at most 2 of every 4"):
        convert_(model)  # whose second layer still has all its combinations
    assert isinstance(model[0], NMLinear)
