"""Uformer: size, keys, the block's formula, masks, sizes, tiles, transforms of torch, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from window_formula import check_gradients, dense_attention, error, parameters_and_macs, randomize

from tersor.models import (
    Uformer,
    charbonnier_loss,
    load_checkpoint,
    pad_and_run,
    uformer_base,
    uformer_nano,
    uformer_small,
    uformer_small_noshift,
    uformer_tiny,
)
from tersor.models.eager_uformer import EagerLeWinBlock
from tersor.models.layers import DropPath
from tersor.models.uformer import LeWinBlock, resized_mask

SMALL = {
    "img_size": 32,
    "embed_dim": 4,
    "depths": (1, 2, 1, 1, 1, 1, 1, 2, 1),
    "num_heads": (1, 1, 2, 2, 2, 2, 2, 1, 1),
}
SMALL |= {"win_size": 4, "mlp_ratio": 2.0, "drop_path": 0.0}


def small(**options):
    torch.manual_seed(0)
    return Uformer(**SMALL | options)


def images(batch=1, height=32, width=32, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, channels, height, width, generator=generator, dtype=dtype)


def maps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Size and keys


@pytest.mark.parametrize(
    ("build", "millions", "giga"),
    [(uformer_tiny, 5.29, 11.3), (uformer_small, 20.75, 41.0), (uformer_base, 50.88, 86.6)],
)
def test_parameters_and_macs_are_the_published_ones(build, millions, giga):
    parameters, operations = parameters_and_macs(lambda: build(256), 256)
    assert (round(parameters, 2), round(operations, 1)) == (millions, giga)


def published_keys(depths, modulator=True):
    affine = ("weight", "bias")
    layers = ("norm1", "attn.qkv.to_q", "attn.qkv.to_kv", "attn.proj", "norm2", "mlp.linear1.0", "mlp.dwconv.0")
    names = [f"encoderlayer_{i}" for i in range(4)] + ["conv"] + [f"decoderlayer_{i}" for i in range(4)]
    outer = ["input_proj.proj.0", "output_proj.proj.0"]
    outer += [f"dowsample_{i}.conv.0" for i in range(4)] + [f"upsample_{i}.deconv.0" for i in range(4)]
    keys = {f"{layer}.{p}" for layer in outer for p in affine}
    for name, depth in zip(names, depths, strict=True):
        for block in (f"{name}.blocks.{n}" for n in range(depth)):
            keys |= {f"{block}.{layer}.{p}" for layer in (*layers, "mlp.linear2.0") for p in affine}
            keys |= {f"{block}.attn.relative_position_{p}" for p in ("bias_table", "index")}
            if modulator and name.startswith("dec"):
                keys.add(f"{block}.modulator.weight")
    return keys


def test_state_dict_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        state = uformer_base(128).state_dict()
    assert set(state) == published_keys((1, 2, 8, 8, 2, 8, 8, 2, 1))
    assert state["conv.blocks.1.attn.relative_position_bias_table"].shape == (225, 16)
    assert state["conv.blocks.1.attn.relative_position_index"].shape == (64, 64)
    assert state["decoderlayer_0.blocks.7.attn.qkv.to_kv.weight"].shape == (1024, 512)
    assert state["decoderlayer_3.blocks.0.modulator.weight"].shape == (64, 64)
    assert state["upsample_1.deconv.0.weight"].shape == (512, 128, 2, 2)
    assert state["dowsample_2.conv.0.weight"].shape == (256, 128, 4, 4)
    assert state["output_proj.proj.0.weight"].shape == (3, 64, 3, 3)


def test_load_checkpoint():
    """The published files hold the weights of a wrapped model."""
    source, target = randomize(small()), small()
    wrapped = {"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}, "epoch": 1}
    load_checkpoint(target, wrapped)
    assert torch.equal(target(images()), source(images()))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_checkpoint(target, {"state_dict": source.state_dict() | {"extra": torch.zeros(1)}})


def test_build_resolution_decides_about_windows_and_shifts():
    """The same weights, but for GoPro's training size the second bottleneck block is shifted."""
    with torch.device("meta"):
        models = {size: uformer_tiny(size) for size in (128, 256)}
        noshift = uformer_small_noshift(256)
    shifts = {size: [block.attn.shift_size for block in model.conv.blocks] for size, model in models.items()}
    assert shifts == {128: [[0, 0], [0, 0]], 256: [[0, 0], [4, 4]]}
    assert [block.attn.shift_size for block in models[128].encoderlayer_0.blocks] == [[0, 0], [4, 4]]
    assert [model.multiple for model in models.values()] == [128, 128]
    assert not any(any(m.shift_size) for m in noshift.modules() if hasattr(m, "shift_size"))
    assert {n: v.shape for n, v in models[128].state_dict().items()} == {
        n: v.shape for n, v in models[256].state_dict().items()
    }
    nano = uformer_nano()
    assert (nano.multiple, nano.conv.blocks[0].attn.window_size) == (64, [4, 4])
    with pytest.raises(RuntimeError, match="size mismatch for conv"):
        uformer_nano(img_size=128).load_state_dict(nano.state_dict())


