"""DilateFormer: size, checkpoint keys, image sizes, transforms of torch, refusals, registration with timm."""

import argparse
import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import tersor
from tersor.models import (
    DilateFormer,
    dilateformer_base,
    dilateformer_nano,
    dilateformer_small,
    dilateformer_tiny,
    load_checkpoint,
)
from tersor.models.eager import EagerDilatedAttention, dilated_attention_unfold
from tersor.models.layers import AttentionBlock, DropPath, GlobalAttention

SMALL = {"embed_dim": 12, "depths": (1, 1, 1), "num_heads": (3, 3, 2), "num_classes": 5}  # fast
TWO_STAGES = {"depths": (1, 1), "num_heads": (3, 2), "dilate_attention": (True, False), "downsamples": (True, False)}


def small(**options):
    torch.manual_seed(0)
    return dilateformer_nano(**SMALL | options)


def images(batch=2, height=32, width=32, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def error(ours, exact):
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1)).item()


# Size


def count_macs(model, size):
    """Multiply-adds of one image: convolutions, linear layers, and both products of every attention.

    A dilated query meets ``kernel_size ** 2`` keys, padding included; norms, activations and softmax are not counted.
    """
    total = 0

    def layer(module, _, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # weight[0]: what one output value sums over

    def attention(module, inputs, _):
        nonlocal total
        _, height, width, dim = inputs[0].shape
        dilated = isinstance(module, tersor.DilatedAttention)
        total += 2 * height * width * dim * (module.kernel_size**2 if dilated else height * width)
        total += height * width * dim * 3 * dim if dilated else 0  # its projection is no module that is called

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(layer)
        if isinstance(module, (tersor.DilatedAttention, GlobalAttention)):
            module.register_forward_hook(attention)
    with torch.no_grad():
        model(images(1, size, size))
    return total


@pytest.mark.parametrize(
    ("build", "millions", "giga"),
    [(dilateformer_tiny, 17.24, 3.16), (dilateformer_small, 24.06, 4.59), (dilateformer_base, 47.43, 9.92)],
)
def test_parameters_and_macs_are_the_published_ones(build, millions, giga):
    model = build().eval()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert round(count_macs(model, 224) / 1e9, 2) == giga


# Checkpoints


def published_keys(depths, merged):
    """The authors' state dict of a model with the four-convolution stem, and which qkv weights are convolutions."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"patch_embed.proj.{i}.weight" for i in (0, 3, 6, 9)}
    keys |= {f"patch_embed.proj.{i}.{name}" for i in (1, 4, 7) for name in norm}
    layers = ("pos_embed", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for stage, depth in enumerate(depths):
        blocks = range(depth)
        keys |= {f"stages.{stage}.blocks.{b}.{x}.{p}" for b in blocks for x in layers for p in ("weight", "bias")}
        if merged[stage]:
            keys |= {f"stages.{stage}.downsample.proj.0.{p}" for p in ("weight", "bias")}
            keys |= {f"stages.{stage}.downsample.proj.1.{p}" for p in norm}
    return keys | {f"{x}.{p}" for x in ("norm", "head") for p in ("weight", "bias")}


def test_state_dict_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        state = dilateformer_tiny().state_dict()
    assert set(state) == published_keys((2, 2, 6, 2), (True, True, True, False))
    assert state["stages.1.blocks.0.attn.qkv.weight"].shape == (432, 144, 1, 1)
    assert state["stages.2.blocks.0.attn.qkv.weight"].shape == (864, 288)


def test_position_convolution_once_per_stage():
    names = {name for name in small(depths=(2, 2, 2), cpe_per_stage=True).state_dict() if "pos_embed.weight" in name}
    assert names == {f"stages.{stage}.blocks.0.pos_embed.weight" for stage in range(3)}


@pytest.mark.parametrize("wrap", [None, "model", "model_ema"])
@pytest.mark.parametrize("kind", ["dict", "pth", "safetensors"])
def test_load_checkpoint(tmp_path, wrap, kind):
    source, target = small(), small()
    nn.init.normal_(source.head.weight)
    content = source.state_dict()
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        content, path = {k: v.contiguous() for k, v in content.items()}, tmp_path / "weights.safetensors"
        safetensors.save_file(content, path)
    else:
        content = content if wrap is None else {wrap: content, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
        path = tmp_path / "weights.pth"
        torch.save(content, path)
    load_checkpoint(target, content if kind == "dict" else path)
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_load_checkpoint_takes_the_average_when_asked():
    plain, average, target = small(), small(), small()
    nn.init.normal_(average.head.weight)
    both = {"model": plain.state_dict(), "model_ema": average.state_dict()}
    load_checkpoint(target, both, ema=True)
    assert torch.equal(target.head.weight, average.head.weight)
    load_checkpoint(target, both)
    assert torch.equal(target.head.weight, plain.head.weight)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap-sprung",)


def test_load_checkpoint_refuses(tmp_path, monkeypatch):
    model, state = small(), small().state_dict()
    with pytest.raises(TypeError, match="source must be a path or a dict, got int"):
        load_checkpoint(model, 3)
    with pytest.raises(ValueError, match="got keys epoch"):
        load_checkpoint(model, {"epoch": 3})
    with pytest.raises(ValueError, match="nothing under 'model_ema'"):
        load_checkpoint(model, {"model": state}, ema=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        load_checkpoint(model, {k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_checkpoint(model, state | {"extra": torch.zeros(1)})
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "trap": Trap()}, "trap.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(model, "trap.pth")
    assert not os.path.exists("trap-sprung")


# Numbers


@pytest.mark.parametrize("way", ["overlaping", "overlapping", "pointconv", "nonoverlaping", "nonoverlapping"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 60), (36, 20)])
def test_image_sizes(way, height, width):
    model = small(patch_way=way).eval()
    with torch.no_grad():
        output = model(images(2, height, width))
        grid = model.forward_features(images(2, height, width)).shape
    assert output.shape == (2, 5)
    assert output.isfinite().all()
    assert grid == (2, -(-height // 16), -(-width // 16), 48)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (33, 47), (7, 128)])
@pytest.mark.parametrize("way", ["overlaping", "pointconv"])
def test_odd_image_sizes_round_up(way, height, width):
    model = small(patch_way=way).eval()
    with torch.no_grad():
        features = model.forward_features(images(1, height, width))
    assert features.shape == (1, -(-height // 16), -(-width // 16), 48)
    assert features.isfinite().all()


def test_eager_equals_tersor_in_float64():
    ours, eager = small().double(), small(attention=EagerDilatedAttention).double()
    for model in (ours, eager):  # away from the initialisation, where all scores are nearly 0
        torch.manual_seed(2)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    inputs = [images(2, 40, 28, torch.float64).requires_grad_() for _ in range(2)]
    outputs = [model(x) for model, x in zip((ours, eager), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert error(outputs[0], outputs[1]) < 1e-10
    assert error(inputs[0].grad, inputs[1].grad) < 1e-10
    for (name, parameter), other in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert error(parameter.grad, other.grad) < 1e-10, name


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "scale"), [(3, (1, 2, 3), None), (5, 2, 0.7), (2, (2, 4), 0), (1, (1,), None)]
)
def test_unfold_baseline_equals_the_operator(kernel_size, dilation, scale):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 6, 5, 6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    ours = tersor.dilated_attention(*tensors, kernel_size, dilation, scale)
    eager = dilated_attention_unfold(*tensors, kernel_size, dilation, scale)
    assert error(eager, ours) < 1e-10


@pytest.mark.parametrize("way", ["overlaping", "pointconv"])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_by_finite_differences(way, batch):
    """Batch 1 matters: torch's CPU batch norm gives wrong gradients there if the memory layouts are mixed."""
    model, x = small(patch_way=way).double(), images(batch, 36, 44, torch.float64)
    torch.manual_seed(3)
    parameters = list(model.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.3)
    weights = torch.randn(batch, 5, dtype=torch.float64)
    gradients = torch.autograd.grad((model(x) * weights).sum(), parameters)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                parameter += step * direction
                values.append((model(x) * weights).sum())
                parameter -= step * direction
        numeric = (values[0] - values[1]) / 2e-5
        assert abs(numeric - (gradient * direction).sum()) < 1e-5 * max(1, abs(numeric)), name


def test_float32_gradients_at_batch_one():
    model = small(patch_way="overlaping")
    exact = copy.deepcopy(model).double()
    for layout in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        exact.zero_grad()
        x = images(1, 36, 44).contiguous(memory_format=layout)
        model(x).square().sum().backward()
        exact(x.double()).square().sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert error(parameter.grad, other.grad) < 1e-5, name


@pytest.mark.parametrize("attention", [tersor.DilatedAttention, EagerDilatedAttention])
def test_input_is_left_untouched(attention):
    x = images().contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    small(attention=attention)(x).sum().backward()
    assert torch.equal(x, before)


def test_bfloat16_autocast_trains():
    model, x = small(), images()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert error(output, exact.double()) < 0.05  # a few steps of bfloat16, which has 8 bits
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_initialisation():
    torch.manual_seed(0)
    model = dilateformer_nano()
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.01)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear))
    qkv = model.stages[0].blocks[0].attn.qkv.weight  # a convolution: torch's own, uniform with bound fan_in ** -0.5
    assert qkv.std().item() == pytest.approx(24**-0.5 / 3**0.5, rel=0.1)


