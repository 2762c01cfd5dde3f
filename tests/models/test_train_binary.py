"""The command end to end in small, its resumption bit for bit, what it compares and writes, its data, its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.binary import BinaryConv2d, PackedBinaryConv2d, ReCUConv2d, ReSTEConv2d, recu_tau, reste_o
from tersor.models import _binary_measure, _binary_train, _command, _patches, train_binary
from tersor.models._binary_measure import BATCHES, measure
from tersor.models._binary_train import BLOCKS, METHODS, Config, Progress, Run, load_model, predict, train
from tersor.models._command import StateError

SMALL: dict[str, Any] = {"epochs": 3, "iterations": 2, "batch_size": 4, "width": 8, "patches": 24}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
LAYERS = {"ste": BinaryConv2d, "recu": ReCUConv2d, "reste": ReSTEConv2d}
BINARY = 3 * 3 * 2  # stages, blocks, convolutions of a block


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it, in small: interrupted, resumed, all files there and consistent."""
    monkeypatch.setattr(_binary_measure, "IMAGES", 4)
    once = train

    def interrupted(config: Config, *others: Any) -> Any:
        if config.seed == 1:
            raise KeyboardInterrupt
        return once(config, *others)

    monkeypatch.setattr(_binary_train, "train", interrupted)
    arguments = [*ARGUMENTS, "--seeds", "2", "--rounds", "1", "--output", str(tmp_path)]
    assert train_binary.main(arguments) == 130
    assert "--resume goes on from" in capsys.readouterr().err
    monkeypatch.setattr(_binary_train, "train", once)
    states = sorted(tmp_path.glob("state_*"))
    before = [state.stat().st_mtime_ns for state in states]
    assert len(before) == len(METHODS)
    assert train_binary.main([*arguments, "--resume"]) == 0
    assert [state.stat().st_mtime_ns for state in states] == before  # what was finished is not trained again
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(results) == {"about", "options", "backends", "patches a second", *METHODS}
    assert {"binary_conv2d_forward", "binary_packed_conv2d", "pack_signs"} <= set(results["backends"])
    page, said = (tmp_path / "results.md").read_text(), capsys.readouterr().out
    assert results["about"]["commit"] in page
    for method in METHODS:
        assert len(results[method]) == 2
        for run in results[method]:
            assert len(run["loss"]) == SMALL["epochs"]
            assert run["differ"] <= run["flipped"] <= 2
            assert run["gap"] < 1e-4
        accuracy = train_binary.mean_and([run["accuracy"] for run in results[method]])
        assert f"| {accuracy} |" in page
        assert accuracy in said
        file = tmp_path / f"model_{method}_seed0.safetensors"
        assert f"| {file.stat().st_size} |" in page
    assert results["recu"][0]["bytes"] < 0.5 * results["float"][0]["bytes"]
    timed = {*METHODS, "float channels-last", *(f"{method} packed" for method in LAYERS)}
    assert set(results["patches a second"]) == timed
    for found in results["patches a second"].values():
        assert set(found) == {str(size) for size in BATCHES}
        assert min(found.values()) > 0
    assert page.count("\n| ") == (2 + 4) + (2 + 8)
    assert (tmp_path / "binary.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    config = Config(method, **SMALL)
    whole, expected = train(config, tmp_path)
    written = config.model_file(tmp_path).read_bytes()
    config.state_file(tmp_path).unlink()

    def interrupt(progress: Progress, step: int) -> None:
        if len(progress.loss) == 2 and step == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=interrupt)
    model, progress = train(config, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert progress == expected
    assert config.model_file(tmp_path).read_bytes() == written
    start = config.build().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("block", BLOCKS)
def test_all_methods_start_from_the_same_weights_in_the_same_places(block: str) -> None:
    plain, *others = (Config(method, block=block, **SMALL).build() for method in METHODS)
    for method, other in zip(METHODS[1:], others, strict=True):
        state = other.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(value, state[name]), name
        more = {name.rpartition(".")[2] for name in set(state) - set(plain.state_dict())}
        assert more == ({"alpha", "tau"} if method == "recu" else set())
        binary = [m for m in other.modules() if type(m) is LAYERS[method]]
        assert len(binary) == BINARY
        assert sum(isinstance(m, nn.Conv2d) for m in other.modules()) == BINARY + 1  # the stem stays as it is
    assert not torch.equal(plain.state_dict()["conv1.weight"], Config("float", 1, **SMALL).build().conv1.weight)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("method", METHODS[1:])
def test_the_packed_model_is_the_trained_one(method: str, block: str, tmp_path: Path) -> None:
    config = Config(method, block=block, **SMALL)
    model, progress = train(config, tmp_path)
    packed = load_model(config, tmp_path)
    found = [m for m in packed.modules() if isinstance(m, PackedBinaryConv2d)]
    assert len(found) == BINARY
    assert all(m.fused for m in found)
    assert not any(isinstance(m, (BinaryConv2d, ReCUConv2d)) for m in packed.modules())
    assert progress.bytes == config.model_file(tmp_path).stat().st_size
    assert progress.flipped <= 1  # of 24
    ours, theirs = predict(packed, config)[0], predict(model, config)[0]
    assert progress.differ == int((ours.argmax(1) != theirs.argmax(1)).sum())
    same = (ours - theirs).abs().amax(1) < 1e-3
    assert int(same.sum()) == len(ours) - progress.flipped
    assert progress.gap == (ours - theirs)[same].abs().max().item()


def test_every_epoch_sets_tau_and_o() -> None:
    for method in ("recu", "reste"):
        run, found = Run(Config(method, **SMALL)), []
        for epoch in range(3):
            run.epoch(epoch, Progress(), lambda step: None)
            layer: Any = next(m for m in run.model.modules() if isinstance(m, LAYERS[method]))
            found.append(layer.tau.item() if method == "recu" else layer.weight_estimator.o)
        assert found == pytest.approx([(recu_tau if method == "recu" else reste_o)(epoch, 3) for epoch in range(3)])


def test_rate_rises_then_falls_to_zero() -> None:
    run = Run(Config("float", **SMALL | {"epochs": 10, "iterations": 10}))
    rates = []
    for step in range(100):
        run._set_rate(step)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:6] == pytest.approx([run.config.rate * share for share in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0)])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[52] == pytest.approx(run.config.rate / 2, rel=0.03)
    assert rates[-1] < 1e-3 * run.config.rate


