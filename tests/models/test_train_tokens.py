"""The command end to end in small, its resumption bit for bit, its data, what it counts and compares, its refusals."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.models import _command, _tokens_data, _tokens_measure, _tokens_train, train_tokens
from tersor.models._command import StateError
from tersor.models._tokens_measure import THRESHOLDS, Setting, frontier, judge, macs, samples, settings
from tersor.models._tokens_train import METHODS, Config, Progress, Run, train

SMALL: dict[str, Any] = {"epochs": 3, "iterations": 2, "batch_size": 4, "width": 16, "depth": 4, "test_images": 24}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user runs it, in small: interrupted, resumed, all files there and consistent."""
    monkeypatch.setattr(_tokens_measure, "BATCHES", 1)
    once = train

    def interrupted(config: Config, *others: Any) -> Any:
        if config.seed == 1:
            raise KeyboardInterrupt
        return once(config, *others)

    monkeypatch.setattr(_tokens_train, "train", interrupted)
    arguments = [*ARGUMENTS, "--seeds", "2", "--rounds", "1", "--output", str(tmp_path)]
    assert train_tokens.main(arguments) == 130
    assert "--resume goes on from" in capsys.readouterr().err
    monkeypatch.setattr(_tokens_train, "train", once)
    states = sorted(tmp_path.glob("state_*"))
    before = [state.stat().st_mtime_ns for state in states]
    assert len(before) == len(METHODS)
    assert train_tokens.main([*arguments, "--resume"]) == 0
    assert [state.stat().st_mtime_ns for state in states] == before  # what was finished is not trained again
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert set(results) == {"about", "options", "backends", "threshold of the samples", "coverage", *METHODS}
    assert results["threshold of the samples"] in THRESHOLDS
    for method in METHODS:
        assert len(results[method]) == 2
        for run in results[method]:
            assert len(run["loss"]) == 3
            assert [point["setting"] for point in run["points"]] == [each.label for each in settings(method)]
            assert all(point["speed"] > 0 for point in run["points"])
    said, page = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    assert results["about"]["commit"] in page
    assert page.count("\n| ") == 2 + sum(len(settings(method)) for method in METHODS)
    accuracy = train_tokens.mean_and([run["points"][0]["test"] for run in results["ViT 96"]])
    assert f"| {accuracy} |" in page
    assert accuracy in said
    for name in ("tokens.png", "samples.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("method", ["CF-ViT", "SuperViT", "ViT 48"])
def test_an_interrupted_run_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    config = Config(method, **SMALL)
    whole, expected = train(config, tmp_path)
    config.state_file(tmp_path).unlink()

    def interrupt(progress: Progress, step: int) -> None:
        if len(progress.loss) == 2 and step == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, report=interrupt)
    model, progress = train(config, tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert progress.loss == expected.loss
    assert progress.points == expected.points
    start = config.build().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    config = Config("CF-ViT", **SMALL)
    train(config, tmp_path)
    with pytest.raises(StateError, match="batch_size 4 there, 5 here"):
        train(Config("CF-ViT", **SMALL | {"batch_size": 5}), tmp_path, resume=True)
    config.state_file(tmp_path).write_bytes(b"nonsense")
    with pytest.raises(StateError):
        train(config, tmp_path, resume=True)


def test_all_methods_see_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, seen = _tokens_data.draw, []

    def watched(count: int, generator: torch.Generator) -> Any:
        seen.append(draw(count, generator))
        return seen[-1]

    monkeypatch.setattr(_tokens_data, "draw", watched)
    for method in METHODS:
        Run(Config(method, **SMALL)).epoch(1, Progress(), lambda step: None)
    for images, labels in seen[2:]:
        assert any(torch.equal(images, others) and torch.equal(labels, theirs) for others, theirs in seen[:2])
    assert len(seen) == 2 * len(METHODS)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_no_window_of_one_part_is_in_another() -> None:
    parts = _tokens_data.corners()
    for number, picture in enumerate(_tokens_data.pictures(_tokens_data.CELL)):
        corners = [set(parts[part][number]) for part in _tokens_data.PARTS]
        assert min(map(len, corners)) >= 5
        assert sum(map(len, corners)) == len(set.union(*corners))  # disjoint
        for top, left in set.union(*corners):
            assert top % _tokens_data.CELL == left % _tokens_data.CELL == 0
            assert top + _tokens_data.CELL <= picture.values.shape[0]
            assert left + _tokens_data.CELL <= picture.values.shape[1]


def test_windows_are_of_many_sizes_on_grey() -> None:
    images, labels = _tokens_data.draw(200, torch.Generator().manual_seed(0))
    assert images.shape == (200, 1, 96, 96)
    assert len(labels.unique()) == 10
    sides = images.ne(0).any(2).sum(2).flatten()  # columns with a pixel that is not 0
    assert sides.max() <= _tokens_data.CELL
    whole = sides[sides >= _tokens_data.SMALLEST]
    assert len(whole) > 180  # parts of the retina and of the night sky are flat
    assert len(whole.unique()) > 15
    assert not torch.equal(_tokens_data.fixed_set("test", 20)[0], _tokens_data.fixed_set("validation", 20)[0])


def test_cost_of_a_plain_network_is_what_torch_counts() -> None:
    config = Config("ViT 64", **SMALL)
    model = config.build().eval()
    with FlopCounterMode(display=False) as counter:
        model(_tokens_data.fixed_set("test", 1)[0])
    attention = 3 * 2 * 17**2 * 16 + 2 * 17 * 16  # which torch does not count on the CPU
    assert macs(config, settings("ViT 64")[0], 0.0) == counter.get_total_flops() / 2 + attention


def test_cost_of_fewer_tokens() -> None:
    deep = SMALL | {"depth": 5}
    config, plain = Config("SuperViT", **deep), macs(Config("ViT 96", **deep), settings("ViT 96")[0], 0.0)
    assert macs(config, Setting("", (96, 1.0)), 0.0) == plain
    width, mlp = 16, 2 * 32 * 16
    dropped = 37 - 20  # ceil(0.5 * 37) and the class token stay, from the MLP of the last but one block
    assert macs(config, Setting("", (96, 0.5)), 0.0) == plain - dropped * (mlp + 2 * width**2 + 2 * width)
    coarse, threshold = Config("CF-ViT", **SMALL), settings("CF-ViT")[0]
    assert macs(coarse, threshold, 0.0) == macs(Config("ViT 48", **SMALL), settings("ViT 48")[0], 0.0)
    tokens = 1 + 4 * 5 + 4  # five of nine are split
    again = 3 * tokens * (4 * width**2 + 2 * tokens * width + mlp) + 10 * width
    again += 2 * tokens * width**2 + 2 * width**2 + 2 * tokens * width + mlp  # the last block, for the class token
    again += 20 * 256 * width + 5 * (2 * width**2 + 2 * 10 * width + mlp + mlp)  # patches, the last coarse block, reuse
    assert macs(coarse, threshold, 0.5) - macs(coarse, threshold, 0.0) == again / 2


def test_judge_of_cf_vit(tmp_path: Path) -> None:
    config = Config("CF-ViT", **SMALL)
    model, progress = train(config, tmp_path)
    points = progress.points
    assert points == judge(config, model)
    shares = [point["fine"] for point in points]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.9
    images, labels = _tokens_data.fixed_set("test", 24)
    with torch.no_grad():
        for point, logits in zip((points[0], points[-1]), model(images), strict=True):
            assert point["test"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_samples(tmp_path: Path) -> None:
    config = Config("CF-ViT", **SMALL)
    model: Any = train(config, tmp_path)[0]
    images = _tokens_data.fixed_set("test", 24)[0]
    threshold = model.infer(images, 0.0).confidence.median().item()
    found = samples(config, model, threshold, 2)
    assert [sample.unsure for sample in found] == [False, False, True, True]
    for sample in found:
        assert (sample.confidence < threshold) == sample.unsure
        assert len(set(sample.split)) == (5 if sample.unsure else 0)
        assert sample.unsure or sample.first == sample.last


def test_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config("CF-ViT", **SMALL)
    model: Any = train(config, tmp_path)[0]
    images = torch.zeros(3, 1, 96, 96)  # the third is flat: not counted
    images[0, 0, :32, :64] = 1  # coarse tokens 0 and 1
    images[1, 0, 64:, 72:] = 1  # coarse token 8
    monkeypatch.setattr(_tokens_data, "fixed_set", lambda part, count: (images, torch.zeros(3)))
    for split, expected in (([0, 1, 2, 3, 8], 1.0), ([0, 5, 6, 7, 8], 0.75), ([1, 2, 3, 4, 5], 0.25)):
        monkeypatch.setattr(_tokens_measure, "_split", lambda *_, split=split: torch.tensor([split] * 3))
        assert _tokens_measure.coverage(config, model) == expected


def test_frontier() -> None:
    points = [(1.0, 50.0), (2.0, 70.0), (4.0, 60.0), (5.0, 100.0)]
    assert frontier(points, 0.5) is None
    assert frontier(points, 1.0) == 50
    assert frontier(points, 1.5) == 60
    assert frontier(points, 4.0) == 90  # two thirds of the last, a third of the second
    assert frontier(points, 9.0) == 100


def test_comparison_picks_by_the_validation_images() -> None:
    def run(*points: tuple[float, float, float]) -> Progress:
        keys = ("speed", "validation", "test")
        return Progress(points=[{"macs": 1e6 / p[0]} | dict(zip(keys, p, strict=True)) for p in points])

    groups = {"CF-ViT": [run((100, 61, 99), (50, 72, 69), (200, 99, 99))], "SuperViT": [run((50, 70, 75))]}
    groups |= {"ViT 48": [run((100, 60, 61))], "ViT 96": [run((50, 70, 72))]}
    _tokens_measure.compare(groups)
    assert _tokens_measure.best(groups, "CF-ViT", "seconds") == 1
    first, second, cheap = groups["CF-ViT"][0].points
    assert first["against plain by seconds"] == 38
    assert second["against plain by seconds (validation)"] == 2
    assert second["against plain by macs"] == -3
    assert cheap["against plain by seconds"] is None
    assert groups["SuperViT"][0].points[0]["against plain by seconds"] == 3


def test_mean_and_deviation() -> None:
    values = [60.0, 62.0, 67.0]
    assert train_tokens.mean_and(values) == f"63.00 +- {statistics.stdev(values):.2f}"
    assert train_tokens.mean_and(values[:1]) == "60.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 10000, got '0'"),
        (["--depth", "3"], "argument --depth"),
        (["--width", "30"], "--width must be a multiple of 4, got 30"),
        (["--seeds", "none"], "argument --seeds"),
        (["--rounds", "0"], "argument --rounds"),
        (["--device", "tpu"], "must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "CUDA devices here"),
        (["--output", __file__], "is a file, not a folder"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_tokens.main(["--output", str(tmp_path), *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("module", list(_command.PHOTOGRAPHS))
def test_missing_extras_give_one_line(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert train_tokens.main([]) == 1
    said = capsys.readouterr().err
    assert said == f'train_tokens needs {_command.PHOTOGRAPHS[module]}: pip install "tersor[demo]"\n'