def test_drop_path_drops_whole_samples_and_scales_the_rest():
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(4000, 3, 2)
    output = layer(x)
    assert output.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (output.flatten(1).std(1) == 0).all()
    assert (output[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_rates_rise_in_equal_steps():
    with torch.device("meta"):
        model = dilateformer_tiny(drop_path=0.1)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1 * block / 11 for block in range(12)])


# torch's own transforms


def check_compiled(module, compiled, x):
    """Output and gradients of the compiled module against those of an uncompiled copy."""
    reference = copy.deepcopy(module)
    output, expected = compiled(x), reference(x)
    assert error(output, expected.double()) < 1e-5
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), other in zip(module.named_parameters(), reference.parameters(), strict=True):
        assert error(parameter.grad, other.grad.double()) < 1e-5, name


def test_nano_compiles_to_one_graph():
    torch.manual_seed(0)
    model = dilateformer_nano(num_classes=5)
    check_compiled(model, torch.compile(model, fullgraph=True, backend="aot_eager"), images(2, 20, 28))


def test_block_compiles_with_inductor():
    block = AttentionBlock(12, tersor.DilatedAttention(12, 3))
    check_compiled(block, torch.compile(block, fullgraph=True), torch.randn(2, 12, 5, 6))


def test_compiles_for_any_batch_without_gradients():
    model = small(**TWO_STAGES).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            assert error(compiled(images(batch)), model(images(batch)).double()) < 1e-5