def test_all_methods_see_the_same_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, seen = _patches.draw, []

    def watched(count: int, generator: torch.Generator) -> Any:
        seen.append(draw(count, generator))
        return seen[-1]

    monkeypatch.setattr(_patches, "draw", watched)
    for method in METHODS:
        Run(Config(method, **SMALL)).epoch(1, Progress(), lambda step: None)
    assert len(seen) == 2 * len(METHODS)
    for number, (images, labels) in enumerate(seen):
        assert torch.equal(images, seen[number % 2][0])
        assert torch.equal(labels, seen[number % 2][1])
    assert not torch.equal(seen[0][0], seen[1][0])


def test_patches_come_from_their_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pixel of a cell is replaced by its part's number, and the patches show which cells they are from."""
    parts, seen = ("train", "validation", "test"), []
    corners, cell = _patches.corners(), _patches.CELL
    for place, picture in enumerate(_patches.pictures(cell)):
        values = torch.full_like(picture.values, -1)
        for number, part in enumerate(parts):
            for top, left in corners[part][place]:
                values[top : top + cell, left : left + cell] = number
        monkeypatch.setitem(picture.__dict__, "values", values)
    monkeypatch.setattr(_patches, "folded", lambda patches: seen.append(torch.stack(patches)))
    for number, part in enumerate(parts):
        _, labels = _patches.draw(300, torch.Generator().manual_seed(0), part)
        assert bool((seen[-1] == number).all()), part
        assert seen[-1].shape == (300, 24, 24)
        assert len(labels.unique()) == 10


def test_patches_that_judge_are_always_the_same() -> None:
    images, labels = _patches.fixed_set("test", 20)
    assert images.shape == (20, 9, 8, 8)
    _patches.fixed_set.cache_clear()
    again, theirs = _patches.fixed_set("test", 20)
    assert torch.equal(images, again)
    assert torch.equal(labels, theirs)
    assert not torch.equal(images, _patches.fixed_set("validation", 20)[0])


def test_validation_leaves_the_test_patches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, asked = _patches.fixed_set, []

    def watched(part: str, count: int) -> Any:
        asked.append(part)
        return fixed(part, count)

    monkeypatch.setattr(_patches, "fixed_set", watched)
    for part in ("validation", "test"):
        asked.clear()
        train(Config("ste", part=part, **SMALL), tmp_path)
        assert set(asked) == {part}


def test_measure_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9 * 64, 10))
    lengths = {1: [2.0, 9.0, 4.0], 64: [8.0, 1.0, 2.0]}
    found = {size: iter([0.0, *times]) for size, times in lengths.items()}  # the first warms up

    def seconds(network: nn.Module, batches: tuple[torch.Tensor, ...]) -> float:
        return next(found[len(batches[0])])

    monkeypatch.setattr(_binary_measure, "_seconds", seconds)
    speeds = measure({"a": model}, 3, 1)
    assert speeds == {"a": {1: 64 / 4.0, 64: 64 / 2.0}}
    assert [next(rest, None) for rest in found.values()] == [None, None]


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    config = Config("reste", **SMALL)
    train(config, tmp_path)
    with pytest.raises(StateError, match=r"rate 0\.1 there, 0\.2 here"):
        train(Config("reste", rate=0.2, **SMALL), tmp_path, resume=True)
    config.state_file(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(StateError):
        train(config, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "1"], "must be a whole number from 2 to 10000, got '1'"),
        (["--width", "10"], "--width must be a multiple of 4, got 10"),
        (["--rate", "0"], "must be a number above 0, got '0'"),
        (["--decay", "much"], "must be a number above 0, got 'much'"),
        (["--block", "plain"], "invalid choice: 'plain'"),
        (["--part", "train"], "invalid choice: 'train'"),
        (["--seeds", "none"], "argument --seeds"),
        (["--output", __file__], "is a file, not a folder"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_binary.main(["--output", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("module", list(_command.PHOTOGRAPHS))
def test_missing_extras_give_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert train_binary.main([]) == 1
    said = capsys.readouterr().err
    assert said == f'train_binary needs {_command.PHOTOGRAPHS[module]}: pip install "tersor[demo]"\n'