def test_initialisation():
    torch.manual_seed(0)
    model = uformer_nano()
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert linear.std().item() == pytest.approx(0.02, rel=0.01)
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear))
    modulators = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Embedding)])
    assert modulators.std().item() == pytest.approx(1, rel=0.02)


def test_drop_path_rates():
    with torch.device("meta"):
        model = Uformer(128, depths=(1, 2, 1, 1, 2, 1, 1, 1, 1), drop_path=0.4)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    by_name = {n.split(".")[0]: [] for n, _ in model.named_modules() if n}
    for name, module in model.named_modules():
        if isinstance(module, DropPath):
            by_name[name.split(".")[0]].append(round(module.rate, 6))
    assert len(rates) == 11
    assert [by_name[f"encoderlayer_{i}"] for i in range(4)] == [[0], [0.1, 0.2], [0.3], [0.4]]
    assert by_name["conv"] == [0.4, 0.4]
    assert [by_name[f"decoderlayer_{i}"] for i in range(4)] == [[0.4], [0.3], [0.2], [0.1]]


# Block


def block_formula(block, window, shift, x, mask=None):
    """Rolled and partitioned in thought: position (r, c) of the rolled map is token (r + shift, c + shift)."""
    height, width, dim = x.shape[1:]
    t = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-5)
    if block.modulator is not None:
        rows, columns = ((torch.arange(size) - shift) % size % window for size in (height, width))
        t = t + block.modulator.weight[rows[:, None] * window + columns]
    query = block.attn.qkv.to_q(t).unflatten(3, (block.attn.num_heads, -1))
    key, value = block.attn.qkv.to_kv(t).unflatten(3, (2, block.attn.num_heads, -1)).unbind(3)
    outside = None
    if mask is not None:
        indices = [
            [i * n // size for i in range(size)] for n, size in zip(mask.shape[2:], (height, width), strict=True)
        ]
        outside = mask[:, 0][:, indices[0]][:, :, indices[1]] != 0
    table = block.attn.relative_position_bias_table
    x = x + block.attn.proj(dense_attention(query, key, value, (window,) * 2, (shift,) * 2, table, outside).flatten(3))
    layers = block.mlp
    u = F.gelu(layers.linear1[0](F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-5)))
    conv = layers.dwconv[0]
    u = F.conv2d(u.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=conv.groups).permute(0, 2, 3, 1)
    return x + layers.linear2[0](F.gelu(u))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (4, 8), (12, 4)])
@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("modulator", [False, True])
def test_block(height, width, shift, modulator):
    block = randomize(LeWinBlock(6, 2, 8, 4, shift, 2.0, modulator=modulator)).double()
    x = maps(2, height, width, 6)
    check_gradients(block, block, lambda x: block_formula(block, 4, shift, x), x)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 8, 12), (2, 1, 16, 24), (2, 1, 13, 9), (1, 1, 3, 1)])
