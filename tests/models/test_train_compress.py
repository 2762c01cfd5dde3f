"""The command end to end in small, its resumption bit for bit, what it writes and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.models import train_compress
from tersor.models._compress_train import PHASES, Config, Progress, load_model, predict, train

SMALL: dict[str, Any] = {"epochs": 2, "iterations": 3, "batch_size": 4, "width": 16, "test_patches": 64}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--seeds=2", "--rounds=3", f"--output={tmp_path}"]
    assert train_compress.main(arguments) == 0
    assert "times smaller" in capsys.readouterr().out
    contents = json.loads((tmp_path / "results.json").read_text())
    assert set(contents) == {"about", "options", *PHASES, "latencies", "layers"}
    for dense, compressed in zip(contents["dense"], contents["compressed"], strict=True):
        assert dense["same"] == compressed["same"] == SMALL["test_patches"]
        assert compressed["bytes"] < dense["bytes"] / 4  # the header and the ends weigh much in a network so small
        assert dense["frozen"][-1] == 0
    kept = {row["layer"]: row["sparsity"] for row in contents["layers"]}
    inner = [share for layer, share in kept.items() if layer not in ("conv1", "fc")]
    assert inner == pytest.approx([0.5] * len(inner), abs=0.01)
    assert kept["conv1"] == kept["fc"] == 0
    assert all(contents["latencies"][phase][size] > 0 for phase in PHASES[1:] for size in ("1", "64"))
    page = (tmp_path / "results.md").read_text()
    assert contents["about"]["commit"] in page
    for name in ("compress.png", "samples.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    start = train(Config("start", **SMALL), tmp_path)[0].state_dict()
    config = Config("compressed", **SMALL)
    whole, expected = train(config, tmp_path, start)
    written = config.model_file(tmp_path).read_bytes()
    config.state_file(tmp_path).unlink()

    def interrupt(progress: Progress, step: int) -> None:
        if len(progress.loss) == 1 and step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, start, report=interrupt)
    model, progress = train(config, tmp_path, start, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert vars(progress) == vars(expected)
    assert config.model_file(tmp_path).read_bytes() == written
    shipped, _ = predict(load_model(config, tmp_path), "test", 64)
    torch.testing.assert_close(shipped, predict(model, "test", 64)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--width", "6"], "--width must be a multiple of 4"), (["--epochs", "0"], "must be a whole number")],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_compress.main([*arguments, f"--output={tmp_path}"])
    assert message in capsys.readouterr().err
