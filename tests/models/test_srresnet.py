"""SRResNet with low-bit blocks: size, keys, the block's formula, the schedule, conversion."""

import pytest
import torch
from super_resolution import (
    ACTIVATION_KEYS,
    NORM_KEYS,
    Formulas,
    check_conversion,
    check_schedule,
    check_teacher_and_student,
    compare,
    images,
    macs,
    prepared,
    size,
)

from tersor.models.srresnet import SRResNet, srresnet, srresnet_tiny


def small(**options):
    torch.manual_seed(0)
    return SRResNet(**{"blocks": 2, "channels": 8} | options)


@pytest.mark.parametrize(
    ("options", "keys", "parameters"),
    [
        ({"scale": 2}, 603, 1_469_010),
        ({"scale": 4}, 605, 1_616_467),
        ({"scale": 4, "quantized": False}, 221, 1_546_771),
    ],
)
def test_size_is_the_published_one(options, keys, parameters):
    assert size(srresnet, **options) == (keys, parameters)


def test_multiply_adds_are_the_published_ones():
    assert macs(srresnet, scale=4) == (2.718, 2.393)


def published_keys(blocks, quantized):
    keys = {"conv_input.weight", "relu.weight", "conv_mid.weight", "conv_output.weight"}
    keys |= {f"upscale.{i}.weight" for i in (0, 2, 3, 5)} | {f"bn_mid.{name}" for name in NORM_KEYS}
    for i in range(blocks):
        keys |= {f"residual.{i}.{layer}.weight" for layer in ("conv1", "conv2", "relu")}
        keys |= {f"residual.{i}.{norm}.{name}" for norm in ("in1", "in2") for name in NORM_KEYS}
        acts = ("act1", "act2") if quantized else ()
        keys |= {f"residual.{i}.{act}.{key}" for act in acts for key in ACTIVATION_KEYS}
    return keys


@pytest.mark.parametrize("quantized", [True, False])
def test_state_dict_has_the_published_keys(quantized):
    assert set(small(scale=4, quantized=quantized).state_dict()) == published_keys(2, quantized)


def test_initial_weights():
    weight = srresnet().conv_input.weight
    assert weight.std().item() == pytest.approx((2 / (81 * 64)) ** 0.5, rel=0.05)


def test_teacher_and_student():
    check_teacher_and_student(small)


def formula(model, bits):
    """The published forward pass of two blocks at scale 4."""
    layers = Formulas(model, bits, "percentile")

    def block(name, x):
        h = layers.norm(f"{name}.in1", layers.conv(f"{name}.conv1", layers.act(f"{name}.act1", x), quantized=True))
        h = layers.act(f"{name}.act2", layers.prelu(f"{name}.relu", h))
        return layers.norm(f"{name}.in2", layers.conv(f"{name}.conv2", h, quantized=True)) + x

    def forward(input):
        first = layers.prelu("relu", layers.conv("conv_input", input))
        x = block("residual.1", block("residual.0", first))
        feature = layers.norm("bn_mid", layers.conv("conv_mid", x)) + first
        x = layers.prelu("upscale.2", torch.pixel_shuffle(layers.conv("upscale.0", feature), 2))
        x = layers.prelu("upscale.5", torch.pixel_shuffle(layers.conv("upscale.3", x), 2))
        return layers.conv("conv_output", x), feature

    return forward


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dynamic", [(), ("residual.0.act1", "residual.1.act2")])
def test_forward_is_the_published_one(bits, dynamic):
    model = prepared(small(scale=4, bits=bits), dynamic)
    compare(model, formula(model, bits))


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("quantized", [True, False])
def test_shapes(scale, quantized):
    sr, feature = small(scale=scale, quantized=quantized)(images(1, 5, 3, torch.float32))
    assert sr.shape == (1, 3, 5 * scale, 3 * scale)
    assert feature.shape == (1, 8, 5, 3)


def test_schedule():
    check_schedule(small())


def test_quantized_pairs():
    model = prepared(small(), ("residual.1.act1",))
    pairs = [(f"residual.{i}.act{j}", f"residual.{i}.conv{j}", False) for i in range(2) for j in (1, 2)]
    assert list(model.quantized_pairs()) == pairs
    assert not list(small(quantized=False).quantized_pairs())
    check_conversion(model)


def test_tiny():
    model = srresnet_tiny(4, bits=3)
    assert (len(model.residual), model.conv_mid.in_channels, model.residual[0].act1.bits) == (4, 16, 3)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="scale must be 2 or 4, got 3"):
        small(scale=3)
    with pytest.raises(ValueError, match=r"SRResNet: input must be \(N, 3, H, W\) .* got shape \(3, 4, 4\)"):
        small()(torch.zeros(3, 4, 4))