@pytest.mark.parametrize("block_type", [LeWinBlock, EagerLeWinBlock])
def test_block_with_a_mask(shift, shape, block_type):
    block = randomize(block_type(6, 2, 8, 4, shift, 2.0)).double()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    for given in (mask, mask.float()):
        x = maps(2, 8, 12, 6)
        check_gradients(block, lambda x, m=given: block(x, m), lambda x: block_formula(block, 4, shift, x, mask), x)


def test_a_window_that_is_outside_as_a_whole_is_as_without_a_mask():
    block, x = randomize(LeWinBlock(6, 2, 8, 4, 2)).double(), maps(1, 8, 8, 6)
    assert error(block(x, torch.ones(1, 1, 8, 8)), block(x)) < 1e-12


def test_mask_rows_are_rounded_down():
    mask = torch.arange(5).view(1, 1, 5, 1) % 2 == 1
    assert resized_mask(mask, 3, 2).int().tolist() == [[[0, 0], [1, 1], [1, 1]]]
    assert resized_mask(mask, 10, 1).flatten().int().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


def test_effective_window():
    for resolution, window, shift in ((16, 8, 4), (8, 8, 0), ((16, 4), 4, 0), (5, 5, 0)):
        block = LeWinBlock(6, 2, resolution, 8, 4)
        assert (block.attn.window_size, block.attn.shift_size) == ([window] * 2, [shift] * 2)
    LeWinBlock(6, 2, 8, 8, modulator=True)


# Model


@pytest.mark.parametrize("dd_in", [3, 6])
def test_eager_baseline_in_float64(dd_in):
    """Rectangular, with a mask for each image."""
    ours, eager = randomize(small(dd_in=dd_in)).double(), small(dd_in=dd_in, block=EagerLeWinBlock).double()
    weights = dict(ours.named_parameters())
    mask = torch.rand(2, 1, 64, 32) < 0.5
    x = images(2, 64, 32, dd_in, torch.float64)
    check_gradients(ours, lambda x: ours(x, mask), lambda x: functional_call(eager, weights, (x, mask)), x)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 96), (64, 32)])
def test_sizes(height, width):
    assert small()(images(2, height, width)).shape == (2, 3, height, width)
    assert small(dd_in=6)(images(1, height, width, 6)).shape == (1, 3, height, width)


def test_the_image_is_added_if_there_is_one():
    for channels in (3, 4):
        model, x = small(dd_in=channels), images(1, channels=channels)
        nn.init.zeros_(model.output_proj.proj[0].weight)
        nn.init.zeros_(model.output_proj.proj[0].bias)
        assert torch.equal(model(x), x if channels == 3 else torch.zeros(1, 3, 32, 32))


def test_the_upsampled_part_comes_first():
    model = small()
    seen = {}
    model.upsample_3.register_forward_hook(lambda _, inputs, output: seen.update(up=output))
    model.encoderlayer_0.register_forward_hook(lambda _, inputs, output: seen.update(skip=output))
    model.decoderlayer_3.register_forward_pre_hook(lambda _, inputs: seen.update(both=inputs[0]))
    model(images())
    assert torch.equal(seen["both"], torch.cat([seen["up"], seen["skip"]], 3))


def test_train_and_eval_agree_without_drop_path():
    model, x = small(), images()
    assert torch.equal(model.train()(x), model.eval()(x))


def test_float32_gradients():
    model = randomize(small(), 0.2)
    exact = copy.deepcopy(model).double()
    x = images(1, 32, 64)
    charbonnier_loss(model(x), torch.zeros_like(x)).backward()
    charbonnier_loss(exact(x.double()), torch.zeros_like(x).double()).backward()
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert error(parameter.grad, other.grad) < 1e-4, name


