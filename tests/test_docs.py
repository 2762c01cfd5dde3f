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
