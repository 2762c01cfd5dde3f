"""Binary ResNets: published sizes and keys, every network against its formula written out, training, packing."""

from __future__ import annotations

import copy
import functools
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

from tersor.binary import BinaryConv2d, BinarySchedule, ReCUConv2d, ReSTEConv2d, convert_
from tersor.models import (
    resnet18_cifar_recu,
    resnet18_cifar_reste,
    resnet18_recu,
    resnet18_recu_two_stage,
    resnet18_reste,
    resnet20_bireal_reste,
    resnet20_recu,
    resnet20_reste,
    resnet34_recu,
    resnet34_recu_two_stage,
    resnet34_reste,
)
from tersor.models.binary_resnet import BinaryBlock, PaddedShortcut, ShiftedBlock

# Published name, key count, parameters, millions of binary and float multiply-adds, digits of these; spec 3.
PUBLISHED = {
    resnet20_recu: ("recu resnet20", 157, 270_522, 40.1, 0.4, 1),
    resnet18_cifar_recu: ("recu resnet18", 141, 11_005_002, 547, 1.8, 1),
    resnet18_recu: ("recu in resnet18", 159, 11_694_376, 1676, 138, 0),
    resnet34_recu: ("recu in resnet34", 287, 21_806_248, 3526, 138, 0),
    resnet18_recu_two_stage: ("recu 2s resnet18", 218, 11_708_264, 1676, 138, 0),
    resnet34_recu_two_stage: ("recu 2s resnet34", 410, 21_834_984, 3526, 138, 0),
    resnet20_reste: ("reste resnet20", 121, 269_850, 40.1, 0.4, 1),
    resnet20_bireal_reste: ("reste bireal", 121, 269_850, 40.1, 0.4, 1),
    resnet18_cifar_reste: ("reste resnet18", 127, 11_174_986, 547, 8.1, 1),
    resnet18_reste: ("reste in18", 127, 11_690_536, 1676, 138, 0),
    resnet34_reste: ("reste in34", 223, 21_798_696, 3526, 138, 0),
}
CIFAR = [resnet20_recu, resnet18_cifar_recu, resnet20_reste, resnet20_bireal_reste, resnet18_cifar_reste]


def named(build: Any) -> str:
    return build.__name__


def is_cifar(build: Any) -> bool:
    return build in CIFAR


@pytest.mark.parametrize("build", PUBLISHED, ids=named)
def test_size_is_the_published_one(build: Any) -> None:
    _, keys, parameters, binary, full, digits = PUBLISHED[build]
    assert len(state_of(build)) == keys
    assert parameters_of(build) == parameters
    macs = binary_and_float_macs(build, 32 if is_cifar(build) else 224)
    assert round(macs[0] / 1e6, 1 if binary < 100 else 0) == binary
    assert round(macs[1] / 1e6, digits) == full


@pytest.mark.parametrize("build", PUBLISHED, ids=named)
def test_published_keys(build: Any) -> None:
    system, _, network = PUBLISHED[build][0].partition(" ")
    ours, theirs = state_of(build), published_state(system, network)
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize("build", PUBLISHED, ids=named)
def test_stem_classifier_and_shortcuts_are_in_full_precision(build: Any) -> None:
    with torch.device("meta"):
        model = build()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            inside = name.startswith("layer") and "downsample" not in name and "shortcut" not in name
            expected = nn.Conv2d if not inside else ReCUConv2d if "recu" in build.__name__ else ReSTEConv2d
            assert type(module) is expected, name
            assert module.bias is None


def padded(x: Tensor, channels: int) -> Tensor:
    added = (channels - x.shape[1]) // 2
    zeros = x.new_zeros(x.shape[0], added, *x.shape[2:])
    return torch.cat([zeros, x, zeros], 1)


def recu_block(f: Formula, name: str, x: Tensor, stride: int, around_each: bool, shortcut: Any) -> Tensor:
    o = f.norm(f"{name}.bn1", f.recu(f"{name}.conv1", x, stride))
    o = F.hardtanh(o + shortcut if around_each else o)
    return F.hardtanh(f.norm(f"{name}.bn2", f.recu(f"{name}.conv2", o)) + (o if around_each else shortcut))


