"""The digit demo: learning, resuming bit for bit, its files, and what it refuses."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch

for _module in ("matplotlib", "rich", "safetensors", "sklearn"):
    pytest.importorskip(_module, reason=f'{_module} is not installed: pip install "tersor[demo]"')

from tersor.models import _digits, _digits_measure, train_digits  # noqa: E402

CONFIG = _digits.Config("tersor", epochs=2, batch_size=256)


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """The folder and the progress of an uninterrupted run of two epochs."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, _digits.train(CONFIG, folder)


def interrupt_in_epoch(epoch):
    def report(progress, step):
        if progress.epoch == epoch and step == 1:
            raise KeyboardInterrupt

    return report


def weights(path):
    return _digits.read_safetensors(path)[0]


def results(progress):
    """All but the times."""
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "step_seconds"}


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(two_epochs, tmp_path):
    folder, uninterrupted = two_epochs
    with pytest.raises(KeyboardInterrupt):
        _digits.train(CONFIG, tmp_path, report=interrupt_in_epoch(1))
    torch.rand(7)  # whatever happened to the random state meanwhile does not matter
    resumed = _digits.train(CONFIG, tmp_path, resume=True)
    assert results(resumed) == results(uninterrupted)
    ours, theirs = (weights(CONFIG.state_file(path)) for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_interruption_while_writing_leaves_the_last_state(two_epochs, tmp_path, monkeypatch):
    path = CONFIG.state_file(tmp_path)
    before = CONFIG.state_file(two_epochs[0]).read_bytes()
    path.write_bytes(before)

    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        _digits.write_safetensors(path, {"x": torch.ones(1)}, {})
    assert path.read_bytes() == before


def test_a_finished_run_is_not_trained_again(two_epochs):
    folder, finished = two_epochs
    again = _digits.train(CONFIG, folder, resume=True, report=interrupt_in_epoch(2))
    assert dataclasses.asdict(again) == dataclasses.asdict(finished)


def test_both_ways_see_the_same_data_and_agree(two_epochs, tmp_path):
    eager = _digits.train(dataclasses.replace(CONFIG, attention="eager"), tmp_path)
    assert eager.train_loss == pytest.approx(two_epochs[1].train_loss, rel=1e-3)


def test_another_seed_gives_another_run(two_epochs, tmp_path):
    other = _digits.train(dataclasses.replace(CONFIG, epochs=1, seed=1), tmp_path)
    assert other.train_loss[0] != two_epochs[1].train_loss[0]


@pytest.mark.slow
def test_learns_to_97_percent(tmp_path):
    progress = _digits.train(_digits.Config("tersor", epochs=5), tmp_path)
    assert progress.accuracy[-1] >= 0.97
    assert len(progress.step_seconds) == 5 * _digits.steps_per_epoch(64) - _digits.WARM_UP


def test_split_is_fixed_and_stratified():
    data, again = _digits.digits(), _digits.digits()
    assert torch.equal(data.train_images, again.train_images)
    assert len(data.train_labels) == _digits.TRAINING_IMAGES
    assert len(data.test_labels) == 450
    share = data.test_labels.bincount() / (data.test_labels.bincount() + data.train_labels.bincount())
    assert ((share - 0.25).abs() < 0.01).all()
    assert (data.train_images.amin(), data.train_images.amax()) == (-1, 1)


def test_enlarge_keeps_the_digit_and_moves_it_within_bounds():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., 3:5, 3:5] = 1.0
    plain = _digits.enlarge(image)
    assert plain.shape == (1, 3, 32, 32)
    assert torch.equal(plain, _digits.enlarge(image, torch.full((1, 4), 0.5)))  # the middle: no change
    right = _digits.enlarge(image, torch.tensor([[0.5, 0.5, 0.0, 0.5]]))  # reads 1/4 of the half width to the left
    assert torch.allclose(right[..., 4:], plain[..., :-4], atol=1e-5)
    assert plain[0, 0, 0].eq(-1).all()  # background outside


def test_saved_model_is_rebuilt_from_its_file_alone(two_epochs, tmp_path):
    folder, progress = two_epochs
    model = _digits.load_trained(CONFIG, folder)
    _digits.save_model(tmp_path / "model.safetensors", model, progress.accuracy[-1])
    images = _digits.digits().test_images
    reloaded = _digits.load_model(tmp_path / "model.safetensors")
    assert torch.equal(_digits.evaluate(reloaded, images), _digits.evaluate(model, images))


