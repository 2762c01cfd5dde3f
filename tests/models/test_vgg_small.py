"""VGG-small: published size and keys, the network against its formula written out, training, packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from binary_models import (
    Formula,
    binary_and_float_macs,
    check_a_step,
    check_graph,
    check_packed,
    compare_with,
    parameters_of,
    published_state,
    spread,
    state_of,
)
from torch import Tensor, nn

from tersor.binary import BinaryConv2d, BinarySchedule, convert_
from tersor.models import VGGSmall, vgg_small_recu, vgg_small_reste

NETWORKS = {vgg_small_recu: ("recu", "vgg_small", 48, 4_661_770), vgg_small_reste: ("reste", "vgg", 38, 4_660_106)}


def named(build: Any) -> str:
    return build.__name__


@pytest.mark.parametrize("build", NETWORKS, ids=named)
def test_size_and_keys_are_the_published_ones(build: Any) -> None:
    system, network, keys, parameters = NETWORKS[build]
    state = state_of(build)
    assert len(state) == keys
    assert parameters_of(build) == parameters
    binary, full = binary_and_float_macs(build, 32)
    assert (round(binary / 1e6), round(full / 1e6, 1)) == (604, 3.6)
    assert list(state.items()) == list(published_state(system, network).items())


def recu(f: Formula, x: Tensor) -> Tensor:
    x = F.hardtanh(f.norm("bn0", f.conv("conv0", x)))
    for i in range(1, 6):
        x = f.recu(f"conv{i}", x)
        x = F.max_pool2d(x, 2) if i in (1, 3, 5) else x
        x = F.hardtanh(f.norm(f"bn{i}", x))
    return F.linear(x.flatten(1), f.state["fc.weight"], f.state["fc.bias"])


def reste(f: Formula, x: Tensor) -> Tensor:
    x = f.norm("bn0", F.relu(f.conv("conv0", x)))
    for i in range(1, 6):
        x = f.norm(f"bn{i}", f.reste(f"conv{i}", x))
        x = F.max_pool2d(x, 2) if i in (1, 3, 5) else x
    return F.linear(x.flatten(1), f.state["fc.weight"], f.state["fc.bias"])


@pytest.mark.parametrize(
    ("build", "formula"), [(vgg_small_recu, recu), (vgg_small_reste, reste)], ids=["recu", "reste"]
)
def test_network_is_as_written_out(build: Any, formula: Any) -> None:
    compare_with(formula, build(5, width=4), 35)


@pytest.mark.parametrize("build", NETWORKS, ids=named)
def test_training(build: Any) -> None:
    model = build(4, width=4)
    BinarySchedule(model, 10).start_epoch(5)
    check_a_step(model, torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize("build", NETWORKS, ids=named)
def test_packed(build: Any) -> None:
    """Bits pass where no pooling comes between; in ReCU's order a pooled convolution keeps its norm."""
    packed = check_packed(build(5, width=8), torch.randn(2, 3, 32, 32), ["conv2", "conv4"])
    folded = [i for i in range(6) if isinstance(getattr(packed, f"bn{i}"), nn.Identity)]
    assert folded == ([2, 4] if build is vgg_small_recu else [1, 2, 3, 4, 5])


@pytest.mark.parametrize("build", NETWORKS, ids=named)
def test_packed_network_is_one_graph_and_halves(build: Any) -> None:
    packed = convert_(spread(build(5, width=4)).eval())
    x = torch.randn(2, 3, 32, 32)
    check_graph(packed, x)
    assert packed.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_other_convolutions() -> None:
    keys = list(state_of(vgg_small_reste))
    for conv in (nn.Conv2d, BinaryConv2d):
        model = vgg_small_recu(4, width=4, conv=conv)
        assert list(model.state_dict()) == keys
        assert all(type(getattr(model, f"conv{i}")) is conv for i in range(1, 6))
        assert type(model.conv0) is nn.Conv2d
        check_a_step(model, torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: VGGSmall(width=0), ValueError, "VGGSmall: width must be at least 1, got 0"),
        (lambda: VGGSmall(width=2)(torch.zeros(1, 3, 31, 32)), ValueError, "VGGSmall: input must be 32 to 39 high"),
        (lambda: VGGSmall(width=2)(torch.zeros(1, 3, 32, 40)), ValueError, r"got shape \(1, 3, 32, 40\)"),
        (lambda: VGGSmall(width=2)(torch.zeros(1, 1, 32, 32)), ValueError, r"input must be \(N, 3, H, W\), got"),
        (lambda: VGGSmall(width=2)(torch.zeros(1, 3, 32, 32).int()), TypeError, r"got torch\.int32"),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
