"""``tersor compress`` end to end in small, its resumption bit for bit, its files, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file
from torch import Tensor

from tersor import compress
from tersor.command_line import images, main, results, training
from tersor.models import resnet20

Arguments = Callable[..., list[str]]


def state(output: Path, phase: str) -> dict[str, Tensor]:
    return load_file(output / f"state_{phase}.safetensors")


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    """The one line that says why."""
    capsys.readouterr()
    if status == 2:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
    else:
        assert main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("tersor compress: ")
    assert error.count("\n") == 1, error
    return error


def test_the_report_says_what_the_files_hold(small: Path, data: Path) -> None:
    contents = json.loads((small / "report.json").read_text())
    artefact = compress.read(small / "model.safetensors")
    assert artefact.metadata["classes"] == ["blue", "green", "red"]
    assert artefact.source is not None
    assert artefact.source.options == {"width": 8, "num_classes": 3}
    assert contents["bytes"]["compressed"] == (small / "model.safetensors").stat().st_size
    assert contents["bytes"]["dense"] == (small / "dense.safetensors").stat().st_size > contents["bytes"]["compressed"]
    reading = images.Reading.from_metadata(artefact.metadata)
    test = images.ImageSet(images.list_images(data).test, reading, 10**9, 1)
    for name, model in (("packed", compress.load(small / "model.safetensors")), ("dense", dense_model(small))):
        found = training.accuracy(training.predict(model, test, reading), test.labels)
        assert found == contents[f"{name}_accuracy"], name
    progress = contents["trainings"]["compressed"]
    assert len(progress["accuracy"]) == 3
    assert progress["sparse"][-1] > 0.4
    assert progress["frozen"][-1] > 0.5
    page = (small / "report.md").read_text()
    assert f"{contents['packed_accuracy']:.2f}" in page
    assert contents["about"]["commit"] in page
    assert "| layer1.0.conv1 | 4-bit lts, 4-bit input, 2:4 lbc, freeze by tile |" in page
    if "accuracy.png" in page:
        assert (small / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def dense_model(output: Path) -> torch.nn.Module:
    model = resnet20(num_classes=3, width=8)
    model.load_state_dict(load_file(output / "dense.safetensors"))
    return model


def interrupt_at(monkeypatch: pytest.MonkeyPatch, phase: str, epoch: int) -> None:
    """Ctrl-C in the second step of an epoch."""
    step, seen = training.Run._step, [0]

    def interrupted(self: Any, *given: Any) -> float:
        seen[0] += self.config.phase == phase
        if seen[0] == epoch * self.steps + 2:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(training.Run, "_step", interrupted)


@pytest.mark.parametrize(("phase", "epoch"), [("dense", 1), ("compressed", 2)])
def test_an_interrupted_run_goes_on_bit_for_bit(
    phase: str,
    epoch: int,
    arguments: Arguments,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        interrupt_at(patched, phase, epoch)
        assert main(arguments(tmp_path)) == 130
    assert f"the same command with --resume goes on from {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()
    assert main(arguments(tmp_path, "--resume")) == 0
    for name in ("dense", "compressed"):
        assert_same(state(tmp_path, name), state(small, name))
    ours, theirs = (compress.read(folder / "model.safetensors") for folder in (tmp_path, small))
    assert_same(ours.tensors, theirs.tensors)
    assert ours.metadata == theirs.metadata


def test_another_runs_state_is_refused(
    arguments: Arguments, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("state_dense.safetensors", "state_compressed.safetensors"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    assert "seed 0 there, 1 here" in refused(arguments(tmp_path, "--resume", "--seed", "1"), capsys)
    (tmp_path / "state_dense.safetensors").write_bytes(b"nonsense")
    assert "cannot be read" in refused(arguments(tmp_path, "--resume"), capsys)


def test_a_checkpoint_is_the_dense_model(
    arguments: Arguments, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dense.pt"
    torch.save({"state_dict": load_file(small / "dense.safetensors")}, file)
    output = tmp_path / "output"
    assert main(arguments(output, "--checkpoint", str(file), "--epochs", "1", "--optimizer", "adamw")) == 0
    assert not (output / "state_dense.safetensors").exists()
    assert_same(load_file(output / "dense.safetensors"), load_file(small / "dense.safetensors"))
    assert "dense model: the weights of" in capsys.readouterr().out
    contents = json.loads((output / "report.json").read_text())
    assert contents["dense_accuracy"] == json.loads((small / "report.json").read_text())["dense_accuracy"]


def test_a_checkpoints_head_of_other_classes_starts_anew(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(resnet20(num_classes=7, width=8).state_dict(), tmp_path / "seven.safetensors")
    assert main(arguments(tmp_path, "--checkpoint", str(tmp_path / "seven.safetensors"), "--epochs", "1")) == 0
    assert "fc.weight and fc.bias start anew, and train first" in capsys.readouterr().out
    assert load_file(tmp_path / "dense.safetensors")["fc.weight"].shape == (3, 32)


def test_checkpoints_of_other_models_are_refused(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.safetensors"
    for other, message in (
        (resnet20(num_classes=3, width=12).state_dict(), "conv1.weight is (12, 3, 3, 3), in the model (8, 3, 3, 3)"),
        ({"fc.weight": torch.zeros(3, 32)}, "it lacks bn1.bias, bn1.running_mean, bn1.running_var and"),
        (resnet20(num_classes=3, width=8).state_dict() | {"more": torch.zeros(1)}, "it has besides more"),
    ):
        save_file(other, file)
        assert message in refused(arguments(tmp_path / "output", "--checkpoint", str(file)), capsys)
    torch.save(resnet20(width=8), tmp_path / "pickled.pt")
    assert "as a checkpoint" in refused(arguments(tmp_path, "--checkpoint", str(tmp_path / "pickled.pt")), capsys)
    assert "missing.pt" in refused(arguments(tmp_path, "--checkpoint", str(tmp_path / "missing.pt")), capsys)


def test_recipes_that_do_not_suit_are_refused_before_training(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    for text, message in (
        ("[[rule]]\nFakeQuantize = { bits = 9 }\n", "bits must be 2 to 8"),
        ("[[rule]\n", "not TOML"),
        ('[[rule]]\nlayers = ["conv7"]\nFakeQuantize = {}\n', "conv7"),
    ):
        recipe.write_text(text)
        assert message in refused(arguments(tmp_path, "--recipe", str(recipe)), capsys)
    assert "No such file" in refused(arguments(tmp_path, "--recipe", str(tmp_path / "none.toml")), capsys)
    assert not list(tmp_path.glob("state_*"))


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--epochs", "0"], 2, "must be a whole number from"),
        (["--learning-rate", "0"], 2, "must be a number above 0"),
        (["--weight-decay", "-1"], 2, "must be a number of at least 0"),
        (["--model", "nowhere:net"], 2, "must be NAME or PLACE:NAME with a place of"),
        (["--option", "width"], 2, "must be key=value"),
        (["--device", "tpu"], 2, "must be cpu, cuda or cuda:N"),
        (["--model", "resnet21"], 1, "tersor has no model 'resnet21'"),
        (["--model", "edsr_tiny"], 1, "num_classes"),
        (["--option", "widht=8"], 1, "widht"),
        (["--option", "num_classes=4"], 1, "num_classes=4: the data have 3 classes"),
        (["--option", "in_chans=2"], 1, "must take 1 or 3 channels, it takes 2"),
        (["--model", "vgg_small_recu"], 1, "does not take images of 16 x 16 pixels (--size)"),
        (["--mean", "0.5"], 1, "mean must have 3 numbers"),
        (["--learning-rate", "1e30"], 1, "try a lower --learning-rate"),
    ],
)
def test_bad_options(
    more: list[str],
    status: int,
    message: str,
    arguments: Arguments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(arguments(tmp_path, *more), capsys, status)


def test_images_that_do_not_fit_into_memory_train_the_same(
    arguments: Arguments, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, "--memory", "0")) == 0
    assert "read again for each batch" in capsys.readouterr().out
    assert_same(state(tmp_path, "compressed"), state(small, "compressed"))


def test_an_output_that_is_a_file_is_refused(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(arguments(tmp_path / "file"), capsys, 2)


def test_without_matplotlib_there_are_no_pictures(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Arguments
) -> None:
    find = results.importlib.util.find_spec
    hidden = ("matplotlib", "rich")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    assert main(arguments(tmp_path, "--epochs", "1")) == 0
    assert not list(tmp_path.glob("*.png"))
    assert "![" not in (tmp_path / "report.md").read_text()
