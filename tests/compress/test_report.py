"""The report: bits, zeros, frozen share, bytes and multiply-adds of every layer, before and after converting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed import COMPOSITIONS, STEPS, TinyResNet, batch, prepared, tiny_vit, train
from torch import nn

from tersor import compress
from tersor.compress import FakeQuantize, NMSparse, Recipe, Rule
from tersor.compress.report import HEADER

MACS = {  # output elements times terms, of an 8 x 8 image
    "stem.0": 8 * 64 * 27,
    "layers.0.conv1": 8 * 64 * 72,
    "layers.0.conv2": 8 * 64 * 72,
    "layers.1.conv1": 16 * 16 * 72,
    "layers.1.conv2": 16 * 16 * 144,
    "layers.1.downsample.0": 16 * 16 * 8,
    "fc": 16 * 4,
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_multiply_adds_are_counted_before_and_after_converting(name: str) -> None:
    model = prepared(TinyResNet, COMPOSITIONS[name], STEPS).train()
    train(model)
    for size in (1, 5):
        report = compress.report(model, batch(size)[0])
        assert {row.layer: row.macs for row in report.rows} == MACS
        assert report.total.macs == sum(MACS.values())
    assert model.training
    assert (report.step, report.steps) == (STEPS, STEPS)
    compress.convert_(model)
    assert {row.layer: row.macs for row in compress.report(model, batch(2)[0]).rows} == MACS
    assert {row.macs for row in compress.report(model).rows} == {None}


def test_numbers_of_a_layer() -> None:
    recipe = Recipe(
        Rule(FakeQuantize(4, 8), NMSparse(2, 4)),
        Rule(NMSparse(1, 4), layers="layers.0.conv2"),
        Rule(FakeQuantize(3, 32, "ddtb"), layers="layers.1.conv1"),
    )
    model: Any = compress.prepare_(TinyResNet(), recipe, 1)
    compress.calibrate_(model, batch()[0])
    compress.step(model)
    rows = {row.layer: row for row in compress.report(model).rows}
    row = rows["layers.0.conv1"]
    assert (row.bits, row.input_bits, row.frozen) == (4, 8, 0.0)
    assert 0.5 < row.sparsity < 0.8  # what was dropped, and what is rounded to 0
    assert row.transform == "4-bit lsq, 8-bit input, 2:4 lbc"
    assert row.float_bytes == 576 * 4
    assert row.bytes == 288 // 2 + 144 // 2 + 8 * 4  # codes, index, steps
    row = rows["layers.0.conv2"]
    assert (row.bits, row.input_bits, row.sparsity) == (32, 32, 0.75)
    assert row.bytes == 144 * 4 + 144 // 4
    row = rows["layers.1.conv1"]
    assert (row.bits, row.input_bits, row.sparsity) == (3, 32, 0.0)
    assert row.bytes == 16 * 72 * 3 // 8 + 4
    row = rows["fc"]
    assert (row.transform, row.bits, row.bytes, row.float_bytes) == ("(the first or last layer)", 32, 272, 272)
    compress.convert_(model, fold_norms=False)
    packed = {row.layer: row for row in compress.report(model).rows}
    for name, row in rows.items():
        assert (packed[name].bits, packed[name].input_bits) == (row.bits, row.input_bits)
        assert (packed[name].sparsity, packed[name].transform) == (row.sparsity, row.transform)
        assert 0 <= packed[name].bytes - row.bytes <= 28 + 8  # numbers and bounds


def test_frozen_share_and_zeros_of_all() -> None:
    model = prepared(tiny_vit, COMPOSITIONS["lts+lbc+freeze"], 8)
    train(model, 8)
    report = compress.report(model)
    weights = {row.layer: model.get_submodule(row.layer).weight.numel() for row in report.rows}  # type: ignore[union-attr]
    for row in report.rows:
        layer: Any = model.get_submodule(row.layer)
        if row.frozen:
            assert row.frozen == int(layer.quantize_weight.counters[1]) / weights[row.layer]
    assert 0 < report.total.frozen < 1
    assert 0.3 < report.total.sparsity <= 0.5


def test_text_and_markdown() -> None:
    model = prepared(TinyResNet, COMPOSITIONS["lsq+lbc"], 1)
    compress.step(model)
    report = compress.report(model, batch()[0])
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows) + 3
    assert lines[0].split() == [word for title in HEADER for word in title.split()]
    assert lines[2].split()[0] == "layers.0.conv1"
    assert f"{100 * report.rows[1].sparsity:.0f} %" in lines[2]
    assert lines[-2].startswith("all layers ")
    assert not any(line.endswith(" ") for line in lines)
    table = report.to_markdown().splitlines()
    assert len(table) == len(report.rows) + 4
    assert {line.count("|") for line in table} == {10}
    assert set(table[1]) <= set("|-: ")


def test_it_needs_a_prepared_model_and_leaves_modes_alone() -> None:
    model = prepared(TinyResNet, COMPOSITIONS["lsq"])
    model.train()
    model.layers[0].eval()  # type: ignore[union-attr, index, operator]
    modes = [module.training for module in model.modules()]
    running = model.state_dict()["stem.1.running_mean"].clone()
    compress.report(model, batch()[0])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.state_dict()["stem.1.running_mean"], running)
    with pytest.raises(RuntimeError):
        compress.report(model, torch.zeros(1, 2, 8, 8))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="must have been prepared"):
        compress.report(nn.Linear(2, 2))


def test_rows_and_the_rest_are_the_whole_state() -> None:
    model = prepared(TinyResNet, next(iter(COMPOSITIONS.values())), STEPS).train()
    train(model)
    compress.convert_(model, fold_norms=False)
    found = compress.report(model)
    norms = [module.state_dict() for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert found.rest == sum(tensor.nbytes for state in norms for tensor in state.values()) > 0
    assert found.rest + found.total.bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert str(found).splitlines()[-1].split() == ["everything", "else", *[f"{found.rest:,}"] * 2]
