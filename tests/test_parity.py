"""Parity with the published implementations: every file of ``$TERSOR_VECTORS/<system>/*.npz``, on every backend.

The check is picked by the file's ``meta`` (its ``system``, then its ``op``), never by its name, so that files with
other shapes and seeds run through it as well. A system is covered once ``tests/support/parity_<system>.py`` exists.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subject import in_ci

ROOT = Path(__file__).resolve().parent.parent
VECTORS = Path(os.environ.get("TERSOR_VECTORS") or ROOT.parent / "shared" / "vectors")
COVERED = sorted(p.stem.removeprefix("parity_") for p in (ROOT / "tests" / "support").glob("parity_*.py"))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def vectors() -> Iterator[Any]:
    if not VECTORS.is_dir():
        return
    for path in sorted(VECTORS.glob("*/*.npz")):
        _, meta = read(path)
        if meta["system"] in COVERED:
            yield pytest.param(path, id=f"{meta['system']}-{path.stem}")


def test_vectors_are_there() -> None:
    found = list(vectors())
    if not found and not in_ci():
        pytest.skip(f"no vectors under {VECTORS}: set TERSOR_VECTORS to the folder that holds <system>/*.npz")
    assert found, f"in CI the vectors must be under {VECTORS}"


@pytest.mark.parametrize("path", list(vectors()))
def test_parity(path: Path, run: tuple[str, str]) -> None:
    device, backend = run
    arrays, meta = read(path)
    check = importlib.import_module(f"parity_{meta['system']}").check
    has_float64 = backend == "reference" or run == ("cpu", "native")
    for dtype in (torch.float32, torch.float64) if has_float64 else (torch.float32,):
        results = check(arrays, meta, dtype, device)
        expected = {name for name in arrays if name == "out" or name.startswith(("out_", "grad_", "state_"))}
        assert {name for name, _, _ in results} == expected, "every array of the file is compared"
        wrong = [f"{name}: {error:.2e} > {allowed:.2e}" for name, error, allowed in results if not error <= allowed]
        assert not wrong, f"{dtype}: {'; '.join(wrong)}"
