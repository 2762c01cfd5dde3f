"""Percentiles against numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import SIZES, values
from subject import Subject

import tersor
from tersor.quantization.percentile_bounds import interpolate_percentiles, percentile_bounds


def _function(input: torch.Tensor) -> torch.Tensor:
    return torch.cat(percentile_bounds(input, 97.0))


def _exact(input: torch.Tensor) -> torch.Tensor:
    return torch.cat(interpolate_percentiles(input.detach(), 97.0))


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    return (values(size, dtype, device),)


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("percentile_bounds",),
        raw=lambda name, size, dtype, device: (*_inputs(size, dtype, device), 97.0),
        sizes=SIZES,
        dtypes=(torch.float32,),  # the result of a half type is float32
        quantizer=True,
        differentiable=False,
        name="percentile_bounds",
    )
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 700),
    percentile=st.sampled_from([50.0, 75.0, 95.0, 99.0, 99.9, 100.0]),
    kind=st.sampled_from(["normal", "few", "wide", "infinite"]),
    seed=st.integers(0, 2**31),
)
def test_as_numpy(count: int, percentile: float, kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(count).astype(np.float32)
    if kind == "few":
        x = np.round(x)
    elif kind == "wide":
        x = (x * 10.0 ** generator.integers(-30, 30, count)).astype(np.float32)
    elif kind == "infinite" and count > 2:
        x[:2] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected = np.percentile(x.astype(np.float64), [100 - percentile, percentile]).astype(np.float32)
    for backend in ("native", "reference"):
        with tersor.use_backend(backend):
            found = torch.cat(percentile_bounds(torch.from_numpy(x), percentile)).numpy()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_float32(dtype: torch.dtype, run: tuple[str, str]) -> None:
    x = torch.randn(101, device=run[0]).to(dtype)
    lower, upper = percentile_bounds(x)
    assert lower.dtype == upper.dtype == torch.float32
    assert (lower.item(), upper.item()) == (x.sort().values[1].item(), x.sort().values[99].item())


def test_nan_stays(run: tuple[str, str]) -> None:
    lower, upper = percentile_bounds(torch.tensor([1.0, float("nan"), 2.0], device=run[0]))
    assert lower.isnan().all()
    assert upper.isnan().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"input must have at least one element, got shape \(0,\)"):
        percentile_bounds(torch.empty(0))
    with pytest.raises(ValueError, match="percentile must be from 50 to 100, got 101"):
        percentile_bounds(torch.randn(3), 101)
    with pytest.raises(TypeError, match="percentile must be a number, got str"):
        percentile_bounds(torch.randn(3), "99")
