"""EDSR with low-bit blocks: size, keys, the block's formula, the schedule, conversion, and what all networks share."""

import copy

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
from torch import nn

import tersor
from tersor.models._super_resolution import attention_transfer, load_full_precision
from tersor.models.edsr import EDSR, edsr_baseline, edsr_tiny
from tersor.models.srresnet import SRResNet


def small(**options):
    torch.manual_seed(0)
    return EDSR(**{"blocks": 2, "channels": 8} | options)


# Size and keys


@pytest.mark.parametrize(
    ("options", "keys", "parameters"),
    [
        ({"scale": 2}, 844, 1_474_427),
        ({"scale": 4}, 846, 1_622_139),
        ({"scale": 2, "quantized": False}, 76, 1_369_883),
        ({"scale": 4, "quantized": False}, 78, 1_517_595),
    ],
)
def test_size_is_the_published_one(options, keys, parameters):
    assert size(edsr_baseline, **options) == (keys, parameters)


def test_multiply_adds_are_the_published_ones():
    assert macs(edsr_baseline, scale=4) == (2.718, 1.851)
    assert macs(edsr_baseline, scale=4, quantized=False) == (0, 4.569)


def published_keys(blocks, quantized):
    layers = ["sub_mean", "add_mean", "head.0", f"body.{blocks}", "tail.0.0", "tail.0.2", "tail.1"]
    layers += [f"body.{i}.body.{j}" for i in range(blocks) for j in (0, 3 if quantized else 2)]
    keys = {f"{layer}.{name}" for layer in layers for name in ("weight", "bias")}
    if quantized:
        acts = ("quant_act1", "quant_act2", "quant_act3", "body.2")
        keys |= {f"body.{i}.{act}.{key}" for i in range(blocks) for act in acts for key in ACTIVATION_KEYS}
    return keys


@pytest.mark.parametrize("quantized", [True, False])
def test_state_dict_has_the_published_keys(quantized):
    assert set(small(scale=4, quantized=quantized).state_dict()) == published_keys(2, quantized)


def test_the_second_activation_is_registered_twice_and_shared():
    model = copy.deepcopy(small())
    state = model.state_dict()
    assert state["body.1.quant_act2.alpha_upper"].data_ptr() == state["body.1.body.2.alpha_upper"].data_ptr()
    assert len(tersor.BoundsSchedule(model).activations) == 6


def test_loads_a_published_checkpoint_with_scalar_extremes():
    source, target = small(), small(scale=2)
    source.body[0].quant_act1.dynamic = True
    nn.init.constant_(source.body[0].quant_act2.alpha_upper, 3)
    state = source.state_dict()
    state |= {key: torch.tensor(0.5) for key in state if key.endswith(("max_val", "min_val"))}
    target.load_state_dict(state)
    assert target.body[0].quant_act1.dynamic
    assert target.body[0].quant_act2.alpha_upper.item() == 3
    assert target.body[1].quant_act3.max_val.tolist() == [0.5]


# Full precision


def test_teacher_and_student():
    check_teacher_and_student(small)