def test_nano_exports_with_the_operator_visible():
    torch.manual_seed(0)
    model = dilateformer_nano(num_classes=5).eval()
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert "tersor.dilated_attention_forward" in str(exported.graph)
    assert error(exported.module()(images(3)), model(images(3)).double()) < 1e-5


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (3, 3)}, "num_heads must have one entry per stage"),
        ({"downsamples": (True,)}, "downsamples must have one entry per stage"),
        ({"depths": (1, 0, 1)}, "depths must be positive"),
        ({"patch_way": "conv"}, "patch_way must be 'overlaping'"),
        ({"merging_way": "avgpool2_2"}, "merging_way must be 'conv3_2'"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"drop_path": 1.0}, r"rate must be in \[0, 1\)"),
        ({"num_heads": (2, 3, 2)}, r"heads \(2\) must be a positive multiple of the number of dilations \(3\)"),
        ({"num_heads": (3, 3, 5)}, r"dim \(48\) must be a positive multiple of num_heads \(5\)"),
        ({"kernel_size": 2}, "must be even so that the window has a centre"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("bad", "error_type", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"must be \(B, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"must be \(B, 3, H, W\), got \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 0, 32), ValueError, "at least one pixel, got 0 x 32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "got torch.uint8"),
        ([1, 2], TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_refuses_inputs(bad, error_type, message):
    with pytest.raises(error_type, match=message):
        small()(bad)


def test_whole_patches_need_whole_patches():
    with pytest.raises(ValueError, match="multiples of 4, got 30 x 32"):
        small(patch_way="nonoverlaping")(images(2, 30, 32))


def test_no_classes_gives_the_pooled_features():
    assert small(num_classes=0)(images()).shape == (2, 48)


# timm

FAKE_TIMM = """
    import sys, types
    timm, registry = types.ModuleType("timm"), {}
    timm.models = types.ModuleType("timm.models")
    def register_model(entry):  # as timm's: by the function's name, noted in the module's __all__
        assert entry.__name__ not in registry, "timm warns"
        sys.modules[entry.__module__].__all__.append(entry.__name__)
        registry[entry.__name__] = entry
        return entry
    timm.models.register_model = register_model
    timm.create_model = lambda name, **options: registry[name](
        pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options)
    sys.modules |= {"timm": timm, "timm.models": timm.models}
"""


@pytest.mark.parametrize("timm_first", [True, False])
def test_registers_with_a_stand_in_for_timm(timm_first):
    """With a stand-in of a few lines for timm, which is often not installed; the real one is tested below."""
    lines = [FAKE_TIMM, "import tersor.models"] if timm_first else ["import tersor.models", FAKE_TIMM]
    lines += [] if timm_first else ["tersor.models.register_timm()"]
    lines += [
        """
        import timm
        model = timm.create_model("tersor_dilateformer_nano", num_classes=7, drop_path_rate=0.2, drop_rate=0.0)
        assert type(model) is tersor.models.DilateFormer and model.num_classes == 7
        assert model.stages[-1].blocks[-1].drop_path.rate == 0.2
        expected = {"tersor_dilateformer_" + size for size in ("tiny", "small", "base", "nano")}
        expected |= {"tersor_pslt_" + size for size in ("tiny", "base", "large")}
        expected |= {"tersor_cf_" + size for size in ("deit_small", "lvvit_small", "deit_nano")}
        expected |= {"tersor_super_" + size for size in ("deit_small", "lvvit_small", "deit_nano")}
        expected |= {"tersor_uformer_" + size for size in ("tiny", "small", "small_noshift", "base", "nano")}
        assert type(timm.create_model("tersor_pslt_tiny", depths=(1, 1))) is tersor.models.PSLT
        assert timm.create_model("tersor_uformer_tiny", img_size=64, modulator=False).multiple == 64
        assert set(tersor.models.register_timm()) == set(registry) == expected
        try:
            registry["tersor_dilateformer_tiny"](pretrained=True)
        except ValueError as error:
            assert "no pretrained weights are hosted" in str(error)
        else:
            raise AssertionError("pretrained=True was accepted")
        """
    ]
    subprocess.run([sys.executable, "-c", "\n".join(map(textwrap.dedent, lines))], check=True)


def test_registers_with_timm(recwarn):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for _ in range(2):
        tersor.models.register_timm()
    assert not [w for w in recwarn if "registry" in str(w.message)]
    model = timm.create_model("tersor_dilateformer_nano", num_classes=7, drop_path_rate=0.2)
    assert isinstance(model, DilateFormer)
    assert model(images()).shape == (2, 7)


def test_importing_the_models_does_not_import_timm():
    code = "import sys, tersor.models; assert not {'timm', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_register_timm_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(ImportError, match=r'pip install "tersor\[timm\]"'):
        tersor.models.register_timm()
