"""The command end to end in small, its resumption bit for bit, what it writes and its refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.models import _textures, train_sparsity
from tersor.models._command import StateError
from tersor.models._sparsity_train import Config, Progress, Run, load_model, predict, train
from tersor.sparsity import NMConv2d, PackedNMConv2d

SMALL: dict[str, Any] = {"epochs": 4, "iterations": 3, "batch_size": 4, "width": 16, "test_patches": 2}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
KINDS = [("dense", ""), ("srste", "2:4"), ("lbc", "2:4"), ("lbc", "1:16")]
PATCHES = 2 * len(_textures.NAMES)


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--seeds", "2", "--patterns", "2:4", "1:16", "--output", str(tmp_path)]
    assert train_sparsity.main(arguments) == 0
    assert "srste" in capsys.readouterr().out
    contents = json.loads((tmp_path / "results.json").read_text())
    sparse = [f"{method} {pattern}" for pattern in ("2:4", "1:16") for method in ("srste", "lbc")]
    assert set(contents) == {"about", "options", "dense", *sparse}
    for name in sparse:
        share = 1 / 2 if name.endswith("2:4") else 1 / 16
        for progress in contents[name]:
            assert progress["kept"][-1] == pytest.approx(share, rel=1e-3), name
            assert progress["kept"][0] == pytest.approx(1 if name.startswith("lbc") else share, rel=1e-3), name
            assert progress["same"] == PATCHES
            assert progress["gap"] < 1e-4
    assert contents["srste 2:4"][0]["bytes"] < 0.6 * contents["dense"][0]["bytes"]
    assert contents["lbc 1:16"][0]["bytes"] < 0.2 * contents["dense"][0]["bytes"]
    page = (tmp_path / "results.md").read_text()
    assert contents["about"]["commit"] in page
    assert page.count("\n| ") == 2 + 5
    assert f"{2 * PATCHES}/{2 * PATCHES}" in page
    assert (tmp_path / "sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("method", "pattern"), KINDS)
@pytest.mark.parametrize("finished", [1, 3], ids=["before the freeze", "after the freeze"])
def test_an_interrupted_run_goes_on_bit_for_bit(method: str, pattern: str, finished: int, tmp_path: Path) -> None:
    config = Config(method, pattern, **SMALL)
    whole, expected = train(config, tmp_path)
    written = config.model_file(tmp_path).read_bytes()
    config.state_file(tmp_path).unlink()

    def interrupt(progress: Progress, step: int) -> None:
        if len(progress.loss) == finished and step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=interrupt)
    model, progress = train(config, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for name in ("loss", "kept", "accuracy", "same", "gap", "bytes"):
        assert getattr(progress, name) == getattr(expected, name), name
    assert config.model_file(tmp_path).read_bytes() == written
    again, _ = train(config, tmp_path, resume=True)  # finished: nothing to do
    assert torch.equal(predict(again, 2)[0], predict(whole, 2)[0])


def test_all_methods_start_from_the_same_weights() -> None:
    dense, *others = (Run(Config(method, pattern, **SMALL)).model for method, pattern in KINDS)
    weights = [p for p in dense.parameters() if p.dim() > 1]
    for other in others:
        theirs = [p for name, p in other.named_parameters() if p.dim() > 1 and not name.endswith("alpha")]
        assert len(theirs) == len(weights)
        for ours, weight in zip(weights, theirs, strict=True):
            assert torch.equal(ours, weight)


@pytest.mark.parametrize(("method", "pattern"), KINDS[1:])
def test_stem_and_classifier_stay_dense_and_the_rest_does_not(method: str, pattern: str, tmp_path: Path) -> None:
    config = Config(method, pattern, **SMALL)
    model, _ = train(config, tmp_path)
    sparse = [m for m in model.modules() if isinstance(m, NMConv2d) or parametrize.is_parametrized(m)]
    assert len(sparse) == 3 * 2 + 2  # a block of two in each stage, and a shortcut in all but the first
    assert model.conv1 not in sparse
    assert model.fc not in sparse
    packed = [m for m in load_model(config, tmp_path).modules() if isinstance(m, PackedNMConv2d)]
    assert [f"{m.n}:{m.m}" for m in packed] == [pattern] * len(sparse)
    for layer, own in zip(sparse, packed, strict=True):
        weight = layer.sparse_weight() if isinstance(layer, NMConv2d) else layer.weight
        assert torch.equal(own.dense_weight(), weight)


def test_scores_are_trained_until_half_of_the_epochs() -> None:
    config = Config("lbc", "2:4", **SMALL)
    removed: list[int] = []
    frozen: list[bool] = []

    run = Run(config)
    assert run.schedule is not None
    schedule, progress = run.schedule, Progress()

    def look(step: int) -> None:
        removed.append(schedule.removed[0])
        frozen.append(not schedule.layers[0].alpha.requires_grad)

    for epoch in range(config.epochs):
        run.epoch(epoch, progress, look)
    assert removed == [0] * 3 + [4] * 3 + [5] * 6  # 5 - ceil(5 * (1 - 1/2)^3) = 4
    assert frozen == [False] * 6 + [True] * 6
    assert progress.kept[0] == 1
    assert progress.kept[2:] == [0.5, 0.5]


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    config = Config("lbc", "2:4", **SMALL)
    train(config, tmp_path)
    with pytest.raises(StateError, match="batch_size 4 there, 5 here"):
        train(Config("lbc", "2:4", **SMALL | {"batch_size": 5}), tmp_path, resume=True)
    config.state_file(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(StateError):
        train(config, tmp_path, resume=True)


def test_difference() -> None:
    mean, noise = train_sparsity.difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert mean == 2
    assert noise == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(train_sparsity.difference([1.0], [2.0])[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1"], "must be a whole number from"),
        (["--seeds", "0"], "must be a whole number from"),
        (["--patterns", "4:4"], "must be like 2:4"),
        (["--patterns", "two"], "must be like 2:4"),
        (["--width", "24"], "--width must be a multiple of m for --patterns 1:16"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_sparsity.main([*arguments, "--output", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())