def reste_block(f: Formula, name: str, x: Tensor, stride: int, around_each: bool, shortcut: Any) -> Tensor:
    o = f.norm(f"{name}.bn1", f.reste(f"{name}.conv1", x, stride))
    o = o + shortcut if around_each else o
    return f.norm(f"{name}.bn2", f.reste(f"{name}.conv2", o)) + (o if around_each else shortcut)


def shortcut_of(f: Formula, name: str, x: Tensor, stride: int, mean: bool) -> Tensor:
    for part in ("shortcut", "downsample"):
        if f"{name}.{part}.0.weight" in f.state:
            return f.norm(f"{name}.{part}.1", f.conv(f"{name}.{part}.0", x, stride))
    if stride == 1:
        return x
    return padded(F.avg_pool2d(x, 2) if mean else x[:, :, ::2, ::2], f.state[f"{name}.conv1.weight"].shape[0])


def two_block(f: Formula, name: str, x: Tensor, stride: int) -> Tensor:
    residual = x
    if stride == 2:
        residual = f.norm(f"{name}.downsample.2", f.conv(f"{name}.downsample.1", F.avg_pool2d(x, 2)))
    y = f.recu(f"{name}.conv", x + f.state[f"{name}.move0.bias"], stride)
    y = f.norm(f"{name}.bn", y) + residual + f.state[f"{name}.move1.bias"]
    return F.prelu(y, f.state[f"{name}.nonlinear.weight"]) + f.state[f"{name}.move2.bias"]


def formula(f: Formula, x: Tensor, build: Any, depths: Any) -> Tensor:
    """The network as the specification has it."""
    recu, two_stage = "recu" in build.__name__, "two_stage" in build.__name__
    stem = ("conv", "bn") if two_stage else ("conv1", "bn1")
    x = f.conv(stem[0], x, 1 if is_cifar(build) else 2)
    x = f.norm(stem[1], x if recu else F.relu(x))
    if recu and not two_stage and build is not resnet18_cifar_recu:
        x = F.hardtanh(x)
    x = x if is_cifar(build) else F.max_pool2d(x, 3, 2, 1)
    around_each = build not in (resnet18_cifar_recu, resnet20_reste, resnet18_cifar_reste)
    for i, depth in enumerate(depths, 1):
        for j in range(depth):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            if two_stage:
                x = two_block(f, name, x, stride)
                continue
            shortcut = shortcut_of(f, name, x, stride, recu)
            x = (recu_block if recu else reste_block)(f, name, x, stride, around_each, shortcut)
    x = x.mean((2, 3)) if is_cifar(build) or two_stage else x[:, :, :7, :7].mean((2, 3))
    x = x if two_stage else f.norm("bn2", x)
    name = "linear" if is_cifar(build) else "fc"
    return F.linear(x, f.state[f"{name}.weight"], f.state[f"{name}.bias"])


SMALL = {build: (3, 3, 3) if "20" in build.__name__ else (2, 2, 2, 2) for build in CIFAR} | {
    resnet18_recu: (2, 2, 2, 2),
    resnet18_reste: (2, 2, 2, 2),
    resnet18_recu_two_stage: (4, 4, 4, 4),
}
SIZE = {
    resnet18_recu: 193,
    resnet18_reste: 200,
    resnet18_recu_two_stage: 64,
    resnet20_reste: 13,
    resnet18_cifar_reste: 9,
}


@pytest.mark.parametrize("build", SMALL, ids=named)
def test_network_is_as_written_out(build: Any) -> None:
    model = build(5, width=4)
    batch = 3 if SIZE.get(build, 0) < 100 else 2
    compare_with(functools.partial(formula, build=build, depths=SMALL[build]), model, SIZE.get(build, 16), batch)


