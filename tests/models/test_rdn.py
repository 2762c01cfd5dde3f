"""RDN with low-bit layers: size, keys, the dense block's formula, the schedule, conversion."""

import pytest
import torch
from super_resolution import (
    ACTIVATION_KEYS,
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

from tersor.models.rdn import RDN, rdn_a, rdn_b, rdn_tiny


def small(**options):
    torch.manual_seed(0)
    return RDN(**{"channels": 8, "blocks": 2, "layers": 3, "growth": 4} | options)


@pytest.mark.parametrize(
    ("options", "keys", "parameters"),
    [
        ({"scale": 2}, 2232, 23_684_421),
        ({"scale": 4}, 2234, 23_832_133),
        ({"scale": 4, "quantized": False}, 302, 22_271_107),
    ],
)
def test_size_is_the_published_one(options, keys, parameters):
    assert size(rdn_b, **options) == (keys, parameters)


def test_multiply_adds_are_the_published_ones():
    quantized, full = macs(rdn_b, scale=4)
    assert (round(quantized, 2), full) == (50.52, 1.851)


def published_keys(blocks, layers, quantized):
    convs = ["SFENet1", "SFENet2", "GFF.0", "GFF.1", "UPNet.0", "UPNet.2", "UPNet.4"]
    acts = ["act"]
    for i in range(blocks):
        convs += [f"RDBs.{i}.LFF", *(f"RDBs.{i}.convs.{j}.conv.0" for j in range(layers))]
        acts += [f"RDBs.{i}.act1", f"RDBs.{i}.act2", *(f"RDBs.{i}.convs.{j}.act" for j in range(layers))]
    keys = {f"{conv}.{name}" for conv in convs for name in ("weight", "bias")}
    return keys | ({f"{act}.{key}" for act in acts for key in ACTIVATION_KEYS} if quantized else set())


@pytest.mark.parametrize("quantized", [True, False])
def test_state_dict_has_the_published_keys(quantized):
    assert set(small(scale=4, quantized=quantized).state_dict()) == published_keys(2, 3, quantized)


def test_configurations():
    with torch.device("meta"):
        a = rdn_a()
    assert (len(a.RDBs), len(a.RDBs[0].convs), a.RDBs[0].convs[5].conv[0].out_channels) == (20, 6, 32)
    assert a.act.channels == a.GFF[0].in_channels == 20 * 64
    assert a.act.percentile == a.RDBs[0].act1.percentile == 95
    assert rdn_tiny(percentile=97).act.percentile == 97


def test_teacher_and_student():
    check_teacher_and_student(small)


def formula(model, bits):
    """The published forward pass of two blocks of three layers at scale 2."""
    layers = Formulas(model, bits, "minmax")

    def block(name, x):
        z = o = layers.act(f"{name}.act1", x)
        for i in range(3):
            if i > 0:
                o = layers.act(f"{name}.convs.{i}.act", o)
            new = torch.relu(layers.conv(f"{name}.convs.{i}.conv.0", o, quantized=True))
            o = torch.cat([o, new], 1)
        return layers.conv(f"{name}.LFF", layers.act(f"{name}.act2", o), quantized=True) + z

    def forward(input):
        first = layers.conv("SFENet1", input)
        one = block("RDBs.0", layers.conv("SFENet2", first))
        two = block("RDBs.1", one)
        fused = layers.conv("GFF.0", layers.act("act", torch.cat([one, two], 1)), quantized=True)
        feature = layers.conv("GFF.1", fused, quantized=True) + first
        return layers.conv("UPNet.2", torch.pixel_shuffle(layers.conv("UPNet.0", feature), 2)), feature

    return forward


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dynamic", [(), ("act", "RDBs.0.act1", "RDBs.0.convs.1.act", "RDBs.1.act2")])
def test_forward_is_the_published_one(bits, dynamic):
    model = prepared(small(bits=bits), dynamic)
    compare(model, formula(model, bits))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("quantized", [True, False])
def test_shapes(scale, quantized):
    sr, feature = small(scale=scale, quantized=quantized)(images(1, 5, 3, torch.float32))
    assert sr.shape == (1, 3, 5 * scale, 3 * scale)
    assert feature.shape == (1, 8, 5, 3)


def test_schedule():
    check_schedule(small(), untouched=("RDBs.0.convs.0.act.", "RDBs.1.convs.0.act."))  # published, but never called


def test_quantized_pairs():
    model = prepared(small(), ("RDBs.1.convs.2.act",))
    pairs = [("act", "GFF.0", False)]
    for i in range(2):
        pairs += [(f"RDBs.{i}.act1", f"RDBs.{i}.convs.0.conv.0", False), (f"RDBs.{i}.act2", f"RDBs.{i}.LFF", False)]
        pairs += [(f"RDBs.{i}.convs.{j}.act", f"RDBs.{i}.convs.{j}.conv.0", False) for j in (1, 2)]
    assert sorted(model.quantized_pairs()) == sorted(pairs)
    assert not list(small(quantized=False).quantized_pairs())
    check_conversion(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 8}, ValueError, "scale must be 2, 3 or 4, got 8"),
        ({"config": "C"}, ValueError, "config must be one of A, B, got 'C'"),
        ({"layers": 0}, ValueError, "layers must be at least 1, got 0"),
        ({"growth": 2.5}, TypeError, "growth must be an int, got float"),
        ({"bits": 9}, ValueError, "bits must be 2 to 8, or 32 for none, got 9"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"RDN: input must be \(N, 3, H, W\) .* got shape \(1, 1, 4, 4\)"):
        small()(torch.zeros(1, 1, 4, 4))
