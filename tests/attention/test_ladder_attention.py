"""PSLT's ladder: attention with given values, the light MLP, the block, the fusion, folding; against formulas."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from window_formula import check_gradients, dense_attention, error, randomize

import tersor
from tersor.attention.ladder_attention import ChannelGate, LadderBranch, normalized
from tersor.models.eager_ladder import EagerLadderBlock


def maps(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Formulas, from the module's parameters


def attention_formula(module, shift, input, value=None):
    """Zeros on the right and at the bottom to whole windows, where the layer pads; none of them masked."""
    height, width = input.shape[1:3]
    window = module.window_size
    border = (0, 0, 0, -width % window[1], 0, -height % window[0])
    x, heads = F.pad(input, border), (module.num_heads, -1)
    if value is None:
        parts = F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(3, (3, *heads)).unbind(3)
    else:
        parts = F.linear(x, module.kv.weight, module.kv.bias).unflatten(3, (2, *heads)).unbind(3)
        parts = (*parts, F.pad(value, border).unflatten(3, heads))
    output = dense_attention(*parts, window, shift, module.relative_position_bias_table).flatten(3)
    output = F.linear(output, module.proj.weight, module.proj.bias)[:, :height, :width]
    return output if value is None else output + input


def norm_formula(norm, x):
    """Over all positions of ``(B, H, W, C)`` in training mode, else with the running statistics."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2), unbiased=False)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def depthwise_formula(x, weight, bias):
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return bias + sum(padded[:, i : i + height, j : j + width] * weight[:, 0, i, j] for i, j in taps)


def mlp_formula(module, x):
    first, _, norm1, second, _, norm2, third, norm3 = module.conv
    x = norm_formula(norm1, gelu(x @ first.weight[:, :, 0, 0].T + first.bias))
    x = norm_formula(norm2, gelu(depthwise_formula(x, second.weight, second.bias)))
    return norm_formula(norm3, x @ third.weight[:, :, 0, 0].T + third.bias)


def block_formula(block, shifts, input):
    outputs, value = [], None
    for branch, shift, part in zip(block.blocks, shifts, input.chunk(3, 3), strict=True):
        dim = part.shape[3:]
        xn = F.layer_norm(part, dim, branch.norm1.weight, branch.norm1.bias, 1e-5)
        a = part + attention_formula(branch.attn, (shift, shift), xn, value)
        value = a + mlp_formula(branch.mlp, F.layer_norm(a, dim, branch.norm2.weight, branch.norm2.bias, 1e-5))
        outputs.append(value)
    y = torch.cat(outputs, 3)
    gated = y * torch.sigmoid(block.se.fc2(torch.relu(block.se.fc1(y))))
    return gated @ block.pointconv.weight.T + block.pointconv.bias + gated


# Attention


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("shift", "height", "width"), [(0, 8, 12), (2, 8, 12), (-2, 12, 8), (-1, 4, 8), (3, 4, 4)])
def test_attention(given, shift, height, width):
    module = randomize(tersor.LadderAttention(6, 2, 4, shift, given)).double()
    inputs = [maps(2, height, width, 6, seed=s) for s in range(1 + given)]
    check_gradients(module, module, lambda *x: attention_formula(module, (shift, shift), *x), *inputs)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shift", [0, 2, -2])
@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 7), (4, 9), (9, 3), (1, 1), (6, 5)])
def test_attention_pads_what_is_no_whole_window(given, shift, height, width):
    """The shift is dropped where the smaller side is at most the window's, in that call only."""
    module = randomize(tersor.LadderAttention(6, 2, 4, shift, given, pad=True)).double()
    inputs = [maps(2, height, width, 6, seed=s) for s in range(1 + given)]
    used = 0 if min(height, width) <= 4 else shift
    check_gradients(module, module, lambda *x: attention_formula(module, (used, used), *x), *inputs)
    assert module.shift_size == [shift, shift]


def test_given_values_have_no_projection_and_add_the_input():
    module = randomize(tersor.LadderAttention(6, 2, 4, given_values=True)).double()
    assert module.kv.weight.shape == (12, 6)
    nn.init.zeros_(module.proj.weight)
    x = maps(1, 4, 4, 6)
    torch.testing.assert_close(module(x, maps(1, 4, 4, 6, seed=2)), x + module.proj.bias)


