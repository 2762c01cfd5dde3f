"""ResNets: size, keys, the forward pass as written out, training of the quantised ones, full-precision checkpoints."""

import functools

import pytest
import torch
import torch.nn.functional as F
from classification import (
    check_by_position,
    check_refused,
    check_training,
    images,
    layer_keys,
    macs,
    norm_keys,
    published,
    train,
)
from torch import nn

from tersor.freezing import (
    FreezeSchedule,
    LtsConv2d,
    LtsLinear,
    authors_state_dict,
    frozen_ratio,
    load_authors_state_dict,
)
from tersor.models import (
    ResNet,
    load_by_position,
    resnet18,
    resnet18_quant,
    resnet20,
    resnet20_quant,
    resnet50,
    resnet50_quant,
)
from tersor.models.resnet import BasicBlock, Bottleneck

DEPTHS = {resnet20: (3, 3, 3), resnet18: (2, 2, 2, 2), resnet50: (3, 4, 6, 3)}


@pytest.mark.parametrize(
    ("build", "size", "keys", "parameters", "giga"),
    [
        (resnet20_quant, 32, 326, 278_412, 0.0408),
        (resnet18_quant, 224, 311, 11_689_596, 1.814),
        (resnet50_quant, 224, 806, 25_557_248, 4.089),
    ],
)
def test_size_is_the_published_one(build, size, keys, parameters, giga):
    assert published(build) == (keys, parameters)
    assert round(macs(build, size) / 1e9, 4 if giga < 1 else 3) == giga


def expected_keys(depths, convolutions, shortcut, projects, classifier, quantized):
    keys = layer_keys("conv1", quantized) + norm_keys("bn1")
    for i, depth in enumerate(depths, 1):
        for j in range(depth):
            name = f"layer{i}.{j}"
            for k in range(1, convolutions + 1):
                keys += layer_keys(f"{name}.conv{k}", quantized) + norm_keys(f"{name}.bn{k}")
            if j == 0 and (i > 1 or projects):
                keys += layer_keys(f"{name}.{shortcut}.0", quantized) + norm_keys(f"{name}.{shortcut}.1")
    return keys + layer_keys(classifier, quantized, bias=True)


@pytest.mark.parametrize(
    ("build", "depths", "convolutions", "shortcut", "projects", "classifier"),
    [
        (resnet20_quant, (3, 3, 3), 2, "shortcut", False, "fc"),
        (resnet18_quant, (2, 2, 2, 2), 2, "downsample", False, "linear"),
        (resnet50_quant, (3, 4, 6, 3), 3, "downsample", True, "linear"),
    ],
)
def test_published_keys(build, depths, convolutions, shortcut, projects, classifier):
    with torch.device("meta"):
        model = build()
    keys = expected_keys(depths, convolutions, shortcut, projects, classifier, True)
    assert list(authors_state_dict(model)) == keys
    quantized = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(isinstance(m, (LtsConv2d, LtsLinear)) for m in quantized), "the first and the last layer too"


def torchvision_keys(depths, convolutions):
    return expected_keys(depths, convolutions, "downsample", convolutions == 3, "fc", False)


@pytest.mark.parametrize(("build", "convolutions"), [(resnet18, 2), (resnet50, 3)])
def test_full_precision_has_torchvisions_keys(build, convolutions):
    with torch.device("meta"):
        model = build()
    assert list(model.state_dict()) == torchvision_keys(DEPTHS[build], convolutions)
    assert (model.layer4[0].conv2 if convolutions == 3 else model.layer4[0].conv1).stride == (2, 2)


