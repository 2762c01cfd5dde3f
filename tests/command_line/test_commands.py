"""The smaller subcommands, help, exit status, and the errors of all."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("safetensors")

import tersor
from tersor import command_line, compress
from tersor.command_line import bench_layers, images, main, networks, recipe, shared, timing

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("backends", "bench", "compress", "infer", "recipe", "report")


def output_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    capsys.readouterr()
    try:
        found = main(arguments)
    except SystemExit as exit:
        found = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert found == status, error
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_explains_each_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert f"\n    tersor {command}" in text
    parser = shared.Parser()
    commands = parser.add_subparsers()
    module = sys.modules[f"tersor.command_line.{command}"]
    module.add(commands)
    for action in commands.choices[command]._actions:
        assert action.help, action.option_strings


def test_usage_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in error_of([], capsys, 2)
    assert "invalid choice" in error_of(["compres"], capsys, 2)
    assert "--recipe" in error_of(["compress"], capsys, 2)
    assert "--check and --model go together" in error_of(["recipe", "--check", "x.toml"], capsys, 2)
    both = ["bench", "--model", "resnet20", "--layers", "conv:8x8"]
    assert "--model and --layers do not go together" in error_of(both, capsys, 2)
    assert "must be conv:CHANNELSxPIXELS" in error_of(["bench", "--layers", "conv:0x8"], capsys, 2)


def test_the_module_runs_and_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "tersor", "backends", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [choice._asdict() for choice in tersor.backends()]
    closed = subprocess.run(f"{' '.join(command)} | true", shell=True, cwd=ROOT, capture_output=True, timeout=120)
    assert b"Traceback" not in closed.stderr


def test_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert output_of(["backends"], capsys) == f"{tersor.backends()}\n"


def test_infer_tells_what_the_loaded_model_tells(small: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small / "model.safetensors"
    found = json.loads(output_of(["infer", str(file), str(data / "test"), "--json", "--batch-size", "5"], capsys))
    listing = images.list_images(data)
    assert [entry["image"] for entry in found] == [str(path) for path, _ in listing.test]
    metadata = compress.read(file).metadata
    reading, model = images.Reading.from_metadata(metadata), compress.load(file)
    test = images.ImageSet(listing.test, reading, 10**9, 1)
    with torch.inference_mode():
        shares = model(reading.normalized(test.take(range(len(test))))).softmax(1)
    for entry, row in zip(found, shares, strict=True):
        assert entry["top"][0]["class"] == metadata["classes"][int(row.argmax())]
        assert entry["top"][0]["share"] == pytest.approx(float(row.max()), abs=1e-5)
    one = str(data / "test" / "red" / "0.png")
    table = output_of(["infer", str(file), one, "--top", "9"], capsys)  # of three classes
    assert all(name in table for name in ("red", "green", "blue", "%"))


def test_infer_refuses(
    small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Callable[..., list[str]]
) -> None:
    file, image = str(small / "model.safetensors"), str(data / "test" / "red" / "0.png")
    (tmp_path / "damaged.png").write_bytes(b"no image")
    assert "damaged.png: cannot be read as an image" in error_of(["infer", file, str(tmp_path / "damaged.png")], capsys)
    (tmp_path / "nothing").mkdir()
    assert "has no images" in error_of(["infer", file, str(tmp_path / "nothing")], capsys)
    assert "No such file" in error_of(["infer", str(tmp_path / "none.safetensors"), image], capsys)
    dense = str(small / "dense.safetensors")
    assert "not one that tersor.compress.save wrote" in error_of(["infer", dense, image], capsys)
    content = bytearray(Path(file).read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(content)
    assert "check sum" in error_of(["infer", str(tmp_path / "damaged.safetensors"), image], capsys)
    model = compress.load(file)
    source = compress.read(file).source
    compress.save(model, tmp_path / "bare.safetensors", source)
    assert "does not say its classes" in error_of(["infer", str(tmp_path / "bare.safetensors"), image], capsys)
    assert "layer1.0.conv1" in output_of(["report", str(tmp_path / "bare.safetensors")], capsys)


def test_report_is_that_of_the_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small / "model.safetensors"
    table = str(compress.report(compress.load(file), torch.zeros(1, 3, 16, 16)))
    text = output_of(["report", str(file)], capsys)
    assert table in text
    assert f"{file.stat().st_size:,} bytes" in text


def test_the_example_recipe_is_the_documentations_and_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(["recipe"], capsys)
    assert text == recipe.EXAMPLE == (ROOT / "docs" / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(text)
    whole = text.replace("# [[rule]]", "[[rule]]").replace("# layers", "layers").replace("# exclude", "exclude")
    whole = whole.replace("# FakeQuantize", "FakeQuantize").replace("# Binarize", "Binarize")
    assert len(compress.Recipe.from_toml(whole).rules) == 3  # what is in comments is valid too
    check = ["recipe", "--check", str(tmp_path / "recipe.toml"), "--model", "resnet20", "--option", "width=6"]
    table = output_of(check, capsys)
    assert "12 layers change" in table
    words = " ".join(table.split())
    assert "conv1 the first or last layer" in words
    assert "layer1.0.conv1 4 does not divide its 6 inputs" in words
    assert "layer3.1.conv1 4-bit lts, 4-bit input, 2:4 lbc, freeze by tile" in words


def test_recipe_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[[rule]]\nlayers = ["nothing"]\nNMSparse = {}\n')
    assert "'nothing'" in error_of(["recipe", "--check", str(file), "--model", "resnet20"], capsys)
    assert "none.toml" in error_of(["recipe", "--check", str(tmp_path / "none.toml"), "--model", "resnet20"], capsys)
    error = error_of(["recipe", "--check", str(file), "--model", "transformers:Nothing"], capsys)
    assert "model transformers:Nothing" in error or "has no model class 'Nothing'" in error  # installed or not


def test_bench_times_what_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--layers", "conv:8x6", "linear:16x8x3", "linear:6x5x2", "--batch", "2", "--rounds", "3"]
    assert "Times faster than float32" in output_of([*arguments, "--threads", "1", "--output", str(tmp_path)], capsys)
    contents = json.loads((tmp_path / "bench.json").read_text())
    assert contents["threads"] == 1
    assert [each["layer"] for each in contents["results"]] == [
        "conv 3x3 8>8 6x6",
        "linear 16>8 3 rows",
        "linear 6>5 2 rows",
    ]
    for each in contents["results"][:2]:
        assert each["seconds"].keys() == each["bytes"].keys() == {"float32", *bench_layers.WAYS}
        assert min(each["seconds"].values()) > 0
        assert each["bytes"]["float32"] > each["bytes"]["8 bits"] > each["bytes"]["4 bits"] > each["bytes"]["2 bits"]
    last = contents["results"][2]
    assert "4 does not divide its 6 inputs" in last["refused"]["2:4"]
    assert "2:4" not in last["seconds"]
    page = (tmp_path / "bench.md").read_text()
    assert page.count("| conv 3x3 8>8 6x6 |") == 2
    assert contents["about"]["commit"] in page


def test_bench_of_a_model_has_its_layers_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--model", "resnet20", "--option", "width=8", "num_classes=10", "--size", "16"]
    output_of([*arguments, "--batch", "1", "--rounds", "3", "--threads", "1", "--output", str(tmp_path)], capsys)
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    counts = {each["layer"]: each["count"] for each in results}
    assert counts["conv 3x3 8>8 16x16"] == 6
    assert counts["conv 3x3/2 8>16 16x16"] == 1
    assert sum(counts.values()) == 1 + 18 + 2 + 1  # stem, blocks, shortcuts, classifier
    assert "all layers" in (tmp_path / "bench.md").read_text()


def test_bench_times_nothing_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = compress.convert_

    def spoilt(model: torch.nn.Module) -> torch.nn.Module:
        packed = convert(model)
        for module in packed.modules():
            if isinstance(module, tersor.sparsity.PackedNMConv2d):
                module.values += 0.1
        return packed

    monkeypatch.setattr(compress, "convert_", spoilt)
    arguments = ["bench", "--layers", "conv:8x6", "--batch", "1", "--rounds", "3", "--output", str(tmp_path)]
    assert "2:4: differs by" in error_of(arguments, capsys)
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert result["failed"].keys() == {"2:4", "1:4"}
    assert not {"2:4", "1:4"} & result["seconds"].keys()
    assert "wrong" in (tmp_path / "bench.md").read_text()


def test_medians_are_of_one_call() -> None:
    seen: list[str] = []
    found = timing.medians({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3)
    assert found.keys() == {"a", "b"}
    assert {"a", "b"} == set(seen)
    assert 0 < max(found.values()) < 1e-2


def test_what_models_say_of_themselves() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3))
    assert networks.input_channels(model) == 1
    assert networks.natural_size(model, {}) == networks.SIZE
    model.image_size = 64  # type: ignore[assignment]
    assert networks.natural_size(model, {}) == 64
    model.default_cfg = {"input_size": (3, 96, 96)}  # type: ignore[assignment]
    assert networks.natural_size(model, {}) == 96
    assert networks.natural_size(model, {"img_size": 32}) == 32
    assert networks.model_option("a=[1, 2]") == ("a", [1, 2])
    assert networks.model_option("a=x=y") == ("a", "x=y")


def test_missing_extras_give_one_line(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    error = error_of(["infer", str(small / "model.safetensors"), "x.png"], capsys)
    assert 'needs pillow, numpy, safetensors: pip install "tersor[command-line]"' in error


def test_the_commands_of_the_documentation_are_understood() -> None:
    page = (ROOT / "docs" / "command_line.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("tersor ")]
    found = set()
    for line in lines:
        words = shlex.split(line.partition(">")[0], comments=True)[1:]
        if words != ["--version"]:
            found.add(command_line.build_parser().parse_args(words).command)
    assert found == set(COMMANDS)