@pytest.mark.parametrize(
    ("make", "input", "value", "kind", "message"),
    [
        (
            {},
            (1, 8, 8, 5),
            None,
            ValueError,
            r"LadderAttention: input must be \(B, H, W, 6\), got shape \(1, 8, 8, 5\)",
        ),
        ({}, (1, 64, 6), None, ValueError, r"input must be \(B, H, W, 6\)"),
        ({}, (1, 10, 8, 6), None, ValueError, r"H \(10\) must be a multiple of the window's size \(4\)"),
        ({}, (1, 8, 9, 6), None, ValueError, r"W \(9\) must be a multiple of the window's size \(4\)"),
        ({"pad": True}, (1, 0, 8, 6), None, ValueError, r"H \(0\) must be"),
        ({}, (1, 8, 8, 6), (1, 8, 8, 6), ValueError, "value must be None with given_values=False, got Tensor"),
        ({"given_values": True}, (1, 8, 8, 6), None, ValueError, "value must be a tensor .* got NoneType"),
        ({"given_values": True}, (1, 8, 8, 6), (1, 8, 4, 6), ValueError, r"value must have the shape of input"),
    ],
)
def test_attention_refuses(make, input, value, kind, message):
    module = tersor.LadderAttention(6, 2, 4, **make)
    with pytest.raises(kind, match=message):
        module(torch.zeros(input), None if value is None else torch.zeros(value))


def test_shift_must_be_less_than_the_window():
    for shift in (4, -4):
        with pytest.raises(ValueError, match=rf"nearer to 0 than the window's size \(4, 4\), got {shift}"):
            tersor.LadderAttention(6, 2, 4, shift)


# MLP


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 5, 4, 6), (2, 3, 5, 6), (1, 1, 7, 6), (1, 7, 1, 6), (3, 1, 1, 6), (1, 4, 4, 1)])
@pytest.mark.parametrize("layout", ["plain", "tokens", "nchw"])
def test_mlp(training, shape, layout):
    """Batch 1 matters: torch's CPU batch norm gives wrong gradients there if the memory layouts are mixed."""
    module = randomize(tersor.MlpLight(shape[3], 5)).double().train(training)

    def laid_out(x):
        if layout == "tokens":  # a slice of tokens, as the ladder's branches are
            return torch.cat([x, x], 3).flatten(1, 2)[..., : shape[3]].unflatten(1, shape[1:3])
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if layout == "nchw" else x

    check_gradients(module, lambda x: laid_out(module(laid_out(x))), lambda x: mlp_formula(module, x), maps(*shape))


def test_norm_of_a_view_of_tokens_at_batch_one():
    """The published strides, of a transposed token view, and a plain gradient: here torch 2.13 itself is wrong."""
    norm = randomize(nn.BatchNorm2d(6)).double()
    x = maps(1, 5, 4, 6).as_strided((1, 5, 4, 6), (6, 24, 6, 1)).requires_grad_()
    plain = maps(1, 6, 5, 4, seed=2).permute(0, 2, 3, 1)
    (ours,) = torch.autograd.grad(normalized(norm, x), x, plain)
    (exact,) = torch.autograd.grad(norm_formula(norm, x), x, plain)
    assert error(ours, exact) < 1e-12


def test_mlp_refuses_one_position_in_training():
    module = tersor.MlpLight(4, 4)
    with pytest.raises(ValueError, match=r"batch norm in training mode: input must have several positions"):
        module(torch.zeros(1, 1, 1, 4))
    assert module.eval()(torch.zeros(1, 1, 1, 4)).isfinite().all()
    with pytest.raises(ValueError, match=r"MlpLight: input must be \(B, H, W, 4\), got shape \(1, 9, 4\)"):
        module(torch.zeros(1, 9, 4))


# Fusion


def fusion_tensors(channels=6, hidden=3):
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,), (channels, channels), (channels,))
    return [maps(*shape, seed=i) for i, shape in enumerate(shapes)]


def test_fusion_gradients():
    tensors = [maps(2, 3, 2, 6, seed=9), *fusion_tensors()]
    assert torch.autograd.gradcheck(tersor.pixel_adaptive_fusion, [t.requires_grad_() for t in tensors])


