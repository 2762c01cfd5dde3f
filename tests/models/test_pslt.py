"""PSLT: size, keys, grids, the convolution block's formula, backbone, folding, transforms of torch, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from window_formula import check_gradients, error, parameters_and_macs, randomize

import tersor
from tersor.models import PSLT, load_checkpoint, pslt_backbone, pslt_base, pslt_large, pslt_tiny
from tersor.models.eager_ladder import EagerLadderBlock
from tersor.models.layers import DropPath
from tersor.models.pslt import Mv2Se, PatchMerging, PSLTBackbone

SMALL = {"embed_dim": 6, "conv_depths": (2,), "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5, "window_size": 4}
SMALL |= {"drop_path": 0.0}


def small(build=PSLT, **options):
    """At 64 x 64 pixels grids of 16, 8 (4 windows) and 4 (1 window)."""
    torch.manual_seed(0)
    return build(**SMALL | {"img_size": 64} | options)


def backbone(**options):
    torch.manual_seed(0)
    sizes = {name: value for name, value in SMALL.items() if name != "num_classes"}
    return PSLTBackbone(**sizes | {"out_indices": (0, 1, 2)} | options)


def images(batch=2, height=64, width=64, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


# Size and keys


@pytest.mark.parametrize(
    ("build", "millions", "giga"), [(pslt_tiny, 4.30, 0.90), (pslt_base, 9.26, 1.97), (pslt_large, 16.10, 3.46)]
)
def test_parameters_and_macs_are_the_published_ones(build, millions, giga):
    found = parameters_and_macs(build, 224)
    assert tuple(round(number, 2) for number in found) == (millions, giga)


def published_state(model):
    """The authors' keys of the published depths, with their buffers: masks where branches are shifted."""
    affine, norm = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"patch_embed.proj.{i}.weight" for i in (0, 3, 6)}
    keys |= {f"patch_embed.proj.{i}.{p}" for i in (2, 5, 8) for p in norm}
    for layer in (f"conv_layers.{i}" for i in range(7)):
        keys |= {f"{layer}.conv.{i}.weight" for i in (0, 3, 6)}
        keys |= {f"{layer}.conv.{i}.{p}" for i in (2, 5, 7) for p in norm}
        keys |= {f"{layer}.se.{fc}.{p}" for fc in ("fc1", "fc2") for p in affine}
    for stage, depth in enumerate((10, 3)):
        for block in (f"layers.{stage}.blocks.{i}" for i in range(depth)):
            keys |= {f"{block}.{layer}.{p}" for layer in ("se.fc1", "se.fc2", "pointconv") for p in affine}
            for index in range(3):
                branch = f"{block}.blocks.{index}"
                layers = ["norm1", "attn.kv" if index else "attn.qkv", "attn.proj", "norm2"]
                layers += [f"mlp.conv.{i}" for i in (0, 3, 6)]
                keys |= {f"{branch}.{layer}.{p}" for layer in layers for p in affine}
                keys |= {f"{branch}.mlp.conv.{i}.{p}" for i in (2, 5, 7) for p in norm}
                keys |= {f"{branch}.attn.relative_position_{p}" for p in ("bias_table", "index")}
    keys |= {f"layers.0.downsample.{p}" for p in ("norm.weight", "norm.bias", "reduction.weight")}
    keys |= {f"{layer}.{p}" for layer in ("norm", "head") for p in affine}
    masks = {f"layers.0.blocks.{n}.blocks.{i}.attn_mask" for n in range(10) for i in (1, 2)}
    return keys, masks