def test_full_precision_checkpoints_that_do_not_fit_are_refused():
    student, state = small(), small(quantized=False).state_dict()
    before = student.head[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"has not body\.1\.body\.3\.bias"):
        load_full_precision(student, {k: v for k, v in state.items() if k != "body.1.body.2.bias"})
    with pytest.raises(RuntimeError, match="must not have extra"):
        load_full_precision(student, state | {"extra": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"another shape head\.0\.bias \(5,\)"):
        load_full_precision(student, state | {"head.0.bias": torch.ones(5), "head.0.weight": before + 1})
    with pytest.raises(RuntimeError, match="must not have"):
        load_full_precision(student, small().state_dict())
    assert torch.equal(student.head[0].weight, before)
    with pytest.raises(TypeError, match="student must be EDSR, RDN or SRResNet, got Linear"):
        load_full_precision(nn.Linear(1, 1), state)


def test_32_bits_are_full_precision():
    student, teacher = small(bits=32).double(), small(quantized=False).double()
    load_full_precision(student, teacher.state_dict())
    torch.testing.assert_close(student(images())[0], teacher(images())[0], rtol=0, atol=0)
    assert not list(student.quantized_pairs())


# Forward


def formula(model, bits, res_scale):
    """The published forward pass of two blocks at scale 4."""
    layers = Formulas(model, bits, "percentile")

    def block(i, x):
        name = f"body.{i}"
        h = layers.conv(f"{name}.body.0", x, quantized=True)
        h = layers.conv(f"{name}.body.3", layers.act(f"{name}.quant_act2", torch.relu(h)), quantized=True)
        return layers.act(f"{name}.quant_act3", res_scale * h) + layers.act(f"{name}.quant_act1", x)

    def forward(input):
        mean = (255 * torch.tensor([0.4488, 0.4371, 0.4040])).double().view(3, 1, 1)
        head = layers.conv("head.0", input - mean)
        feature = layers.conv("body.2", block(1, block(0, head))) + head
        x = torch.pixel_shuffle(layers.conv("tail.0.0", feature), 2)
        x = torch.pixel_shuffle(layers.conv("tail.0.2", x), 2)
        return layers.conv("tail.1", x) + mean, feature

    return forward


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("res_scale", [1.0, 0.1])
@pytest.mark.parametrize("dynamic", [(), ("body.0.quant_act2", "body.1.quant_act1", "body.1.quant_act3")])
def test_forward_is_the_published_one(bits, res_scale, dynamic):
    model = prepared(small(scale=4, bits=bits, res_scale=res_scale), dynamic)
    compare(model, formula(model, bits, res_scale))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("quantized", [True, False])
def test_shapes(scale, quantized):
    sr, feature = small(scale=scale, quantized=quantized)(images(1, 5, 3, torch.float32))
    assert sr.shape == (1, 3, 5 * scale, 3 * scale)
    assert feature.shape == (1, 8, 5, 3)


def test_the_fused_sum_does_what_the_activations_do(monkeypatch):
    """Of an activation that is configured otherwise the sum is not fused, and its gates and logits are the same."""
    model = prepared(small(), ("body.0.quant_act1", "body.0.quant_act3"))
    calls = []
    fused = tersor.models._super_resolution.fake_quantize_add
    monkeypatch.setattr(
        "tersor.models._super_resolution.fake_quantize_add", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    first, logits = model(images())[0], model.body[0].quant_act3.logits
    assert len(calls) == 2
    for block in model.body[:2]:
        block.quant_act1.tie = "bound"
    torch.testing.assert_close(model(images())[0], first, rtol=0, atol=0)
    torch.testing.assert_close(model.body[0].quant_act3.logits, logits, rtol=0, atol=0)
    assert len(calls) == 2


# Training and deployment


def test_schedule():
    check_schedule(small())


def test_quantized_pairs():
    model = prepared(small(), ("body.0.quant_act2",))
    pairs = [(f"body.{i}.quant_act2", f"body.{i}.body.3", True) for i in range(2)]
    assert list(model.quantized_pairs()) == pairs
    assert not list(small(quantized=False).quantized_pairs())
    check_conversion(model)


def test_transforms_of_torch():
    model = prepared(small(), ("body.0.quant_act1",))
    expected = model(images())
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
        exported = torch.export.export(model, (images(),)).module()(images())
    for result in (compiled, exported):
        for ours, exact in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def test_options_of_the_activations():
    model = edsr_tiny(bits=4, percentile=97, calibrate=True, tie="bound", per_sample=True)
    activation = model.body[3].quant_act2
    assert len(model.body) == 5
    assert (activation.bits, activation.percentile, activation.calibrate) == (4, 97, True)
    assert (activation.tie, activation.per_sample, activation.channels) == ("bound", True, 16)


@pytest.mark.parametrize("build", [EDSR, SRResNet])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 5}, ValueError, r"scale must be .*4, got 5"),
        ({"scale": 2.0}, TypeError, "scale must be an int, got float"),
        ({"blocks": 0}, ValueError, "blocks must be at least 1, got 0"),
        ({"channels": -8}, ValueError, "channels must be at least 1, got -8"),
        ({"bits": 1}, ValueError, "bits must be 2 to 8, or 32 for none, got 1"),
        ({"percentile": 30}, ValueError, "percentile must be from 50 to 100, got 30"),
    ],
)
def test_bad_options_are_refused(build, options, error, message):
    with pytest.raises(error, match=message):
        build(**{"blocks": 1, "channels": 8} | options)


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        (torch.zeros(3, 8, 8), ValueError, r"EDSR: input must be \(N, 3, H, W\)"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"got shape \(1, 4, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"at least one pixel, got shape \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "input must be float16, .* got torch.uint8"),
        ([1], TypeError, "input must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_is_refused(input, error, message):
    with pytest.raises(error, match=message):
        small()(input)


# The feature loss


def test_attention_transfer_is_the_written_formula():
    student, teacher = (torch.randn(3, c, 4, 5, dtype=torch.float64, requires_grad=True) for c in (6, 2))
    maps = []
    for feature in (student, teacher):
        flat = feature.pow(2).mean(1).reshape(3, 20)
        maps.append(flat / flat.pow(2).sum(1, keepdim=True).sqrt())
    expected = ((maps[0] - maps[1]) ** 2).sum() / 60
    torch.testing.assert_close(attention_transfer(student, teacher), expected)
    assert torch.autograd.gradcheck(attention_transfer, (student, teacher))


def test_attention_transfer_ignores_size_and_is_bounded():
    feature = torch.rand(2, 4, 3, 3, dtype=torch.float64)
    assert attention_transfer(feature, 7 * feature) < 1e-30
    first, last = torch.zeros(2, 2, 1, 1, 4, dtype=torch.float64)
    first[..., 0], last[..., 3] = 1, 1
    assert attention_transfer(first, last).item() == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("student", "teacher", "error", "message"),
    [
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 5), ValueError, "teacher_feature must have the shape of"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), ValueError, r"student_feature must be \(N, C, H, W\)"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 0, 4, 4), ValueError, "teacher_feature must be .* not empty"),
        (torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4).double(), TypeError, "must have the dtype"),
        (torch.ones(2, 3, 4, 4).int(), torch.ones(2, 3, 4, 4), TypeError, "student_feature must be float16"),
    ],
)
def test_bad_features_are_refused(student, teacher, error, message):
    with pytest.raises(error, match=message):
        attention_transfer(student, teacher)
