"""The denoising training: its noise, metrics and baseline, resuming bit for bit, its files, and what it refuses."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

for _module in ("matplotlib", "rich", "safetensors", "skimage", "sklearn"):
    pytest.importorskip(_module, reason=f'{_module} is not installed: pip install "tersor[demo]"')

import skimage.metrics  # noqa: E402

from tersor.models import _command, _denoise_measure, _denoise_train, _photos, train_denoise  # noqa: E402
from tersor.models._command import StateError  # noqa: E402
from tersor.models._digits import read_safetensors, write_safetensors  # noqa: E402
from tersor.models.eager_uformer import EagerLeWinBlock  # noqa: E402

SMALL = {"channels": 2, "epochs": 2, "iterations": 2, "batch_size": 1}
CONFIG = _denoise_train.Config(**SMALL)
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run: its folder, network and progress."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, *_denoise_train.train(CONFIG, folder)


# The data and the metrics


def test_at_scale_1_regions_are_the_photographs_themselves():
    data, pictures = _photos.photographs(1), _photos.originals()
    for train, test in zip(data.train, data.test, strict=True):
        above, below = _photos.split_rows(pictures[train.name].shape[1], 1)
        assert above.stop + _photos.MARGIN <= below.start
        for region, rows in ((train, above), (test, below)):
            assert torch.equal(region.high, pictures[train.name][:, rows])
            assert torch.equal(region.low, region.high)


def test_noise_has_its_standard_deviation_and_is_not_clipped():
    generator = torch.Generator().manual_seed(0)
    noisy = _denoise_train.with_noise(torch.zeros(3, 200, 200), generator)
    assert noisy.std().item() * 255 == pytest.approx(25, rel=0.01)
    assert noisy.mean().item() == pytest.approx(0, abs=1e-3)
    assert noisy.min() < 0


def test_the_test_noise_is_always_the_same():
    first = _denoise_measure.noisy_regions()
    torch.rand(3)
    again = _denoise_measure.noisy_regions.__wrapped__()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_colour_metrics_count_every_channel_to_the_border():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8)
    output = _photos.to_uint8(truth.float() + 8 * torch.randn(3, 40, 50, generator=generator))
    psnr, ssim = _photos.colour_psnr_and_ssim(output, truth)
    error = (output.double() - truth.double()).square().mean().item()
    assert psnr == pytest.approx(10 * math.log10(255**2 / error), abs=1e-6)
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    each = [
        skimage.metrics.structural_similarity(*pair, **options)
        for pair in zip(truth.numpy(), output.numpy(), strict=True)
    ]
    assert ssim == pytest.approx(np.mean(each), abs=1e-9)


def test_the_rivals_score_what_they_always_do():
    """Pinned, so that no change of data, noise or metrics goes unnoticed; measured with scikit-image 0.26."""
    noisy = _denoise_measure.quality(_denoise_measure.unprocessed())
    means = _denoise_measure.quality(_denoise_measure.denoise_by_means(0.6))
    assert (noisy.mean_psnr, noisy.mean_ssim) == pytest.approx((20.75, 0.335), abs=0.01)
    assert (means.mean_psnr, means.mean_ssim) == pytest.approx((29.92, 0.819), abs=0.01)


def test_non_local_means_is_tuned_on_training_regions(monkeypatch):
    monkeypatch.setattr(_denoise_measure, "TUNED_SIDE", 64)
    monkeypatch.setattr(_denoise_measure, "STRENGTHS", (0.2, 0.6, 1.2))
    monkeypatch.setattr(_denoise_measure, "noisy_regions", pytest.fail)
    tuned = _denoise_measure.tune_means.__wrapped__()
    assert max(tuned, key=tuned.get) == 0.6
    assert all(20 < psnr < 32 for psnr in tuned.values())


# The training


def interrupt(progress, step):
    if len(progress.loss) == 1 and step == 1:
        raise KeyboardInterrupt


def tensors(path):
    return read_safetensors(path)[0]


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, tmp_path):
    folder, _, uninterrupted = trained
    with pytest.raises(KeyboardInterrupt):
        _denoise_train.train(CONFIG, tmp_path, report=interrupt)
    torch.rand(7)  # whatever happened to the random state meanwhile does not matter
    _, resumed = _denoise_train.train(CONFIG, tmp_path, resume=True)
    assert resumed.loss == uninterrupted.loss
    ours, theirs = (tensors(CONFIG.state_file(path)) for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("exp_avg_sq") for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    _, again = _denoise_train.train(CONFIG, tmp_path, resume=True)  # finished: nothing to do
    assert again == resumed


def test_another_seed_gives_another_run(trained, tmp_path):
    other = _denoise_train.train(dataclasses.replace(CONFIG, seed=1), tmp_path)[1]
    assert all(a != b for a, b in zip(other.loss, trained[2].loss, strict=True))


def test_learning_rate_rises_and_falls():
    rates = [_denoise_train.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(_denoise_train.LEARNING_RATE / 30)
    assert max(rates) == rates[29] == rates[30] == _denoise_train.LEARNING_RATE
    assert rates[31:] == sorted(rates[31:], reverse=True)
    assert 0 < rates[-1] < 1e-5 * rates[30]
    assert _denoise_train.learning_rate(0, 1) == _denoise_train.LEARNING_RATE


def test_eager_blocks_begin_with_the_same_weights_and_give_the_same_losses():
    ours, theirs = (_denoise_train.build(CONFIG, block) for block in _denoise_measure.WAYS.values())
    assert any(isinstance(module, EagerLeWinBlock) for module in theirs.modules())
    assert not any(isinstance(module, EagerLeWinBlock) for module in ours.modules())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    compared = _denoise_measure.compare(CONFIG)
    assert compared["steps"] == 2
    assert [len(losses) for losses in compared["loss"].values()] == [2, 2]
    assert compared["first loss difference"] < 1e-6
    assert compared["largest loss difference"] < 1e-4
    assert all(seconds > 0 for seconds in compared["median step seconds"].values())


@pytest.mark.slow
def test_it_learns(tmp_path):
    """A much shorter training than the command's."""
    config = _denoise_train.Config(epochs=2, iterations=60, batch_size=2)
    model, progress = _denoise_train.train(config, tmp_path)
    assert progress.loss[1] < 0.7 * progress.loss[0]
    assert _denoise_measure.quality(_denoise_measure.denoise(model)).mean_psnr > 24


