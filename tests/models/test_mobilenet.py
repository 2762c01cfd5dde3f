"""MobileNets: size, keys, forward pass as written out, training of the quantised ones, full-precision checkpoints."""

import functools

import pytest
import torch
import torch.nn.functional as F
from classification import check_by_position, check_training, images, layer_keys, macs, norm_keys, published
from torch import nn

from tersor.freezing import FreezeSchedule, LtsConv2d, LtsLinear, authors_state_dict
from tersor.models import MobileNet, mobilenet_v1, mobilenet_v1_quant, mobilenet_v2, mobilenet_v2_quant

# (output channels, layers, stride, expansion), as in the papers
V1 = ((64, 1, 1, 0), (128, 2, 2, 0), (256, 2, 2, 0), (512, 6, 2, 0), (1024, 2, 2, 0))
V2 = ((16, 1, 1, 1), (24, 2, 2, 6), (32, 3, 2, 6), (64, 4, 2, 6), (96, 3, 1, 6), (160, 3, 2, 6), (320, 1, 1, 6))


@pytest.mark.parametrize(
    ("build", "keys", "parameters", "giga"),
    [(mobilenet_v1_quant, 416, 4_232_088, 0.569), (mobilenet_v2_quant, 791, 3_505_084, 0.301)],
)
def test_size_is_the_published_one(build, keys, parameters, giga):
    assert published(build) == (keys, parameters)
    assert round(macs(build, 224) / 1e9, 3) == giga


def expected_keys(version, quantized):
    keys = layer_keys("head.0", quantized) + norm_keys("head.1")
    for i, (_, layers, _, expansion) in enumerate((V1, V2)[version - 1]):
        for j in range(layers):
            for k in range(3 if expansion > 1 else 2):
                name = f"stage_{i}_layer_{j}.body"
                keys += layer_keys(f"{name}.{3 * k}", quantized) + norm_keys(f"{name}.{3 * k + 1}")
    if version == 2:
        keys += layer_keys("tail.0", quantized) + norm_keys("tail.1")
    return keys + layer_keys(("classifier", "classifier.0")[version - 1], quantized, bias=True)


@pytest.mark.parametrize(("build", "version"), [(mobilenet_v1_quant, 1), (mobilenet_v2_quant, 2)])
def test_published_keys(build, version):
    with torch.device("meta"):
        model = build()
    assert list(authors_state_dict(model)) == expected_keys(version, True)
    quantized = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(isinstance(m, (LtsConv2d, LtsLinear)) for m in quantized), "the first and the last layer too"


def test_full_precision_has_the_same_keys_without_the_quantisers():
    for build, version in ((mobilenet_v1, 1), (mobilenet_v2, 2)):
        with torch.device("meta"):
            assert list(build().state_dict()) == expected_keys(version, False)


def formula(state, input, version):
    """The forward pass in evaluation, from the state dict alone."""

    def unit(name, k, x, stride=1, depthwise=False):
        weight, norm = state[f"{name}.{k}.weight"], f"{name}.{k + 1}"
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=len(weight) if depthwise else 1)
        statistics, affine = ([state[f"{norm}.{key}"] for key in pair] for pair in (KEYS[2:], KEYS[:2]))
        return F.batch_norm(x, *statistics, *affine)

    KEYS = ("weight", "bias", "running_mean", "running_var")
    x = torch.relu(unit("head", 0, input, 2))
    for i, (_, layers, stride, expansion) in enumerate((V1, V2)[version - 1]):
        for j in range(layers):
            name, y = f"stage_{i}_layer_{j}.body", x
            if expansion > 1:
                y = torch.relu(unit(name, 0, y))
            y = torch.relu(unit(name, 3 if expansion > 1 else 0, y, stride if j == 0 else 1, depthwise=True))
            y = unit(name, 6 if expansion > 1 else 3, y)
            x = torch.relu(y) if version == 1 else (x + y if j > 0 else y)
    if version == 2:
        x = torch.relu(unit("tail", 0, x))
    last = ("classifier", "classifier.0")[version - 1]
    return F.linear(x.mean((2, 3)), state[f"{last}.weight"], state[f"{last}.bias"])


@pytest.mark.parametrize("version", [1, 2])
def test_forward_is_as_written_out(version):
    torch.manual_seed(0)
    model = MobileNet(version, 5, 0.25).double().eval()
    with torch.no_grad():
        for name, value in model.named_buffers():
            if not name.endswith("num_batches_tracked"):
                value.copy_(torch.rand_like(value) + 0.5)
        x = images(2, 70, torch.float64)
        torch.testing.assert_close(model(x), formula(model.state_dict(), x, version), rtol=1e-9, atol=1e-9)


def test_width():
    with torch.device("meta"):
        small, large = mobilenet_v2(width=0.35), mobilenet_v2(width=1.4)
    assert (small.head[0].out_channels, small.tail[0].out_channels) == (16, 1280), "16 for 11.2: not below 0.9 of it"
    assert (large.head[0].out_channels, large.tail[0].out_channels) == (48, 1792)
    assert mobilenet_v1(3, 0.25, 1)(torch.randn(2, 1, 5, 9)).shape == (2, 3)


@pytest.mark.parametrize("build", [mobilenet_v1_quant, mobilenet_v2_quant])
def test_training(build):
    torch.manual_seed(0)
    schedule = FreezeSchedule(2, 8, 1, momentum=0.9)
    # Quantised outputs are not scaled back, so that logits are large at first: small steps.
    check_training(build(8, schedule, num_classes=4, width=0.25), schedule, 64, lr=1e-4)


def torchvision_keys():
    """MobileNet v2's there."""
    keys = layer_keys("features.0.0", False) + norm_keys("features.0.1")
    layers = [expansion for _, layers, _, expansion in V2 for _ in range(layers)]
    for i, expansion in enumerate(layers, 1):
        units = 2 if expansion > 1 else 1
        for k in range(units):
            keys += layer_keys(f"features.{i}.conv.{k}.0", False) + norm_keys(f"features.{i}.conv.{k}.1")
        keys += layer_keys(f"features.{i}.conv.{units}", False) + norm_keys(f"features.{i}.conv.{units + 1}")
    keys += layer_keys("features.18.0", False) + norm_keys("features.18.1")
    return keys + layer_keys("classifier.1", False, bias=True)


def test_checkpoint_by_position():
    build = functools.partial(mobilenet_v2_quant, num_classes=3, width=0.25)
    check_by_position(mobilenet_v2(3, 0.25), build, torchvision_keys(), 32)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        MobileNet(3)
    with pytest.raises(ValueError, match="width must be above 0 and below 100, got 0"):
        mobilenet_v1(width=0)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        mobilenet_v2(0)
    with pytest.raises(ValueError, match=r"MobileNet: input must be \(N, 3, H, W\), got shape \(3, 8, 8\)"):
        mobilenet_v1(width=0.25)(torch.zeros(3, 8, 8))
