"""The command end to end in small, its resumption bit for bit, its data and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.models import _textures, train_freezing
from tersor.models._digits import StateError
from tersor.models._freezing_train import Config, Progress, accuracy, train

SMALL = {"epochs": 3, "iterations": 3, "batch_size": 4, "width": 8, "test_patches": 2}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--seeds", "2", "--bits", "2", "--output", str(tmp_path)]
    assert train_freezing.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "element" in printed
    contents = json.loads((tmp_path / "results.json").read_text())
    assert set(contents) == {"about", "options", "full 32-bit", *(f"{m} 2-bit" for m in ("qat", *LTS))}
    for method in LTS:
        for progress in contents[f"{method} 2-bit"]:
            assert 0 < progress["eliminated"][-1] <= 1
            assert progress["eliminated"][0] == 0, "nothing freezes in the warm-up"
            assert len(progress["backward"]) == SMALL["epochs"]
    assert contents["qat 2-bit"][0]["frozen"] == [0, 0, 0]
    page = (tmp_path / "results.md").read_text()
    assert contents["about"]["commit"] in page
    assert page.count("\n| ") == 2 + 5
    for name in ("accuracy.png", "freezing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


LTS = ("element", "tile", "channel")


@pytest.mark.parametrize("method", ["full", "qat", *LTS])
def test_an_interrupted_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    config = Config(method, 32 if method == "full" else 2, **SMALL)
    whole, expected = train(config, tmp_path)
    config.state_file(tmp_path).unlink()

    def interrupt(progress: Progress, step: int) -> None:
        if len(progress.loss) == 2 and step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=interrupt)
    model, progress = train(config, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for name in ("loss", "frozen", "eliminated", "levels", "accuracy"):
        assert getattr(progress, name) == getattr(expected, name), name
    again, _ = train(config, tmp_path, resume=True)  # finished: nothing to do
    assert accuracy(again, 2) == pytest.approx(expected.accuracy)


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    config = Config("qat", 2, **SMALL)
    train(config, tmp_path)
    other: dict[str, Any] = SMALL | {"batch_size": 5}
    with pytest.raises(StateError, match="batch_size 4 there, 5 here"):
        train(Config("qat", 2, **other), tmp_path, resume=True)
    config.state_file(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(StateError):
        train(config, tmp_path, resume=True)


def test_training_and_test_cells_are_apart() -> None:
    for picture in _textures.pictures():
        assert picture.train
        assert picture.test
        assert not set(picture.train) & set(picture.test)
        rows, columns = picture.values.shape
        for top, left in (*picture.train, *picture.test):
            assert top % _textures.CELL == left % _textures.CELL == 0
            assert top + _textures.CELL <= rows
            assert left + _textures.CELL <= columns


def test_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    images, labels = _textures.draw(7, generator)
    assert images.shape == (7, 9, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    assert labels.shape == (7,)
    images, labels = _textures.test_set(3)
    assert labels.tolist() == [i for i in range(10) for _ in range(3)]
    assert torch.equal(images, _textures.test_set(3)[0])


@pytest.mark.parametrize("arguments", [["--bits", "9"], ["--epochs", "2"], ["--seeds", "0"], ["--threads", "none"]])
def test_bad_options(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_freezing.main([*arguments, "--output", str(tmp_path)])
    assert "must be a whole number from" in capsys.readouterr().err