def test_fusion_refuses():
    tensors = fusion_tensors()
    with pytest.raises(ValueError, match=r"weight2 must be \(6, 3\) for input of 6 channels .* got shape \(3, 6\)"):
        tersor.pixel_adaptive_fusion(maps(2, 6), *tensors[:2], tensors[2].T, *tensors[3:])
    with pytest.raises(ValueError, match=r"weight1 must be \(3, 5\)"):
        tersor.pixel_adaptive_fusion(maps(2, 5), *tensors)
    with pytest.raises(TypeError, match=r"bias must be a .*Tensor, got NoneType"):
        tersor.pixel_adaptive_fusion(maps(2, 6), *tensors[:5], None)


# Block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("resolution", "batch", "height", "width", "shifts"),
    [
        (8, 1, 8, 8, (0, 2, -2)),
        ((8, 12), 2, 8, 12, (0, 2, -2)),
        (8, 1, 12, 4, (0, 2, -2)),  # another map than it is built for
        ((3, 6), 2, 3, 6, (0, 0, 0)),  # the smaller side is the window's size
        (None, 1, 9, 6, (0, 2, -2)),
        (None, 2, 4, 7, (0, 0, 0)),
    ],
)
def test_block(training, resolution, batch, height, width, shifts):
    block = randomize(tersor.LadderBlock(12, 2, resolution, window_size=4)).double().train(training)
    check_gradients(block, block, lambda x: block_formula(block, shifts, x), maps(batch, height, width, 12))


def test_effective_window():
    expected = {14: (7, 3), (21, 7): (7, 0), 7: (7, 0), (5, 10): (5, 0), None: (7, 3), 28: (7, 3)}
    for resolution, (window, shift) in expected.items():
        layers = [branch.attn for branch in tersor.LadderBlock(12, 2, resolution).blocks]
        assert [layer.window_size for layer in layers] == [[window, window]] * 3
        assert [layer.shift_size for layer in layers] == [[0, 0], [shift, shift], [-shift, -shift]]
        assert layers[2].relative_position_bias_table.shape == ((2 * window - 1) ** 2, 2)
        assert [layer.pad for layer in layers] == [resolution is None] * 3


def test_a_small_map_changes_nothing_for_later_calls():
    block = randomize(tersor.LadderBlock(12, 2, window_size=4)).double().eval()
    x = maps(1, 9, 6, 12)
    before = block(x)
    block(maps(1, 3, 3, 12))
    assert torch.equal(block(x), before)


