"""The examples of the documentation run as they stand, in order, and compute what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
from tersor.models.eager_attention import window_attention_partition

ROOT = Path(__file__).resolve().parent.parent


def run_page(name: str) -> dict[str, Any]:
    """Runs the page's Python blocks in one namespace, which it returns; errors have the page's line numbers."""
    path, names = ROOT / "docs" / name, {"__name__": name}
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    for block in blocks:
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], str(path), "exec"), names)
    return names


@pytest.fixture(scope="module")
def attention() -> dict[str, Any]:
    torch.manual_seed(0)
    return run_page("attention.md")


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)  # the page saves a file
    torch.manual_seed(0)
    return run_page("binary.md")


def test_the_pages_packed_layers_compute_what_it_says(binary: dict[str, Any]) -> None:
    torch.testing.assert_close(binary["model"](binary["images"]), binary["expected"], rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.hardtanh(binary["sums"] * 0.01 + binary["x"].sign())
    assert torch.equal(binary["scaled"], expected)
    assert binary["maps"].eq(binary["maps"].round()).all()
    saved = torch.load("packed.pt", weights_only=True)
    bits = sum(t.numel() for name, t in saved.items() if name.endswith(".packed"))
    assert bits * 8 == sum(
        p.numel() for n, p in binary["resnet20_recu"]().named_parameters() if ".conv" in n and p.dim() == 4
    )


@pytest.fixture(scope="module")
def tokens() -> dict[str, Any]:
    torch.manual_seed(0)
    return run_page("tokens.md")


def test_the_pages_ways_to_the_same_tokens_agree(tokens: dict[str, Any]) -> None:
    torch.testing.assert_close(tokens["same"], tokens["kept"])
    torch.testing.assert_close(tokens["normalized"], tokens["norm"](tokens["kept"]))
    every = tokens["embed"](tokens["images"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens["chosen"], tersor.gather_tokens(every, tokens["patches"]), rtol=1e-4, atol=1e-4)
    whole, _ = tersor.resplit_tokens(
        tokens["average"], tokens["coarse"], every, tokens["reuse"], tokens["position"], tokens["cls"]
    )
    torch.testing.assert_close(tokens["less"], whole, rtol=1e-4, atol=1e-4)
    assert tokens["tokens"].shape == tokens["less"].shape == (2, 125, 384)


def test_the_pages_batch_gets_smaller(tokens: dict[str, Any]) -> None:
    confidence = tokens["logits"].softmax(1).amax(1)
    unsure = (confidence < 0.5).nonzero()[:, 0]
    assert 0 < len(unsure) == int(tokens["count"]) <= len(tokens["rows"]) < len(unsure) + 8
    assert torch.equal(tokens["rows"][: len(unsure)], unsure)
    assert tokens["step"].losses.shape == (4,)
    assert tokens["fast"].shape == tokens["result"].logits.shape == (8, 10)


def eager(layer: tersor.WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """The published way between the layer's own projections."""
    qkv = layer.qkv(x).unflatten(3, (3, layer.num_heads, -1)).unbind(3)
    bias = layer.relative_position_bias_table
    return layer.proj(window_attention_partition(*qkv, layer.window_size, layer.shift_size, bias).flatten(3))


def test_the_swin_blocks_compute_what_the_published_way_computes(attention: dict[str, Any]) -> None:
    x = attention["images"]
    for block in attention["blocks"]:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)  # starts so small that it would not show
    assert [block.attn.shift_size for block in attention["blocks"]] == [[0, 0], [3, 3]]
    with torch.no_grad():
        output = attention["blocks"](x)
        for block in attention["blocks"]:
            x = x + eager(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
    assert output.shape == attention["features"].shape
    torch.testing.assert_close(output, x, rtol=1e-5, atol=1e-5)


def test_a_mask_changes_pairs_outside_only(attention: dict[str, Any]) -> None:
    """The page's mask: inside, nothing changes at all; outside, rows of mixed windows do."""
    query, key, value, outside = (attention[name] for name in ("query", "key", "value", "outside"))
    changed = (attention["masked"] - tersor.window_attention(query, key, value, 8, 4)).abs().amax((0, 3, 4)) > 1e-6
    assert not changed[~outside[0]].any()
    assert changed[outside[0]].any()


def test_every_padding_keeps_the_size(attention: dict[str, Any]) -> None:
    for name in ("whole", "tiled", "published"):
        assert attention[name].shape == attention["photograph"].shape
    assert attention["table"].grad is not None