def spoil(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "not safetensors":
        path.write_bytes(b"not a state file")
    elif how == "no metadata":
        _digits.write_safetensors(path, weights(path), {})
    elif how == "no weights":
        tensors, metadata = _digits.read_safetensors(path)
        _digits.write_safetensors(path, {"model.head.bias": tensors["model.head.bias"]}, metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read"),
        ("not safetensors", "cannot be read"),
        ("no metadata", "holds no training state"),
        ("no weights", "does not fit this model"),
    ],
)
def test_damaged_state_gives_one_clear_line(two_epochs, tmp_path, capsys, how, message):
    path = CONFIG.state_file(tmp_path)
    path.write_bytes(CONFIG.state_file(two_epochs[0]).read_bytes())
    spoil(path, how)
    arguments = ["--epochs", "2", "--batch-size", "256", "--output", str(tmp_path), "--resume"]
    assert train_digits.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert "without --resume" in error


def test_state_of_another_run_is_refused(two_epochs, tmp_path):
    path = CONFIG.state_file(tmp_path)
    path.write_bytes(CONFIG.state_file(two_epochs[0]).read_bytes())
    with pytest.raises(
        _digits.StateError, match=r"another run \(batch_size 256 there, 128 here; seed 0 there, 5 here\)"
    ):
        _digits.train(dataclasses.replace(CONFIG, batch_size=128, seed=5), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 10000, got '0'"),
        (["--epochs", "many"], "must be a whole number from 1 to 10000, got 'many'"),
        (["--batch-size", "1348"], "must be a whole number from 2 to 1347"),
        (["--threads", "-1"], "argument --threads"),
        (["--seed", "1.5"], "argument --seed"),
        (["--device", "abacus"], "must be cpu, cuda or cuda:N, got 'abacus'"),
        (["--device", "cuda:99"], "CUDA devices here"),
        (["--output", __file__], "is a file, not a folder"),
        (["--output", __file__ + "/below"], "--output: cannot write to"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_digits.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["rich", "sklearn"])
def test_missing_extras_give_one_line(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert train_digits.main([]) == 1
    said = capsys.readouterr().err
    assert said == f'train_digits needs {train_digits.EXTRAS[module]}: pip install "tersor[demo]"\n'


def test_the_whole_demo(tmp_path, monkeypatch):
    """As a user runs it, with a smaller kernel comparison: interrupted, resumed, all files there and consistent."""
    arguments = ["--epochs", "2", "--batch-size", "256", "--output", str(tmp_path)]
    measured = _digits_measure.measure_kernels
    monkeypatch.setattr(_digits_measure, "measure_kernels", lambda device: measured(device, (1, 9, 9, 3, 8), 2))
    train = _digits.train

    def interrupted(config, output, resume, report):
        if config.attention == "eager":
            raise KeyboardInterrupt
        return train(config, output, resume, report)

    monkeypatch.setattr(_digits, "train", interrupted)
    assert train_digits.main(arguments) == 130
    monkeypatch.setattr(_digits, "train", train)
    assert train_digits.main([*arguments, "--resume"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("tersor", "eager"):
        assert len(results[name]["test accuracy"]) == 2
        assert results[name]["attention alone"]["error"] < 1e-5
        assert results[name]["median step seconds"] > 0
    assert results["tersor"]["step peak bytes"] < results["eager"]["step peak bytes"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert _digits.load_model(tmp_path / "dilateformer_nano_digits.safetensors").num_classes == 10
    assert not list(tmp_path.glob("*unfinished*"))


def test_peak_memory_counts_what_is_alive_at_once():
    def function():
        first = torch.ones(1000)
        del first
        kept = torch.ones(2000)
        return kept + torch.ones(2000)

    assert _digits_measure.peak_memory(function, "cpu") == pytest.approx(3 * 8000, abs=100)


def test_median_of_no_steps_is_not_a_number():
    assert math.isnan(_digits.Progress().median_step)


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tersor.models.train_digits", "--help"], capture_output=True, text=True, check=True
    )
    assert "--resume" in done.stdout
    assert done.stderr == ""