@pytest.mark.parametrize("build", [resnet34_recu, resnet34_reste, resnet34_recu_two_stage], ids=named)
def test_larger_networks_have_more_of_the_same_blocks(build: Any) -> None:
    smaller = {resnet34_recu: resnet18_recu, resnet34_reste: resnet18_reste}.get(build, resnet18_recu_two_stage)
    with torch.device("meta"):
        model, other = build(width=4), smaller(width=4)
    depths = [len(getattr(model, name)) for name in model.stages]
    assert depths == ([6, 8, 12, 6] if build is resnet34_recu_two_stage else [3, 4, 6, 3])
    for name in model.stages:
        assert repr(getattr(model, name)[0]) == repr(getattr(other, name)[0])
        assert {repr(block) for block in getattr(model, name)[1:]} == {repr(getattr(other, name)[1])}
    assert repr(model.bn2 if hasattr(model, "bn2") else None) == repr(other.bn2 if hasattr(other, "bn2") else None)
    assert (model.pool, model.stem_activation, model.activation_first) == (
        other.pool,
        other.stem_activation,
        other.activation_first,
    )


def test_only_recus_networks_for_imagenet_start_with_tiny_norms() -> None:
    for build in PUBLISHED:
        if "34" in build.__name__:
            continue
        model = build(width=4)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        start = 1e-8 if build is resnet18_recu else 1.0
        assert all((m.weight == start).all() and (m.bias == 0).all() for m in norms)
        assert not hasattr(model, "bn2") or (model.bn2.weight == 1).all()
    assert (resnet34_recu(width=4).bn1.weight == 1e-8).all()


@pytest.mark.parametrize("build", [*CIFAR, resnet18_recu_two_stage], ids=named)
def test_training(build: Any) -> None:
    model = build(4, width=4)
    BinarySchedule(model, 10).start_epoch(5)
    check_a_step(model, torch.randn(4, 3, 32 if build is resnet18_recu_two_stage else 8, 32))


@pytest.mark.parametrize("estimator", ["float", "ste", "reste"])
@pytest.mark.parametrize("build", [resnet20_reste, resnet20_bireal_reste, resnet20_recu], ids=named)
def test_the_same_network_with_other_convolutions(build: Any, estimator: str) -> None:
    conv = {
        "float": nn.Conv2d,
        "ste": functools.partial(BinaryConv2d, estimator="ste"),
        "reste": functools.partial(ReSTEConv2d, o=2.0, t=1.2),
    }[estimator]
    model = build(4, width=4, conv=conv)
    inside = [m for name, m in model.named_modules() if name.endswith(("conv1", "conv2")) and name != "conv1"]
    assert len(inside) == 18
    assert all(type(m) is getattr(conv, "func", conv) for m in inside)
    assert type(model.conv1) is nn.Conv2d
    if estimator == "reste":
        assert all(m.weight_estimator.o == 2.0 and m.weight_estimator.t == 1.2 for m in inside)
    expected = [key for key in state_of(build) if not key.endswith(("alpha", "tau"))]
    assert list(model.state_dict()) == expected
    check_a_step(model, torch.randn(4, 3, 8, 8))


def test_memory_format() -> None:
    for build in (resnet20_recu, resnet20_reste):
        model, x = build(4, width=4).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
        for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            norm.running_mean.normal_()  # a mean of whole numbers may meet some of them, and leave 0 +- eps
        maps: list[Tensor] = []
        for block in model.layer2:
            block.register_forward_hook(lambda _, __, output, maps=maps: maps.append(output))
        expected = model(x)
        last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(last, expected, rtol=1e-9, atol=1e-9)
        assert all(m.is_contiguous() for m in maps[:3])
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps[3:])