def test_state_dict_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        model = pslt_base()
    state = model.state_dict()
    keys, masks = published_state(model)
    assert set(state) == keys
    assert state["layers.0.blocks.9.blocks.2.attn.kv.weight"].shape == (192, 96)
    assert state["layers.1.blocks.2.blocks.0.attn.qkv.weight"].shape == (576, 192)
    assert state["layers.1.blocks.2.blocks.0.attn.relative_position_bias_table"].shape == (169, 8)
    assert state["layers.0.downsample.reduction.weight"].shape == (576, 1152)
    assert state["conv_layers.0.se.fc1.weight"].shape == (36, 72)
    buffers = {name for name in state if name.endswith("relative_position_index")}
    with_masks = state | {name: torch.empty(4, 49, 49, device="meta") for name in masks}
    model.load_state_dict(with_masks, assign=True)
    model.load_state_dict({name: value for name, value in state.items() if name not in buffers}, assign=True)
    for layer in model.layers[0].blocks[3].blocks:
        assert layer.attn.relative_position_index.device.type == "cpu"


def test_load_checkpoint():
    source, target = small().eval(), small().eval()
    randomize(source)
    load_checkpoint(target, {"model": source.state_dict(), "epoch": 3})
    assert torch.equal(target(images()), source(images()))
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        load_checkpoint(target, {k: v for k, v in source.state_dict().items() if k != "head.bias"})


def test_initialisation():
    torch.manual_seed(0)
    model = small(embed_dim=24)
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    tables = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("bias_table")])
    assert tables.std().item() == pytest.approx(0.02, rel=0.1)