def formula(state, input, depths, convolutions, stem):
    """The forward pass in evaluation, from the state dict alone."""

    def conv(name, x, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(name, x):
        statistics, affine = ([state[f"{name}.{key}"] for key in pair] for pair in (KEYS[2:], KEYS[:2]))
        return F.batch_norm(x, *statistics, *affine)

    KEYS = ("weight", "bias", "running_mean", "running_var")
    x = torch.relu(norm("bn1", conv("conv1", input, 1 if stem == "cifar" else 2)))
    if stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
    for i, depth in enumerate(depths, 1):
        for j in range(depth):
            name, stride = f"layer{i}.{j}", 2 if i > 1 and j == 0 else 1
            y = x
            for k in range(1, convolutions + 1):
                has_stride = k == (2 if convolutions == 3 else 1)
                y = norm(f"{name}.bn{k}", conv(f"{name}.conv{k}", y, stride if has_stride else 1))
                y = torch.relu(y) if k < convolutions else y
            for shortcut in ("shortcut", "downsample"):
                if f"{name}.{shortcut}.0.weight" in state:
                    x = norm(f"{name}.{shortcut}.1", conv(f"{name}.{shortcut}.0", x, stride))
            x = torch.relu(x + y)
    x = x.mean((2, 3)) if stem == "cifar" else x[:, :, :7, :7].mean((2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("block", "depths", "stem", "size"),
    [
        (BasicBlock, (2, 1, 1), "cifar", 9),
        (BasicBlock, (1, 2, 1, 1), "imagenet", 224),
        (Bottleneck, (1, 1, 1, 1), "imagenet", 250),
    ],
)
def test_forward_is_as_written_out(block, depths, stem, size):
    torch.manual_seed(0)
    model = ResNet(block, depths, 4, 5, stem=stem).double().eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if not name.endswith("num_batches_tracked"):
                value.copy_(torch.rand_like(value) + 0.5)
        x = images(2, size, torch.float64)
        expected = formula(model.state_dict(), x, depths, 2 if block is BasicBlock else 3, stem)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_sizes_of_small_networks():
    assert resnet20(7, width=4, in_chans=1)(torch.randn(2, 1, 12, 10)).shape == (2, 7)
    assert resnet18(7, width=4)(torch.randn(2, 3, 193, 225)).shape == (2, 7)


def test_layers_are_passed_in():
    made = []

    def conv(*args, **kwargs):
        made.append(nn.Conv2d(*args, **kwargs))
        return made[-1]

    model = resnet20(width=4, conv=conv, linear=functools.partial(nn.Linear, bias=False))
    assert made == [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert model.fc.bias is None


def test_training():
    torch.manual_seed(0)
    schedule = FreezeSchedule(2, 6, 1, momentum=0.9)
    check_training(resnet20_quant(4, schedule, num_classes=4, width=4), schedule, 8, lr=0.02)


def test_published_state_dict_resumes():
    schedule = FreezeSchedule(1, 8, 1, momentum=0.5)
    torch.manual_seed(0)
    model, other = (resnet20_quant(2, schedule, num_classes=4, width=4) for _ in range(2))
    assert train(model, 8, 8, lr=0.02)[1][-1] > 0.3
    load_authors_state_dict(other, authors_state_dict(model))
    x = images(2, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))
    assert frozen_ratio(other) == frozen_ratio(model)


def test_checkpoint_by_position():
    build = functools.partial(resnet18_quant, width=4, num_classes=3)
    check_by_position(resnet18(3, width=4), build, torchvision_keys((2, 2, 2, 2), 2), 193)
    build = functools.partial(resnet20_quant, width=4)
    check_by_position(resnet20(width=4), build, [f"module.{key}" for key in resnet20().state_dict()], 8)


def test_checkpoint_that_does_not_fit():
    state = resnet20(width=4).state_dict()
    names = list(state)
    model = resnet20_quant(width=4)
    wrong = {**state, "layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    match = r"has layer1\.0\.conv1\.weight \(4, 4, 1, 1\) where the model has layer1\.0\.conv1\.weight \(4, 4, 3, 3\)"
    check_refused(model, wrong, match)
    check_refused(model, {k: state[k] for k in names[1:]}, r"has bn1\.weight \(4,\) where the model has conv1\.weight")
    check_refused(model, {k: state[k] for k in names[:-1]}, r"nothing where the model goes on with fc\.bias")
    check_refused(model, {**state, "extra": torch.zeros(1)}, "goes on with extra where the model has nothing")
    check_refused(model, {}, r"nothing where the model goes on with conv1\.weight")
    with pytest.raises(TypeError, match="state must be a mapping of names to tensors, got list"):
        load_by_position(model, [torch.zeros(1)])
    with pytest.raises(TypeError, match="got OrderedDict under 'state_dict'"):
        load_by_position(model, {"state_dict": state})


@pytest.mark.parametrize("size", [192, 417])
def test_imagenet_images_of_another_size_are_refused(size):
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"last map is 7 to 13 .* got one that makes it \d+ x \d+"),
    ):
        resnet18(width=4).eval()(torch.empty(1, 3, size, size))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="stem must be one of cifar, imagenet, got 'tiny'"):
        ResNet(BasicBlock, (1,), stem="tiny")
    with pytest.raises(ValueError, match="ResNet: width must be at least 1, got 0"):
        resnet20(width=0)
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for none, got 1"):
        resnet20_quant(1)
    with pytest.raises(ValueError, match=r"ResNet: input must be \(N, 3, H, W\), got shape \(2, 1, 8, 8\)"):
        resnet20(width=4)(torch.zeros(2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"ResNet: input must be float16, .* got torch\.int64"):
        resnet20(width=4)(torch.zeros(2, 3, 8, 8, dtype=torch.int64))