def test_hardtanh_passes_no_gradient_at_its_bounds() -> None:
    block = BinaryBlock(1, 1).double()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.weight.zero_()
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64).view(1, 1, 1, 7).requires_grad_()
    block.eval()(x).sum().backward()  # hardtanh(hardtanh(x))
    assert x.grad.flatten().tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_autograd_keeps_the_result_of_hardtanh_once() -> None:
    block = BinaryBlock(8, 8, each=False, reshape=PaddedShortcut)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (2, 8, 16, 16):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(torch.randn(2, 8, 16, 16, requires_grad=True))
    # Of each convolution its input and the norm's input; the last result. With torch's hardtanh one more.
    assert len({t.data_ptr() for t in kept}) == 5


PASSES = {
    resnet18_cifar_recu: [f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)],
    resnet20_reste: [f"layer{i}.{j}.conv1" for i in range(1, 4) for j in range(3)],
    resnet18_cifar_reste: [f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)],
}


@pytest.mark.parametrize("build", PUBLISHED, ids=named)
def test_packed(build: Any) -> None:
    model = build(5, width=8) if is_cifar(build) else build(5, width=8, pool="mean")
    packed = check_packed(model, torch.randn(2, 3, 16 if is_cifar(build) else 32, 32), PASSES.get(build, []))
    assert all(isinstance(m, nn.Identity) for name, m in packed.named_modules() if ".bn" in name)
    assert not any(".move" in name or ".nonlinear" in name for name in packed.state_dict())


@pytest.mark.parametrize("relu", [False, True])
def test_training_is_one_graph(relu: bool) -> None:
    conv = ReSTEConv2d if relu else ReCUConv2d
    model = nn.Sequential(*(BinaryBlock(i, 2 * i, i, conv, relu=relu) for i in (1, 2))).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for network in (model, compiled):
        network(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("build", [resnet20_recu, resnet20_reste, resnet18_recu_two_stage], ids=named)
def test_packed_network_is_one_graph(build: Any) -> None:
    model = convert_(spread(build(5, width=4)).eval())
    check_graph(model, torch.randn(2, 3, 32, 32))


def test_packed_network_in_half_precision() -> None:
    for build in (resnet20_reste, resnet18_cifar_recu, resnet18_recu_two_stage):
        model = spread(build(5, width=8)).eval()
        packed, x = convert_(copy.deepcopy(model)).to(torch.bfloat16), torch.randn(2, 3, 32, 32).bfloat16()
        assert packed(x).dtype == torch.bfloat16
        assert packed(x).isfinite().all()


@pytest.mark.parametrize("build", [resnet20_recu, resnet18_recu_two_stage], ids=named)
def test_tau_of_a_checkpoint(build: Any) -> None:
    model = build(5, width=4)
    state = model.state_dict()
    for shape in ((), (1,)):
        given = {key: torch.full(shape, 0.9) if key.endswith("tau") else value for key, value in state.items()}
        model.load_state_dict(given)
        taus = [m.tau for m in model.modules() if isinstance(m, ReCUConv2d)]
        assert all(tau.shape == () and abs(tau.item() - 0.9) < 1e-6 for tau in taus)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: resnet20_recu(width=5), r"PaddedShortcut: after must be before plus an even number.*got 5 and 10"),
        (lambda: PaddedShortcut(8, 4, 2), r"got 8 and 4"),
        (
            lambda: resnet20_recu(width=4)(torch.zeros(2, 3, 10, 8)),
            r"whose maps divide by 2 where a stage begins, got one that makes a map of 5 x 4",
        ),
        (lambda: ShiftedBlock(2, 4, 2)(torch.zeros(1, 2, 4, 5)), r"got one that makes a map of 4 x 5"),
        (lambda: resnet18_recu(width=4).eval()(torch.zeros(1, 3, 64, 64)), r"last map is 7 to 13 .* makes it 2 x 2"),
        (lambda: resnet20_reste(width=0), r"ResNet: width must be at least 1, got 0"),
        (lambda: resnet20_reste(pool="max"), r"ResNet: pool must be one of mean, 7x7 or None, got 'max'"),
        (lambda: resnet20_reste()(torch.zeros(2, 1, 8, 8)), r"input must be \(N, 3, H, W\), got shape \(2, 1, 8, 8\)"),
    ],
)
def test_bad_input_is_refused(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
