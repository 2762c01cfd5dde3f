"""WindowAttention: the published layer's formula, names, padding and checkpoints; refusals."""

import pytest
import torch
import torch.nn.functional as F
from window_formula import check_gradients, dense_attention, error, randomize

import tersor
from tersor.attention.window_attention import bias_index


def layer(dim=12, window=(4, 3), shift=(2, 1), heads=3, **options):
    return randomize(tersor.WindowAttention(dim, window, shift, heads, **options)).double()


def maps(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def formula(module, window, shift, input):
    """torchvision's steps: pad, drop the shift where a window covers the map, project, attend, project, crop."""
    height, width = input.shape[1:3]
    x = F.pad(input, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    shift = [0 if w >= n else s for n, w, s in zip(x.shape[1:3], window, shift, strict=True)]
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(3, (3, module.num_heads, -1))
    output = dense_attention(*qkv.unbind(3), window, shift, module.relative_position_bias_table).flatten(3)
    return F.linear(output, module.proj.weight, module.proj.bias)[:, :height, :width]


@pytest.mark.parametrize(("height", "width"), [(8, 9), (7, 5), (4, 9), (3, 3), (9, 2), (1, 1)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (0, 2), (3, 0)])
def test_formula(height, width, shift):
    module = layer(shift=shift)
    check_gradients(module, module, lambda x: formula(module, (4, 3), shift, x), maps(2, height, width, 12))


def test_state_dict_is_torchvisions():
    state = layer().state_dict()
    assert set(state) == {
        "qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_bias_table", "relative_position_index",
    }  # fmt: skip
    assert state["relative_position_bias_table"].shape == (7 * 5, 3)
    assert state["relative_position_index"].dtype == torch.int64
    assert torch.equal(state["relative_position_index"], bias_index((4, 3)).flatten())
    assert set(layer(qkv_bias=False, proj_bias=False).state_dict()) == set(state) - {"qkv.bias", "proj.bias"}


def test_equals_torchvision():
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    theirs = randomize(swin.ShiftedWindowAttention(12, [4, 4], [2, 2], 3)).double()
    ours = tersor.WindowAttention(12, [4, 4], [2, 2], 3).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert error(ours(maps(2, 10, 12, 12)), theirs(maps(2, 10, 12, 12))) < 1e-12


@pytest.mark.parametrize("stored", ["flat", "square", "missing"])
@pytest.mark.parametrize("assign", [False, True])
def test_the_index_loads_in_either_shape_or_not_at_all(stored, assign):
    source, target = layer(), tersor.WindowAttention(12, (4, 3), (2, 1), 3)
    state = source.state_dict()
    index = state.pop("relative_position_index")
    if stored != "missing":
        state["relative_position_index"] = index if stored == "flat" else index.view(12, 12)
    given = dict(state)
    target.load_state_dict(state, assign=assign)
    assert state.keys() == given.keys()
    assert torch.equal(target.relative_position_index, index)
    assert error(target.double()(maps(1, 8, 9, 12)), source(maps(1, 8, 9, 12))) < 1e-6


def test_another_index_is_refused():
    state = layer().state_dict()
    with pytest.raises(RuntimeError, match=r"relative_position_index must be that of \(4, 3\) windows"):
        layer().load_state_dict(state | {"relative_position_index": bias_index((3, 4)).flatten()})
    with pytest.raises(RuntimeError, match="size mismatch for relative_position_bias_table"):
        layer(window=(4, 4)).load_state_dict(state)


def test_dropout_is_off_in_eval():
    module = layer(dropout=0.5)
    x = maps(1, 8, 9, 12)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_one_int_stands_for_two():
    assert layer(window=4, shift=2).window_size == [4, 4]
    assert layer(window=4, shift=2).shift_size == [2, 2]


def test_bfloat16_autocast_trains():
    module, x = layer().float(), maps(2, 7, 5, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert error(output, module(x)) < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_compiles_to_one_graph():
    module, x = layer().eval(), maps(2, 7, 5, 12)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dim": 10}, ValueError, r"WindowAttention: dim \(10\) must be a positive multiple of num_heads \(3\)"),
        ({"dim": 12.0}, TypeError, "dim must be an int, got float"),
        ({"heads": 0}, ValueError, r"num_heads \(0\)"),
        ({"window": (4, 0)}, ValueError, r"window_size must be an int or two ints of at least 1, got \(4, 0\)"),
        ({"window": (4, 4, 4)}, ValueError, "window_size must be an int or two ints"),
        ({"shift": (4, 0)}, ValueError, r"shift must be .* nearer to 0 than the window's size \(4, 3\), got \(4, 0\)"),
        ({"shift": "1"}, TypeError, "shift must be an int or two ints, got str"),
        ({"attention_dropout": 0.1}, ValueError, "attention_dropout must be 0 .* got 0.1"),
        ({"dropout": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
    ],
)
def test_bad_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("input", "kind", "message"),
    [
        (
            torch.zeros(2, 72, 12),
            ValueError,
            r"WindowAttention: input must be \(B, H, W, 12\), got shape \(2, 72, 12\)",
        ),
        (torch.zeros(2, 8, 9, 13), ValueError, r"input must be \(B, H, W, 12\), got shape \(2, 8, 9, 13\)"),
        (torch.zeros(2, 8, 0, 12).double(), ValueError, "W must be at least 1"),
        (torch.zeros(2, 8, 9, 12, dtype=torch.int32), TypeError, "input must be float16, .* got torch.int32"),
        ([1], TypeError, "input must be a torch.Tensor, got list"),
    ],
)
def test_bad_input_is_refused(input, kind, message):
    with pytest.raises(kind, match=message):
        layer()(input)