def test_bfloat16_autocast_trains():
    model, x = small(), images()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    output.float().square().sum().backward()
    assert error(output, model(x)) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_block_compiles_to_one_graph():
    block, x = LeWinBlock(6, 2, 8, 4, 2, 2.0, modulator=True), maps(1, 8, 12, 6).float()
    mask = torch.rand(1, 1, 16, 24) < 0.5
    exact = copy.deepcopy(block)
    output, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(x, mask), exact(x, mask)
    assert error(output, expected) < 1e-5
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-4, name


# Images of any size


class Marked(nn.Module):
    """Notes what it is run on, and doubles it."""

    multiple = 8

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, input):
        assert input.shape[2] % 8 == input.shape[3] % 8 == 0
        self.inputs.append(input)
        return 2 * input


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11), (1, 1), (3, 2), (17, 16)])
def test_reflection(height, width):
    model, x = Marked(), images(2, height, width)
    torch.testing.assert_close(pad_and_run(model, x), 2 * x)
    (padded,) = model.inputs
    assert padded.shape[2:] == (-(-height // 8) * 8, -(-width // 8) * 8)
    below, right = padded.shape[2] - height, padded.shape[3] - width
    if below < height and right < width:
        assert torch.equal(padded, F.pad(x, (0, right, 0, below), mode="reflect"))


def test_short_images_are_mirrored_again_and_again():
    model = Marked()
    pad_and_run(model, torch.arange(3.0).expand(1, 1, 1, 3))
    assert model.inputs[0][0, 0, 5].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]


def test_published_square_of_zeros():
    model, x = Marked(), images(1, 5, 130)
    torch.testing.assert_close(pad_and_run(model, x, padding="square"), (2 * x).clamp(0, 1))
    (padded,) = model.inputs
    expected = torch.zeros(1, 3, 256, 256)
    expected[:, :, 125:130, 63:193] = x
    assert torch.equal(padded, expected)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 3), (16, 8), (64, 5)])
def test_tiles(tile, overlap):
    model, x = Marked(), images(1, 21, 40)
    torch.testing.assert_close(pad_and_run(model, x, tile=tile, overlap=overlap), 2 * x)
    assert max(max(part.shape[2:]) for part in model.inputs) <= max(tile, 8)
    assert len(model.inputs) > 1 or tile == 64


def test_a_model_on_any_size():
    model = small().eval()
    with torch.no_grad():
        assert pad_and_run(model, images(1, 33, 20)).shape == (1, 3, 33, 20)
        assert pad_and_run(model, images(1, 70, 40), tile=32, overlap=8).shape == (1, 3, 70, 40)
        x = images(1, 32, 64)
        assert torch.equal(pad_and_run(model, x), model(x))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"padding": "zeros"}, ValueError, "padding must be 'reflect' or 'square', got 'zeros'"),
        ({"padding": "square", "tile": 8}, ValueError, "tile must be None with padding 'square', got 8"),
        ({"tile": 12}, ValueError, "tile must be a multiple of 8, got 12"),
        ({"tile": 8, "overlap": 8}, ValueError, r"overlap must be from 0 to less than tile \(8\), got 8"),
        ({"input": torch.zeros(3, 8, 8)}, ValueError, r"input must be \(B, C, H, W\) .* got shape \(3, 8, 8\)"),
        ({"input": torch.zeros(1, 3, 8, 8).int()}, TypeError, r"input must be float16, .* got torch\.int32"),
    ],
)
def test_pad_and_run_refuses(options, kind, message):
    with pytest.raises(kind, match=message):
        pad_and_run(Marked(), **{"input": images()} | options)


# Loss


