"""Converted models compiled ahead of time, and run by a process that knows nothing of the models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_models import Several, images
from safetensors.torch import load_file, save_file
from torch import nn

from tersor import compress
from tersor.compress import FakeQuantize, compile_package, load_package
from tersor.compress.package import _check_inputs, _sizes

# Every kind of packed layer: whole numbers, sparse ones, floats of few bits, sparse only, bits.
CASES = [
    ("resnet", "all"),
    ("resnet", "recu"),
    ("vit", "lsq-srste"),
    ("vit", "weight"),
    ("vit", "srste"),
    ("vit", "ste"),
]

LOADER = """
import sys
import torch
import tersor
from safetensors.torch import load_file, save_file
run = torch._inductor.aoti_load_package(sys.argv[1])
batches = load_file(sys.argv[2])
save_file({f"{key}/{name}": y for key, x in batches.items() for name, y in run(x).items()}, sys.argv[3])
assert not [name for name in sys.modules if name.startswith("tersor.models")]
checked = tersor.compress.load_package(sys.argv[1])
x = batches["4"]
assert all(y.equal(run(x)[name]) for name, y in checked(x).items())
for wrong in (torch.zeros(2, 3, 16, 17), torch.zeros(2, 3, 16, 16, dtype=torch.float64), torch.zeros(65, 3, 16, 16)):
    try:
        checked(wrong)
    except ValueError as error:
        assert "input 0 must be torch.float32 (" in str(error), error
    else:
        raise AssertionError(f"took {tuple(wrong.shape)}")
"""


def test_a_fresh_process_runs_every_kind_of_layer(tmp_path: Path) -> None:
    model = Several(CASES)
    for _ in range(6):
        compress.step(model)
    compress.convert_(model)
    path, batches, results = (tmp_path / name for name in ("model.pt2", "batches.safetensors", "results.safetensors"))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    assert compile_package(model, images(4), path, dynamic_shapes=shapes) == str(path)
    inputs = {str(batch): images(batch, 1) for batch in (1, 4, 20)}
    save_file(inputs, batches)
    command = [sys.executable, "-c", LOADER, str(path), str(batches), str(results)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=600)
    found = load_file(results)
    with torch.no_grad():
        for key, x in inputs.items():
            for name, expected in model(x).items():
                # But for rounding, unless it moves a value to the neighbouring level: 1/15 of the range at 4 bits.
                error = (found[f"{key}/{name}"] - expected).abs() / expected.abs().max()
                assert error.max() < 1e-5, (key, name)


def small(converted: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    compress.prepare_(model, compress.Recipe(FakeQuantize(4), skip_first=False))
    compress.calibrate_(model, torch.randn(2, 3, 4, 4))
    return compress.convert_(model) if converted else model


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, path = torch.randn(2, 3, 4, 4), tmp_path / "model.pt2"
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        compile_package(small, x, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have been prepared by prepare_, got Linear"):
        compile_package(nn.Linear(2, 2), x, path)
    with pytest.raises(ValueError, match="must be converted by convert_, got one that trains"):
        compile_package(small(converted=False), x, path)
    model = small()
    with pytest.raises(ValueError, match=r"path must end in '\.pt2', got .*\.so"):
        compile_package(model, x, tmp_path / "model.so")
    with pytest.raises(TypeError, match="inputs must be tensors, got int"):
        compile_package(model, (3,), path)  # type: ignore[arg-type]
    for wrong in (x[:, :2], x.double(), torch.randn(2, 3, 5, 5)):
        with pytest.raises(ValueError, match="inputs must be such as the model takes: "):
            compile_package(model, wrong, path)
    with pytest.raises(ValueError, match=r"torch\.export cannot take the model with these inputs"):
        compile_package(model, x, path, dynamic_shapes=({2: torch.export.Dim("height")},))
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(RuntimeError, match="a C\\+\\+ compiler is needed, found none of no-such-compiler"),
    ):
        compile_package(model, x, path)
    model[1].train()
    with pytest.raises(ValueError, match="must be in eval mode, got training mode in 1; call"):
        compile_package(model, x, path)
    assert not path.exists()


class Product(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * y


@pytest.mark.parametrize(
    ("dimension", "fitting", "wrong"),
    [
        (torch.export.Dim.DYNAMIC, (1, 2, 1000), ()),
        (torch.export.Dim("batch", max=64), (1, 4, 64), (65,)),
        (torch.export.Dim("batch", min=3, max=9), (3, 9), (1, 2, 10)),
        (None, (4,), (1, 3, 5)),
    ],
)
def test_sizes_that_a_file_takes(dimension: Any, fitting: tuple[int, ...], wrong: tuple[int, ...]) -> None:
    shapes = None if dimension is None else ({0: dimension}, {0: dimension})
    sizes = _sizes(torch.export.export(Product(), (torch.ones(4, 3), torch.ones(4, 3)), dynamic_shapes=shapes))
    sizes = json.loads(json.dumps(sizes))
    for batch in fitting:
        _check_inputs(sizes, (torch.ones(batch, 3), torch.ones(batch, 3)))
    for batch in wrong:
        with pytest.raises(
            ValueError, match=rf"input 0 must be torch\.float32 \(.*, 3\) .*, got torch\.float32 \({batch}, 3"
        ):
            _check_inputs(sizes, (torch.ones(batch, 3), torch.ones(batch, 3)))
    with pytest.raises(ValueError, match="input 1 must be"):
        _check_inputs(sizes, (torch.ones(4, 3), torch.ones(6, 3)))
    with pytest.raises(ValueError, match="input 1 must be"):
        _check_inputs(sizes, (torch.ones(4, 3), torch.ones(4, 3).double()))
    for inputs in ((), (torch.ones(4, 3),), (torch.ones(4, 3), 3)):
        with pytest.raises(TypeError, match="inputs must be 2 tensors for this file"):
            _check_inputs(sizes, inputs)


def test_what_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_package(tmp_path / "none.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.pt2: not a file that compile_package wrote, or damaged"):
        load_package(tmp_path / "text.pt2")