def test_drop_path_rates_rise_in_equal_steps():
    with torch.device("meta"):
        rates = [module.rate for module in pslt_tiny().modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.2 * (i // 3) / 12 for i in range(39)])


def test_only_the_first_ladder_stage_is_shifted():
    with torch.device("meta"):
        model = pslt_tiny()
    shifts = [[branch.attn.shift_size[0] for branch in block.blocks] for s in model.layers for block in s.blocks]
    assert shifts == [[0, 3, -3]] * 10 + [[0, 0, 0]] * 3


# Convolution block and merging


def mv2_formula(block, x):
    def norm(layer, x):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return x * layer.weight[:, None, None] + layer.bias[:, None, None]

    first, _, norm1, second, _, norm2, third, norm3 = block.conv
    y = norm(norm1, F.gelu(torch.einsum("oi,bihw->bohw", first.weight[:, :, 0, 0], x)))
    y = norm(norm2, F.gelu(F.conv2d(y.contiguous(), second.weight, None, second.stride, 1, 1, second.groups)))
    y = norm(norm3, torch.einsum("oi,bihw->bohw", third.weight[:, :, 0, 0], y))
    gate = torch.sigmoid(torch.relu(y.mean((2, 3)) @ block.se.fc1.weight.T + block.se.fc1.bias) @ block.se.fc2.weight.T
                         + block.se.fc2.bias)  # fmt: skip
    y = y * gate[:, :, None, None]
    return x + y if x.shape == y.shape else y


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 1), ((4, 4), 2), ((4, 8), 2)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_block(channels, stride, batch, layout):
    block = randomize(Mv2Se(*channels, stride)).double()
    x = torch.randn(batch, channels[0], 5, 7, dtype=torch.float64)
    check_gradients(
        block,
        lambda x: block(x.contiguous(memory_format=layout)).contiguous(memory_format=torch.channels_last),
        lambda x: mv2_formula(block, x),
        x,
    )
    assert block(x).shape[2:] == (-(-5 // stride), -(-7 // stride))


def test_merging_takes_the_phases_in_the_published_order():
    layer, x = randomize(PatchMerging(3)).double(), torch.randn(2, 4, 6, 3, dtype=torch.float64)
    phases = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = F.layer_norm(torch.cat(phases, 3), (12,), layer.norm.weight, layer.norm.bias, 1e-5)
    torch.testing.assert_close(layer(x), expected @ layer.reduction.weight.T)
    padded = PatchMerging(3, pad=True).double()
    padded.load_state_dict(layer.state_dict())
    torch.testing.assert_close(padded(x[:, :3, :5]), layer(F.pad(x[:, :3, :5], (0, 0, 0, 1, 0, 1))))


# Model


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (63, 61)])
def test_grids(height, width):
    with torch.no_grad():
        features = small().eval().forward_features(images(1, height, width))
    assert features.shape == (1, -(-height // 16), -(-width // 16), 48)


@pytest.mark.parametrize("conv_depths", [(), (1, 2)])
def test_a_layer_that_halves_the_grid_always_follows_the_groups(conv_depths):
    size = 4 * 2 ** len(conv_depths) * 8
    model = small(conv_depths=conv_depths, img_size=size, embed_dim=12).eval()
    assert [layer.stride for layer in model.conv_layers] == [s for d in (*conv_depths, 1) for s in (2, *[1] * (d - 1))]
    with torch.no_grad():
        maps = model.maps(images(1, size, size))
    grids = [8 * 2 ** (len(conv_depths) - i) for i in range(len(conv_depths) + 1)] + [4]
    assert [map.shape for map in maps] == [(1, g, g, c) for g, c in zip(grids, model.channels, strict=True)]


def test_eager_baseline_in_float64():
    ours, eager = randomize(small()).double(), small(block=EagerLadderBlock).double()
    weights = dict(ours.named_parameters())
    eager.load_state_dict(ours.state_dict())
    for training in (True, False):
        ours.train(training)
        eager.train(training)
        x = images(2, dtype=torch.float64)
        check_gradients(ours, ours, lambda x: functional_call(eager, weights, (x,)), x)


def test_float32_gradients_at_batch_one():
    model = randomize(small())
    exact = copy.deepcopy(model).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        exact.zero_grad()
        x = images(1, 128, 64).contiguous(memory_format=layout)
        model(x).square().sum().backward()
        exact(x.double()).square().sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert error(parameter.grad, other.grad) < 2e-3, name


def test_gradients_at_batch_one_by_finite_differences():
    model, x = randomize(small()).double(), images(1, 128, 64, torch.float64)
    torch.manual_seed(3)
    parameters, weights = list(model.parameters()), torch.randn(1, 5, dtype=torch.float64)
    gradients = torch.autograd.grad((model(x) * weights).sum(), parameters)
    directions = [torch.randn_like(p) for p in parameters]
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            values.append((model(x) * weights).sum())
        numeric = (values[0] - values[1]) / 2e-6
    exact = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert abs(numeric - exact) < 1e-5 * max(1, abs(exact))


def test_distilled():
    model = small(distilled=True)
    outputs = model(images())
    assert [output.shape for output in outputs] == [(2, 5), (2, 5)]
    model.eval()
    pooled = model.forward_features(images()).mean((1, 2))
    torch.testing.assert_close(model(images()), (model.head(pooled) + model.head_dist(pooled)) / 2)


def test_no_classes_gives_the_pooled_features():
    assert small(num_classes=0)(images()).shape == (2, 48)


# Backbone


@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 97), (33, 200), (16, 16)])
def test_backbone_takes_any_size(height, width):
    model = backbone()
    assert (model.out_channels, model.strides) == ([12, 24, 48], [4, 8, 16])
    for training in (True, False):
        maps = model.train(training)(images(2, height, width))
        assert [map.shape for map in maps] == [
            (2, channels, -(-height // stride), -(-width // stride))
            for channels, stride in ((12, 4), (24, 8), (48, 16))
        ]
        assert all(map.isfinite().all() and map.is_contiguous(memory_format=torch.channels_last) for map in maps)


def test_backbone_of_whole_windows_is_the_classifier():
    """At 128 x 128 all grids are whole windows and larger than one, so that built sizes and dynamic ones agree."""
    classifier, model = randomize(small(img_size=128)).eval(), backbone(out_indices=(2,)).eval()
    missing, unexpected = model.load_state_dict(classifier.state_dict(), strict=False)
    assert missing == ["norm2.weight", "norm2.bias"]
    assert set(unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    model.norm2.load_state_dict(classifier.norm.state_dict())
    with torch.no_grad():
        (ours,) = model(images(1, 128, 128))
        expected = classifier.forward_features(images(1, 128, 128))
    assert error(ours.permute(0, 2, 3, 1), expected) < 1e-6


def test_published_backbone():
    with torch.device("meta"):
        model = pslt_backbone("pslt_tiny")
        maps = model.eval()(torch.empty(1, 3, 224, 320))
    assert [map.shape for map in maps] == [(1, 48, 56, 80), (1, 96, 28, 40), (1, 192, 14, 20), (1, 384, 7, 10)]
    assert model.strides == [4, 8, 16, 32]
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(backbone()).eval()
    assert [map.shape[1] for map in converted(images(1, 40, 40))] == [12, 24, 48]


# Folding


def test_folding_changes_no_result():
    model, x = randomize(small(), 0.2).eval(), images(2, 128, 64)
    expected = copy.deepcopy(model).double()(x.double())
    tersor.fold_norms_(model)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == ["patch_embed.proj.2", "patch_embed.proj.5"], "in front of convolutions that pad"
    with torch.no_grad():
        assert error(model(x), expected) < 1e-5


@pytest.mark.parametrize("stride", [1, 2])
def test_folding_a_convolution_block(stride):
    block, x = randomize(Mv2Se(4, 6, stride)).double().eval(), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    expected = block(x)
    assert error(tersor.fold_norms_(block)(x), expected) < 1e-12
    assert error(tersor.fold_norms_(block)(x), expected) < 1e-12


# torch's own transforms


def test_bfloat16_autocast_trains():
    model, x = small(), images()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    assert error(output, exact) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"embed_dim": 10}, ValueError, r"LadderBlock: dim \(40\) must be a multiple of 3"),
        ({"num_heads": (3, 2)}, ValueError, r"dim \(8\) must be a positive multiple of num_heads \(3\)"),
        ({"num_heads": (2,)}, ValueError, "PSLT: num_heads must have one entry per stage"),
        ({"depths": (1, 0)}, ValueError, r"PSLT: depths must be positive, got \(1, 0\)"),
        ({"depths": (), "num_heads": ()}, ValueError, "depths must be positive"),
        ({"conv_depths": (0,)}, ValueError, r"conv_depths must be positive, got \(0,\)"),
        ({"img_size": 72}, ValueError, r"H of input_resolution \(9\) must be a multiple of the window's size \(4\)"),
        ({"img_size": (24, 24)}, ValueError, "img_size must give even grids before a merging"),
        ({"img_size": None}, TypeError, "img_size must be an int or two ints, got NoneType"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"drop_path": 1.5}, ValueError, r"rate must be in \[0, 1\)"),
    ],
)
def test_refuses_options(options, kind, message):
    with pytest.raises(kind, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (torch.zeros(3, 64, 64), ValueError, r"PSLT: input must be \(B, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(2, 1, 64, 64), ValueError, r"got \(2, 1, 64, 64\)"),
        (torch.zeros(2, 3, 0, 64), ValueError, "at least one pixel"),
        (torch.zeros(2, 3, 72, 64), ValueError, r"H \(9\) must be a multiple of the window's size \(4\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), TypeError, r"got torch\.uint8"),
        ([1], TypeError, r"must be a torch\.Tensor, got list"),
    ],
)
def test_refuses_inputs(bad, kind, message):
    with pytest.raises(kind, match=message):
        small()(bad)


def test_refuses_more():
    with pytest.raises(ValueError, match="Mv2Se: stride must be 1 or 2, got 3"):
        Mv2Se(4, 4, 3)
    with pytest.raises(ValueError, match="H and W must be even, got 3 x 4"):
        PatchMerging(2)(torch.zeros(1, 3, 4, 2))
    with pytest.raises(ValueError, match="input must have several positions"):
        Mv2Se(4, 4)(torch.zeros(1, 4, 1, 1))
    with pytest.raises(ValueError, match=r"out_indices must be from 0 to 2 and at least one, got \(3,\)"):
        backbone(out_indices=(3,))
    with pytest.raises(ValueError, match="variant must be one of pslt_tiny, pslt_base, pslt_large, got 'base'"):
        pslt_backbone("base")