def test_charbonnier_loss():
    x, y = maps(2, 3), maps(3, 2).T
    torch.testing.assert_close(charbonnier_loss(x, y), ((x - y) ** 2 + 1e-6).sqrt().mean())
    assert torch.autograd.gradcheck(charbonnier_loss, (x.requires_grad_(), y.requires_grad_()))
    with pytest.raises(ValueError, match="target must have the shape of input"):
        charbonnier_loss(x, x[0])


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_heads": (3,) * 9}, ValueError, r"dim \(4\) must be a positive multiple of num_heads \(3\)"),
        ({"img_size": 40}, ValueError, "img_size must be a multiple of 16, got 40"),
        ({"img_size": "32"}, TypeError, "img_size must be an int or two ints, got str"),
        ({"win_size": 8}, ValueError, r"modulator must be False where the window \(8\) shrinks .* \(4\)"),
        ({"depths": (1, 1)}, ValueError, "depths must be 9 positive numbers"),
        ({"num_heads": (1,) * 8 + (0,)}, ValueError, "num_heads must be 9 positive numbers"),
        ({"depths": (1,) * 8 + (2,)}, ValueError, "no more blocks than the encoder, got 5 and 4"),
        ({"dd_in": 0}, ValueError, "dd_in and embed_dim must be at least 1, got 0 and 4"),
        ({"drop_path": 1.0}, ValueError, r"rate must be in \[0, 1\)"),
    ],
)
def test_refuses_options(options, kind, message):
    with pytest.raises(kind, match=message):
        small(**options)


def test_a_shrunk_window_without_modulator_is_fine():
    assert small(win_size=8, modulator=False)(images()).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift_size": 4}, r"shift_size \(4\) must be from 0 to less than win_size \(4\)"),
        ({"shift_size": -1}, r"shift_size \(-1\) must be from 0"),
        ({"num_heads": 4}, r"dim \(6\) must be a positive multiple of num_heads \(4\)"),
        ({"input_resolution": 2, "modulator": True}, r"modulator must be False where the window \(4\) shrinks"),
    ],
)
def test_block_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        LeWinBlock(**{"dim": 6, "num_heads": 2, "input_resolution": 8, "win_size": 4} | options)


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 64, 6), None, r"input must be \(B, H, W, 6\), got shape \(2, 64, 6\)"),
        ((2, 8, 8, 5), None, r"input must be \(B, H, W, 6\)"),
        ((2, 8, 10, 6), None, r"LeWinBlock: W \(10\) must be a multiple of the window's size \(4\)"),
        ((2, 8, 8, 6), (3, 1, 8, 8), r"mask must be \(1 or 2, 1, H, W\), got shape \(3, 1, 8, 8\)"),
        ((2, 8, 8, 6), (1, 2, 8, 8), r"mask must be \(1 or 2, 1, H, W\), got shape \(1, 2, 8, 8\)"),
        ((2, 8, 8, 6), (1, 8, 8), r"got shape \(1, 8, 8\)"),
        ((2, 8, 8, 6), (1, 1, 0, 8), r"got shape \(1, 1, 0, 8\)"),
    ],
)
def test_block_refuses_input(shape, mask, message):
    with pytest.raises(ValueError, match=message):
        LeWinBlock(6, 2, 8, 4)(torch.zeros(shape), None if mask is None else torch.zeros(mask))


@pytest.mark.parametrize(
    ("input", "mask", "kind", "message"),
    [
        (images()[0], None, ValueError, r"Uformer: input must be \(B, 3, H, W\), got shape \(3, 32, 32\)"),
        (images(channels=6), None, ValueError, r"must be \(B, 3, H, W\), got shape \(1, 6, 32, 32\)"),
        (images(1, 48, 32), None, ValueError, r"H \(48\) must be a multiple of 32, .*pad_and_run takes any size"),
        (images(1, 32, 0), None, ValueError, r"W \(0\) must be a multiple of 32"),
        (images().to(torch.uint8), None, TypeError, r"got torch\.uint8"),
        (images(), torch.zeros(2, 1, 32, 32), ValueError, r"Uformer: mask must be \(1 or 1, 1, H, W\)"),
        (images(), [1], TypeError, r"mask must be a torch\.Tensor, got list"),
    ],
)
def test_refuses_inputs(input, mask, kind, message):
    with pytest.raises(kind, match=message):
        small()(input, mask)
