"""The super-resolution training: its data and metrics, both methods, resuming bit for bit, its files, and what it
refuses."""

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

from tersor.models import _command, _photos, _sr_measure, _sr_plot, _sr_train, train_sr  # noqa: E402
from tersor.models._digits import StateError, read_safetensors, write_safetensors  # noqa: E402
from tersor.models._sr_symmetric import SymmetricActivation, make_symmetric_  # noqa: E402
from tersor.models.edsr import EDSR  # noqa: E402
from tersor.quantization import BoundedActivation, QuantizedConv2d, weight_fake_quantize  # noqa: E402

SMALL = {"blocks": 2, "channels": 8, "iterations": 2, "batch_size": 2}
FULL = _sr_train.Config("full", epochs=2, **SMALL)
STUDENTS = [_sr_train.Config(method, 2, epochs=6, **SMALL) for method in ("ddtb", "symmetric")]
ARGUMENTS = ["--epochs", "6", "--teacher-epochs", "2", "--iterations", "2", "--batch-size", "2", "--threads", "1"]
ARGUMENTS += ["--blocks", "2", "--channels", "8", "--seeds", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return _sr_train.train(FULL, tmp_path_factory.mktemp("teacher"))[0]


@pytest.fixture(scope="module", params=STUDENTS, ids=lambda config: config.method)
def student(request, teacher, tmp_path_factory):
    """An uninterrupted run: its config, folder, network and progress."""
    folder = tmp_path_factory.mktemp("student")
    return request.param, folder, *_sr_train.train(request.param, folder, teacher)


# The data


def test_the_photographs_are_those_of_the_wheels_in_colour():
    pictures = _photos.originals()
    assert list(pictures) == list(_photos.NAMES)
    assert all(p.dtype == torch.uint8 and p.shape[0] == 3 for p in pictures.values())
    assert pictures["astronaut"].shape == (3, 512, 512)
    assert pictures["china"].float().mean() == pytest.approx(147.9, abs=10)


def test_no_pixel_is_in_both_regions():
    data = _photos.photographs(2)
    for (name, picture), train, test in zip(_photos.originals().items(), data.train, data.test, strict=True):
        above, below = _photos.split_rows(picture.shape[1], 2)
        assert (train.name, test.name) == (name, name)
        assert above.stop + _photos.MARGIN <= below.start
        width = train.high.shape[2]
        assert torch.equal(train.high, picture[:, above, :width])
        assert torch.equal(test.high, picture[:, below, :width])
        assert 0.24 < (below.stop - below.start) / picture.shape[1] <= 0.25


def test_a_region_is_made_from_its_own_pixels_alone(monkeypatch):
    """With the test regions blackened in the originals, the training regions do not change, and the other way round."""
    data, pictures = _photos.photographs(2), _photos.originals()
    for part in (0, 1):
        spoilt = {name: picture.clone() for name, picture in pictures.items()}
        for picture in spoilt.values():
            rows = _photos.split_rows(picture.shape[1], 2)
            kept = picture[:, rows[part]].clone()
            picture.zero_()
            picture[:, rows[part]] = kept
        monkeypatch.setattr(_photos, "originals", lambda spoilt=spoilt: spoilt)
        again = _photos.photographs.__wrapped__(2)
        ours, theirs = ((d.train, d.test)[part] for d in (again, data))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.low, b.low)
            assert torch.equal(a.high, b.high)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_sizes_fit_every_scale(scale):
    for region in (*_photos.photographs(scale).train, *_photos.photographs(scale).test):
        assert [scale * n for n in region.low.shape[1:]] == list(region.high.shape[1:])


def test_patches_are_aligned_and_drawn_from_the_whole_region():
    """On a ramp, both resolutions of a patch must show the same place, however turned."""
    rows, columns = torch.arange(40.0).view(-1, 1), torch.arange(60.0)
    high = (2 * rows + columns).expand(3, 40, 60).contiguous()
    low = torch.nn.functional.avg_pool2d(high[None], 2)[0]
    patches = _photos.Patches((_photos.Region("ramp", low, high),), 8, 2)
    small, large = patches.draw(200, torch.Generator().manual_seed(0))
    assert small.shape == (200, 3, 8, 8)
    assert large.shape == (200, 3, 16, 16)
    assert torch.equal(torch.nn.functional.avg_pool2d(large, 2), small)
    assert (large.min(), large.max()) == (high.min(), high.max())
    assert len({(p[0, 0, -1] - p[0, 0, 0]).item() + 1j * (p[0, -1, 0] - p[0, 0, 0]).item() for p in small}) == 8


