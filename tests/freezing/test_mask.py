"""Packed masks, schedules and plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tersor
from tersor.freezing import FreezeSchedule, freeze_plan, mask_size, pack_mask, unpack_mask


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 100))
def test_masks_come_back(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_mask(mask)
    assert packed.shape == (mask_size(shape),)
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_bit_order() -> None:
    assert pack_mask(torch.arange(11) == 9).tolist() == [0, 2]
    assert pack_mask(torch.arange(11) < 3).tolist() == [7, 0]


def test_masks_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"mask must be a bool tensor, got torch\.float32"):
        pack_mask(torch.zeros(3))
    with pytest.raises(TypeError, match="frozen must be a uint8 tensor"):
        unpack_mask(torch.zeros(3), (3,))
    with pytest.raises(ValueError, match=r"frozen must have shape \(1,\)"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (3,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batches_per_epoch": 0}, ValueError, "batches_per_epoch must be at least 1, got 0"),
        ({"batches_per_epoch": 2.5}, TypeError, "batches_per_epoch must be an int"),
        ({"warmup_epochs": 5}, ValueError, "warmup_epochs must be less than epochs 5 for growth 'linear', got 5"),
        ({"warmup_epochs": 5, "growth": "sine"}, ValueError, "warmup_epochs must be less than epochs"),
        ({"growth": "cubic"}, ValueError, "growth must be one of fixing, linear, sine, got 'cubic'"),
        ({"granularity": "row"}, ValueError, "granularity must be one of element, tile, channel, layer, got 'row'"),
        ({"momentum": 1.0}, ValueError, "momentum must be from 0 to below 1, got 1.0"),
        ({"rate": float("inf")}, ValueError, "rate must be a finite number"),
        ({"quantile": 0}, ValueError, "quantile must be above 0"),
        ({"tile": (0, 4)}, ValueError, "tile must be two sizes of at least 1"),
    ],
)
def test_bad_schedules(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FreezeSchedule(**({"batches_per_epoch": 10, "epochs": 5} | options))


def test_a_constant_rate_needs_no_end() -> None:
    assert FreezeSchedule(10, 1, warmup_epochs=5, growth="fixing").warmup_steps == 50


def test_blocks() -> None:
    shapes = {"element": (1, 1), "tile": (64, 288), "channel": (1, 900), "layer": (70, 900)}
    for granularity, block in shapes.items():
        assert FreezeSchedule(1, 1, granularity=granularity, tile=(64, 32)).block((70, 100, 3, 3)) == block


def mask_with(rows: Any = (), columns: Any = ()) -> torch.Tensor:
    mask = torch.zeros(64, 48, dtype=torch.bool)
    mask[list(rows)] = True
    mask[:, list(columns)] = True
    return mask


@pytest.mark.parametrize(
    ("mask", "level", "work"),
    [
        (mask_with(), "dense", 1),
        (torch.rand(64, 48) < 0.9, "dense", 1),
        (mask_with(rows=range(64)), "layer", 0),
        (mask_with(rows=range(1, 64, 2)), "rows", 0.5),
        (mask_with(columns=range(0, 48, 3)), "columns", 2 / 3),
    ],
)
def test_the_plan_goes_by_the_mask(mask: torch.Tensor, level: str, work: float) -> None:
    for shape in ((64, 48), (64, 48, 3, 3)):
        whole = mask if len(shape) == 2 else mask[:, :, None, None].expand(shape)
        plan = freeze_plan(pack_mask(whole), shape, tile=(16, 16))
        assert (plan.level, plan.work) == (level, pytest.approx(work))


def test_tiles_are_chosen_where_a_kernel_computes_them() -> None:
    rows, columns = torch.arange(64)[:, None] // 16, torch.arange(48) // 16
    frozen = pack_mask((rows + columns) % 2 == 0)
    with tersor.use_backend("reference"):  # which computes the dense product and masks it
        assert freeze_plan(frozen, (64, 48), tile=(16, 16)).level == "dense"
    if tersor._backends.running("frozen_linear_backward", "cpu") == "native":
        plan = freeze_plan(frozen, (64, 48), tile=(16, 16))
        assert (plan.level, plan.work, plan.tile) == ("tiles", 0.5, (16, 16))
        assert plan.listed is not None
        assert plan.listed.tolist() == [[r, c] for r in range(4) for c in range(3) if (r + c) % 2]


def test_the_last_tiles_are_smaller() -> None:
    plan = freeze_plan(pack_mask(mask_with(rows=range(60))), (64, 48), tile=(60, 40), level="tiles")
    assert plan.work == 4 / 64


def test_groups_leave_out_whole_layers_only() -> None:
    frozen = pack_mask(mask_with(rows=range(32))[:, :, None, None])
    assert freeze_plan(frozen, (64, 48, 1, 1), groups=4).level == "dense"
    with pytest.raises(ValueError, match="that groups=4 allows, got 'rows'"):
        freeze_plan(frozen, (64, 48, 1, 1), groups=4, level="rows")


def test_bad_plans() -> None:
    frozen = pack_mask(mask_with())
    with pytest.raises(ValueError, match="shape must be"):
        freeze_plan(frozen, (64, 24, 2))
    with pytest.raises(ValueError, match="level 'layer' needs a mask with all elements frozen"):
        freeze_plan(frozen, (64, 48), level="layer")
    with pytest.raises(ValueError, match="tile must be two sizes"):
        freeze_plan(frozen, (64, 48), tile=(0, 1))