# The files


def test_saved_network_is_rebuilt_from_its_file_alone(trained, tmp_path):
    _, model, _ = trained
    path = tmp_path / "model.safetensors"
    _denoise_train.save_model(path, CONFIG, model)
    again = _denoise_train.load_model(path)
    pairs = zip(_denoise_measure.denoise(again), _denoise_measure.denoise(model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert [p.shape for p in _denoise_measure.denoise(model)] == [r.high.shape for r in _photos.photographs(1).test]


def spoil(path, how):
    content = path.read_bytes()
    state, metadata = read_safetensors(path)
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "no metadata":
        write_safetensors(path, state, {})
    elif how == "no weights":
        write_safetensors(path, {"model.output_proj.proj.0.bias": state["model.output_proj.proj.0.bias"]}, metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read"),
        ("no metadata", "holds no training state"),
        ("no weights", "does not fit this model"),
    ],
)
def test_damaged_state_gives_one_clear_line(trained, tmp_path, monkeypatch, capsys, how, message):
    monkeypatch.setattr(train_denoise, "_rival", lambda: None)
    path = CONFIG.state_file(tmp_path)
    path.write_bytes(CONFIG.state_file(trained[0]).read_bytes())
    spoil(path, how)
    assert train_denoise.main([*ARGUMENTS, "--output", str(tmp_path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_denoise: ")
    assert error.count("\n") == 1 or how == "no weights"  # torch lists what is missing
    assert message in error
    assert str(path) in error
    assert "without --resume" in error


def test_state_of_another_run_is_refused(trained, tmp_path):
    path = CONFIG.state_file(tmp_path)
    path.write_bytes(CONFIG.state_file(trained[0]).read_bytes())
    other = dataclasses.replace(CONFIG, iterations=4, batch_size=3)
    with pytest.raises(StateError, match=r"another run \(iterations 2 there, 4 here; batch_size 1 there, 3 here\)"):
        _denoise_train.train(other, tmp_path, resume=True)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be a whole number from 1 to 10000, got '0'"),
        (["--iterations", "many"], "argument --iterations"),
        (["--batch-size", "0"], "argument --batch-size"),
        (["--patch", "72"], "must be 64, 128 or 192, got '72'"),
        (["--channels", "0"], "argument --channels"),
        (["--seeds", "0"], "argument --seeds"),
        (["--threads", "-1"], "argument --threads"),
        (["--output", __file__], "is a file, not a folder"),
        (["--output", __file__ + "/below"], "--output: cannot write to"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_denoise.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", list(_command.PHOTOGRAPHS))
def test_missing_extras_give_one_line(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert train_denoise.main([]) == 1
    said = capsys.readouterr().err
    assert said == f'train_denoise needs {_command.PHOTOGRAPHS[module]}: pip install "tersor[demo]"\n'


def test_largest_patch_fits_every_training_region():
    size = min(n for region in _photos.photographs(1).train for n in region.high.shape[1:])
    assert train_denoise._patch("192") <= size


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """As a user runs it, in small: interrupted, resumed, all files there and consistent."""
    train, uniform = _denoise_train.train, {"STRENGTHS": (0.4, 0.6), "TUNED_SIDE": 64}
    for name, value in uniform.items():
        monkeypatch.setattr(_denoise_measure, name, value)
    _denoise_measure.tune_means.cache_clear()

    def interrupted(config, *others):
        if config.seed == 1:
            raise KeyboardInterrupt
        return train(config, *others)

    monkeypatch.setattr(_denoise_train, "train", interrupted)
    arguments = [*ARGUMENTS, "--seeds", "2", "--output", str(tmp_path)]
    assert train_denoise.main(arguments) == 130
    assert "--resume goes on from" in capsys.readouterr().err
    monkeypatch.setattr(_denoise_train, "train", train)
    before = CONFIG.state_file(tmp_path).stat().st_mtime_ns
    assert train_denoise.main([*arguments, "--resume"]) == 0
    assert CONFIG.state_file(tmp_path).stat().st_mtime_ns == before  # what was finished is not trained again
    _denoise_measure.tune_means.cache_clear()
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["non-local means"]["strength"] == 0.6
    assert results["non-local means"]["psnr"] == pytest.approx(29.92, abs=0.01)
    assert list(results["noisy"]["psnr of each"]) == list(_photos.NAMES)
    assert results["comparison"]["largest loss difference"] < 1e-4
    figures = results["Uformer"]
    assert [len(run["loss"]) for run in figures["seeds"].values()] == [2, 2]
    assert figures["psnr"] == pytest.approx(np.mean([run["psnr"] for run in figures["seeds"].values()]))
    assert results["options"]["compare"] is True
    said, page = capsys.readouterr().out, (tmp_path / "results.md").read_text()
    assert results["about"]["commit"] in page
    assert f"| {figures['psnr']:.2f} |" in page
    assert f"{figures['psnr']:.2f}" in said
    assert (tmp_path / "denoise.png").read_bytes().startswith(b"\x89PNG")
    model = _denoise_train.load_model(tmp_path / "uformer_seed1.safetensors")
    psnr = _denoise_measure.quality(_denoise_measure.denoise(model)).mean_psnr
    assert psnr == figures["seeds"]["1"]["psnr"]
    assert not list(tmp_path.glob("*unfinished*"))


def test_without_resume_states_are_removed_and_without_compare_nothing_is_compared(trained, tmp_path, monkeypatch):
    CONFIG.state_file(tmp_path).write_bytes(b"stale")

    def stop(config, output, resume, report):
        assert not CONFIG.state_file(output).exists()
        return trained[1:]

    monkeypatch.setattr(_denoise_train, "train", stop)
    monkeypatch.setattr(_denoise_measure, "compare", pytest.fail)
    monkeypatch.setattr(_denoise_measure, "STRENGTHS", (0.6,))
    monkeypatch.setattr(_denoise_measure, "TUNED_SIDE", 32)
    _denoise_measure.tune_means.cache_clear()
    arguments = [*ARGUMENTS, "--seeds", "1", "--no-compare", "--output", str(tmp_path)]
    assert train_denoise.main(arguments) == 0
    _denoise_measure.tune_means.cache_clear()
    assert json.loads((tmp_path / "results.json").read_text())["comparison"] is None


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tersor.models.train_denoise", "--help"], capture_output=True, text=True, check=True
    )
    assert "--resume" in done.stdout
    assert done.stderr == ""
