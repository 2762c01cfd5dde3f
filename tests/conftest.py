"""Fixtures that all tests share: the seed, and the (device, backend) pairs that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import tersor
from tersor import _backends

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=60)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")

RUNS = [("cpu", "native"), ("cpu", "triton"), ("cpu", "reference"), ("cuda", "native"), ("cuda", "triton")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of nothing but slow tests come first, so that no worker is left alone with one at the end."""
    quick = {item.path for item in items if not item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path in quick)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240229)


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(run))
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """``(device, backend)`` with the backend forced; skipped with the reason where it cannot run."""
    device, backend = request.param
    operators = list(_backends.REGISTRY.values())
    reasons = {reason for op in operators if (reason := _backends._refusal(op, device, backend))}
    if len(reasons) and all(_backends._refusal(op, device, backend) for op in operators):
        pytest.skip(f"{backend} on {device}: {'; '.join(sorted(reasons))}")
    with tersor.use_backend(backend):
        yield device, backend


@pytest.fixture
def device(run: tuple[str, str]) -> str:
    return run[0]


@pytest.fixture
def backend(run: tuple[str, str]) -> str:
    return run[1]