def test_published_keys():
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"{layer}.{p}" for layer in ("se.fc1", "se.fc2", "pointconv") for p in ("weight", "bias")}
    for index in range(3):
        layers = [
            "norm1",
            f"attn.{'kv' if index else 'qkv'}",
            "attn.proj",
            "norm2",
            *(f"mlp.conv.{i}" for i in (0, 3, 6)),
        ]
        keys |= {f"blocks.{index}.{layer}.{p}" for layer in layers for p in ("weight", "bias")}
        keys |= {f"blocks.{index}.mlp.conv.{i}.{p}" for i in (2, 5, 7) for p in norm}
        keys |= {f"blocks.{index}.attn.relative_position_{p}" for p in ("bias_table", "index")}
    block = tersor.LadderBlock(12, 2, 14)
    state = block.state_dict()
    assert set(state) == keys
    assert state["blocks.1.attn.relative_position_index"].shape == (49, 49)
    masks = {f"blocks.{index}.attn_mask": torch.zeros(4, 49, 49) for index in (1, 2)}
    block.load_state_dict(state | masks)
    block.load_state_dict({name: value for name, value in state.items() if "index" not in name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        block.load_state_dict(state | {"blocks.1.other": torch.zeros(1)})


def test_branches_drop_independently():
    torch.manual_seed(0)
    block = tersor.LadderBlock(12, 2, 14, drop_path=0.5)
    draws = []
    for branch in block.blocks:
        branch.drop_path.register_forward_hook(lambda _, inputs, output: draws.append((output == 0).flatten(1).all(1)))
    block(maps(64, 14, 14, 12, dtype=torch.float32))
    assert len(draws) == 6
    assert len({tuple(draw.tolist()) for draw in draws}) == 6
    assert 0.3 < torch.stack(draws).float().mean() < 0.7


def test_number_of_branches():
    for branches in (1, 2):
        block = tersor.LadderBlock(12, 2, 14, branches=branches)
        assert block(maps(1, 14, 14, 12, dtype=torch.float32)).shape == (1, 14, 14, 12)


@pytest.mark.parametrize("resolution", [(8, 12), None])
@pytest.mark.parametrize("training", [True, False])
def test_eager_baseline(resolution, training):
    ours = randomize(tersor.LadderBlock(12, 2, resolution, window_size=4)).double().train(training)
    eager = EagerLadderBlock(12, 2, resolution, window_size=4).double().train(training)
    eager.load_state_dict(ours.state_dict())
    weights = dict(ours.named_parameters())
    check_gradients(ours, ours, lambda x: functional_call(eager, weights, (x,)), maps(2, 8, 12, 12))


def test_autocast_trains():
    block, x = tersor.LadderBlock(12, 2, 14), maps(2, 14, 14, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = block(x)
    output.float().square().sum().backward()
    assert error(output, block(x)) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_compiles_to_one_graph():
    block, x = tersor.LadderBlock(12, 2, (8, 12), window_size=4), maps(2, 8, 12, 12, dtype=torch.float32)
    exact = copy.deepcopy(block)
    output, expected = torch.compile(block, fullgraph=True, backend="aot_eager")(x), exact(x)
    assert error(output, expected) < 1e-5
    output.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert error(ours.grad, theirs.grad) < 1e-4, name


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 100}, ValueError, r"LadderBlock: dim \(100\) must be a multiple of 3"),
        ({"num_heads": 3}, ValueError, r"dim \(4\) must be a positive multiple of num_heads \(3\)"),
        ({"branches": 4}, ValueError, "branches must be 1, 2 or 3, got 4"),
        ({"input_resolution": (14, 15)}, ValueError, r"W of input_resolution \(15\) must be a multiple .* \(7\)"),
        ({"input_resolution": (4, 6)}, ValueError, r"W of input_resolution \(6\) must be a multiple .* \(4\)"),
        ({"input_resolution": 0}, ValueError, "input_resolution must be an int or two ints of at least 1, got 0"),
        ({"window_size": 7.0}, TypeError, "window_size must be an int, got float"),
        ({"drop_path": 1.0}, ValueError, r"rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_block_refuses_options(options, kind, message):
    with pytest.raises(kind, match=message):
        tersor.LadderBlock(**{"dim": 12, "num_heads": 2, "input_resolution": 14} | options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 196, 12), r"LadderBlock: input must be \(B, H, W, 12\), got shape \(2, 196, 12\)"),
        ((2, 14, 14, 9), r"got shape \(2, 14, 14, 9\)"),
        ((2, 14, 15, 12), r"W \(15\) must be a multiple of the window's size \(7\)"),
    ],
)
def test_block_refuses_input(shape, message):
    with pytest.raises(ValueError, match=message):
        tersor.LadderBlock(12, 2, 14)(torch.zeros(shape))


# Folding


def test_folding_changes_no_result():
    block, x = randomize(tersor.LadderBlock(12, 2, (8, 12), window_size=4)).eval(), maps(2, 8, 12, 12)
    expected = copy.deepcopy(block).double()(x)
    assert tersor.fold_norms_(block) is block
    kinds = ("Conv2d", "GELU", "ChannelAffine", "Conv2d", "GELU", "Identity", "Conv2d", "Identity")
    assert tuple(type(layer).__name__ for layer in block.blocks[1].mlp.conv) == kinds
    with torch.no_grad():
        assert error(block(x.float()), expected) < 1e-5
        assert error(tersor.fold_norms_(block)(x.float()), expected) < 1e-5


def test_folding_refuses():
    with pytest.raises(ValueError, match="model must be in eval mode, but model is in training mode"):
        tersor.fold_norms_(tersor.LadderBlock(12, 2, 14))
    with pytest.raises(ValueError, match="model must hold a layer that can fold norms, got Linear"):
        tersor.fold_norms_(nn.Linear(1, 1).eval())
    with pytest.raises(TypeError, match=r"model must be a .*Module, got int"):
        tersor.fold_norms_(3)
    block = tersor.LadderBlock(12, 2, 14).eval()
    block.blocks[0].mlp.conv[5] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(ValueError, match=r"running statistics, but blocks\.0\.mlp\.conv\.5 has none"):
        tersor.fold_norms_(block)
    assert isinstance(block.blocks[2].mlp.conv[7], nn.BatchNorm2d)


def test_parts_have_the_published_shapes():
    branch = LadderBranch(tersor.LadderAttention(8, 2, 4, given_values=True), 8)
    assert branch(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8)
    assert ChannelGate(8, 4).fc1.weight.shape == (4, 8)