def test_downscaling_is_antialiased():
    board = torch.zeros(3, 16, 16, dtype=torch.uint8)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = 255
    assert set(_photos.downscale(board, 2)[:, 2:-2, 2:-2].flatten().tolist()) <= {127, 128}


# The metrics


def test_metrics_are_those_of_the_field():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8)
    output = _photos.to_uint8(truth.float() + 8 * torch.randn(3, 40, 50, generator=generator))
    output[:, :2] = 0  # in the border, which does not count
    y = []
    for picture in (output, truth):  # BT.601, as MATLAB's rgb2ycbcr
        red, green, blue = picture.double()[:, 2:-2, 2:-2] / 255
        y.append((16 + 65.481 * red + 128.553 * green + 24.966 * blue).numpy())
    psnr, ssim = _photos.psnr_and_ssim(output, truth, 2)
    assert psnr == pytest.approx(10 * math.log10(255**2 / np.mean((y[0] - y[1]) ** 2)), abs=1e-6)
    expected = skimage.metrics.structural_similarity(
        y[1], y[0], data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim == pytest.approx(expected, abs=1e-9)


def test_bicubic_scores_what_it_always_does():
    """Pinned, so that no change of data or metrics goes unnoticed; measured with torch 2.13 and scikit-image 0.26."""
    bicubic = _sr_measure.quality(_sr_measure.enlarge_bicubic())
    assert bicubic.mean_psnr == pytest.approx(32.00, abs=0.01)
    assert bicubic.mean_ssim == pytest.approx(0.870, abs=0.001)
    assert len(bicubic.as_dict()["psnr of each"]) == 7


# The symmetric quantiser


def test_symmetric_activation_rounds_to_levels_around_zero():
    for bits in (2, 4):
        layer, levels = SymmetricActivation(bits), 2 ** (bits - 1) - 1
        layer.range.data.fill_(1.5)
        layer.calibrated.fill_(1)
        x = torch.linspace(-4, 4, 1001)
        output = layer(x)
        assert torch.allclose(output, (x.clamp(-1.5, 1.5) * levels / 1.5).round() * 1.5 / levels)
        assert len(output.unique()) == 2 * levels + 1
        assert torch.allclose(layer(x, relu=True), output.clamp(min=0))
        inside = x.clamp(-1.5, 1.5)
        assert torch.allclose(layer(inside), weight_fake_quantize(inside, bits), atol=1e-6)


def test_symmetric_activation_learns_its_range():
    layer = SymmetricActivation(2)
    layer.range.data.fill_(1.0)
    layer.calibrated.fill_(1)
    x = torch.tensor([-3.0, -0.75, 0.25, 2.0], requires_grad=True)
    (layer(x) * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert x.grad.tolist() == [0, 10, 100, 0]
    # clipped below: -1; -0.75 is rounded to -1: error -0.25; 0.25 to 0: error -0.25; clipped above: 1
    assert layer.range.grad.item() == pytest.approx(-1 - 2.5 - 25 + 1000)


def test_symmetric_activation_is_calibrated_once_by_the_first_training_batch():
    layer = SymmetricActivation(2)
    layer.eval()(torch.full((1, 8), 9.0))
    assert not layer.calibrated
    layer.train()(torch.linspace(-50, 100, 1501))
    first = layer.range.item()
    assert first == pytest.approx(98.5, abs=0.2)
    layer(torch.full((1, 8), 9.0))
    assert layer.range.item() == first


def test_make_symmetric_leaves_no_other_quantiser():
    model = make_symmetric_(EDSR(blocks=2, channels=8, bits=4), 4)
    assert not any(isinstance(m, BoundedActivation) for m in model.modules())
    assert sum(isinstance(m, SymmetricActivation) for m in model.modules()) == 6
    layers = [m for m in model.modules() if isinstance(m, QuantizedConv2d)]
    assert len(layers) == 4
    assert all(m.quantize_weight.mode == "symmetric" and m.bits == 4 for m in layers)
    block = model.body[0]
    assert block.body[2] is block.quant_act2


# The training


def results(progress):
    """All but the times."""
    return {name: value for name, value in dataclasses.asdict(progress).items() if name != "step_seconds"}


def interrupt_in_epoch(epoch):
    def report(progress, step):
        if progress.epoch == epoch and step == 1:
            raise KeyboardInterrupt

    return report


def tensors(path):
    return read_safetensors(path)[0]


@pytest.mark.parametrize("epoch", [1, 3])  # right after recording; in the middle of the schedule
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(student, teacher, tmp_path, epoch):
    config, folder, _, uninterrupted = student
    with pytest.raises(KeyboardInterrupt):
        _sr_train.train(config, tmp_path, teacher, report=interrupt_in_epoch(epoch))
    torch.rand(7)  # whatever happened to the random state meanwhile does not matter
    _, resumed = _sr_train.train(config, tmp_path, teacher, resume=True)
    assert results(resumed) == results(uninterrupted)
    ours, theirs = (tensors(config.state_file(path)) for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in ours)
    assert any(name.startswith("schedule.") for name in ours) == (config.method == "ddtb")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_repeated_run_gives_the_same_bits(student, teacher, tmp_path):
    config, folder, *_ = student
    _sr_train.train(config, tmp_path, teacher)
    ours, theirs = (tensors(config.state_file(path)) for path in (tmp_path, folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_seed_gives_another_run(student, teacher, tmp_path):
    config, _, _, progress = student
    other = _sr_train.train(dataclasses.replace(config, seed=1), tmp_path, teacher)[1]
    assert all(a != b for a, b in zip(other.loss, progress.loss, strict=True))


def test_students_begin_as_the_teacher_and_see_the_same_patches(student, teacher):
    """Epoch 1 runs unquantised: both methods report the teacher's own loss."""
    config, _, model, progress = student
    run = _sr_train.Run(dataclasses.replace(config, method="full"), teacher)
    generator = torch.Generator().manual_seed(config.seed * 100_003 + 1)
    losses = []
    for _ in range(config.iterations):
        low, high = run.patches.draw(config.batch_size, generator)
        with torch.no_grad():
            losses.append((teacher(low)[0] - high).abs().mean().item())
    assert progress.pixel_loss[0] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    changed = [not torch.equal(p, q) for p, q in zip(model.head.parameters(), teacher.head.parameters(), strict=True)]
    assert all(changed)  # and then they train


def test_the_ddtb_schedule_reaches_its_dynamic_stage(teacher, tmp_path):
    config, stages = STUDENTS[0], {}
    start = _sr_train.BoundsSchedule.start_epoch

    class Spy(_sr_train.BoundsSchedule):
        def start_epoch(self, epoch):
            start(self, epoch)
            stages[epoch] = (self.activations[0].stage, sum(a.dynamic for a in self.activations), self.model.training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sr_train, "BoundsSchedule", Spy)
        model, _ = _sr_train.train(config, tmp_path, teacher)
    assert stages == {
        1: ("record", 0, False),
        **dict.fromkeys((2, 3, 4, 5), ("static", 1, True)),  # int(0.3 * 6) dynamic ones
        6: ("dynamic", 1, True),
    }
    activations = [m for m in model.modules() if isinstance(m, BoundedActivation)]
    assert all(m.alpha_upper.item() != 10 and m.alpha_lower.item() != -10 for m in activations)


def test_rates_are_halved_for_students_and_fall_to_zero_for_the_teacher(teacher):
    student = _sr_train.Run(dataclasses.replace(STUDENTS[0], epochs=60), teacher)
    rates = [student._rates(epoch, 0) for epoch in (1, 10, 11, 60)]
    assert rates == [(1e-3, 1e-2), (1e-3, 1e-2), (5e-4, 5e-3), (1e-3 / 32, 1e-2 / 32)]
    names = [len(group["params"]) for group in student.optimizer.param_groups]
    assert names[1] == 2 * 6  # upper and lower bound of 3 activations in each of 2 blocks
    full = _sr_train.Run(dataclasses.replace(FULL, epochs=10, iterations=100), None)
    assert full._rates(1, 0)[0] < full._rates(2, 0)[0]
    assert full._rates(10, 99)[0] < 1e-4 * _sr_train.TEACHER_LEARNING_RATE


@pytest.mark.slow
def test_the_teacher_learns_and_ddtb_beats_symmetric_at_2_bits(tmp_path):
    """A shorter training than the command's; there, DDTB leads in every seed."""
    full, _ = _sr_train.train(_sr_train.Config("full", channels=16, epochs=10, iterations=200), tmp_path)
    psnr = {"full": _sr_measure.quality(_sr_measure.enlarge(full)).mean_psnr}
    for method in ("ddtb", "symmetric"):
        config = _sr_train.Config(method, 2, channels=16, epochs=8, iterations=60)
        model, _ = _sr_train.train(config, tmp_path, full)
        psnr[method] = _sr_measure.quality(_sr_measure.enlarge(model)).mean_psnr
    assert psnr["full"] > 32.00 + 0.5
    assert psnr["ddtb"] > psnr["symmetric"]


# The files


def test_saved_network_is_rebuilt_from_its_file_alone(student, tmp_path):
    config, _, model, _ = student
    _sr_train.save_model(tmp_path / "model.safetensors", config, model)
    again = _sr_train.load_model(tmp_path / "model.safetensors")
    pairs = zip(_sr_measure.outputs(again), _sr_measure.outputs(model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_converted_network_is_small_and_gives_the_same_pictures(teacher, tmp_path):
    config = dataclasses.replace(STUDENTS[0], channels=8)
    model, _ = _sr_train.train(config, tmp_path, teacher)
    figures = _sr_measure.convert(model, tmp_path / "packed.safetensors")
    assert isinstance(model.body[0].body[0], QuantizedConv2d)  # a copy was converted
    assert figures["weight bytes in float32"] == 4 * 4 * 8 * 8 * 9
    assert figures["weight bytes in float32"] / 16 <= figures["weight bytes"] <= figures["weight bytes in float32"] / 10
    assert figures["bytes"] == (tmp_path / "packed.safetensors").stat().st_size
    assert figures["psnr"] == pytest.approx(_sr_measure.quality(_sr_measure.enlarge(model)).mean_psnr, abs=0.05)
    assert figures["share of values that differ"] < 0.05


def spoil(path, how):
    content = path.read_bytes()
    state, metadata = read_safetensors(path)
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "no metadata":
        write_safetensors(path, state, {})
    elif how == "no weights":
        write_safetensors(path, {"model.tail.1.bias": state["model.tail.1.bias"]}, metadata)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", "cannot be read"),
        ("no metadata", "holds no training state"),
        ("no weights", "does not fit this model"),
    ],
)
def test_damaged_state_gives_one_clear_line(tmp_path, capsys, how, message):
    config = _sr_train.Config("full", epochs=2, **SMALL)
    _sr_train.train(config, tmp_path)
    path = config.state_file(tmp_path)
    spoil(path, how)
    assert train_sr.main([*ARGUMENTS, "--output", str(tmp_path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_sr: ")
    assert message in error
    assert str(path) in error
    assert "without --resume" in error


def test_state_of_another_run_or_teacher_is_refused(student, teacher, tmp_path):
    config, folder, *_ = student
    path = config.state_file(tmp_path)
    path.write_bytes(config.state_file(folder).read_bytes())
    other = dataclasses.replace(config, batch_size=3, iterations=4)
    with pytest.raises(StateError, match=r"another run \(iterations 2 there, 4 here; batch_size 2 there, 3 here\)"):
        _sr_train.train(other, tmp_path, teacher, resume=True)
    stranger = _sr_train.build(dataclasses.replace(FULL, seed=5)).eval()
    with pytest.raises(StateError, match="is of another teacher"):
        _sr_train.train(config, tmp_path, stranger, resume=True)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "5"], "must be a whole number from 6 to 10000, got '5'"),
        (["--bits", "1"], "must be a whole number from 2 to 8, got '1'"),
        (["--seeds", "0"], "argument --seeds"),
        (["--blocks", "none"], "argument --blocks"),
        (["--patch", "7"], "argument --patch"),
        (["--threads", "-1"], "argument --threads"),
        (["--output", __file__], "is a file, not a folder"),
        (["--output", __file__ + "/below"], "--output: cannot write to"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_sr.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["skimage", "sklearn", "rich"])
def test_missing_extras_give_one_line(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert train_sr.main([]) == 1
    said = capsys.readouterr().err
    assert said == f'train_sr needs {_command.PHOTOGRAPHS[module]}: pip install "tersor[demo]"\n'


def test_largest_patch_fits_every_training_region():
    size = min(n for region in _photos.photographs(2).train for n in region.low.shape[1:])
    assert train_sr._parse(["--patch", "96"]).patch == 96 <= size


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """As a user runs it, in small: interrupted, resumed, all files there and consistent."""
    train = _sr_train.train

    def interrupted(config, output, teacher, resume, report):
        if config.method == "symmetric" and config.bits == 2:
            raise KeyboardInterrupt
        return train(config, output, teacher, resume, report)

    monkeypatch.setattr(_sr_train, "train", interrupted)
    arguments = [*ARGUMENTS, "--output", str(tmp_path)]
    assert train_sr.main(arguments) == 130
    monkeypatch.setattr(_sr_train, "train", train)
    before = _sr_train.Config("ddtb", 4, epochs=6, **SMALL).state_file(tmp_path)
    written = before.stat().st_mtime_ns
    assert train_sr.main([*arguments, "--resume"]) == 0
    assert before.stat().st_mtime_ns == written  # what was finished is not trained again
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    for bits, seeds in ((4, ["0"]), (2, ["0", "1"])):
        for method in ("DDTB", "symmetric"):
            figures = results[f"{method} {bits}-bit"]
            assert list(figures["seeds"]) == seeds
            each = [run["psnr"] for run in figures["seeds"].values()]
            assert figures["psnr"] == pytest.approx(sum(each) / len(each))
        assert results[f"DDTB {bits}-bit packed"]["bytes"] > 0
    assert results["bicubic"]["psnr"] == pytest.approx(32.00, abs=0.01)
    assert len(results["full precision"]["seeds"]["0"]["pixel loss"]) == 2
    assert (tmp_path / "sr.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for path in tmp_path.glob("edsr_*.safetensors"):
        assert path.name in said.replace("\n", "")
    assert f"{results['DDTB 2-bit']['psnr']:.3f}" in said
    model = _sr_train.load_model(tmp_path / "edsr_ddtb_2bit_seed1.safetensors")
    psnr = _sr_measure.quality(_sr_measure.enlarge(model)).mean_psnr
    assert psnr == results["DDTB 2-bit"]["seeds"]["1"]["psnr"]
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_run_without_resume_begins_anew(tmp_path):
    config = _sr_train.Config("full", epochs=2, **SMALL)
    _sr_train.train(config, tmp_path)
    stale = tensors(config.state_file(tmp_path))
    other = dataclasses.replace(config, seed=3)
    assert other.state_file(tmp_path) == config.state_file(tmp_path)
    _sr_train.train(other, tmp_path)
    fresh = tensors(config.state_file(tmp_path))
    assert not torch.equal(fresh["model.head.0.weight"], stale["model.head.0.weight"])


def test_most_detailed_window_is_where_something_is():
    picture = torch.zeros(3, 64, 96, dtype=torch.uint8)
    picture[:, 34:46:2, 50:62] = 255
    picture[:, :20] = 255  # bright, but plain
    top, left = _sr_plot.most_detailed(picture, 16, 16)
    assert (top, left) == (32, 48)


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tersor.models.train_sr", "--help"], capture_output=True, text=True, check=True
    )
    assert "--resume" in done.stdout
    assert done.stderr == ""
