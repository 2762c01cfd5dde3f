"""The benchmark harness: what it times, what it refuses to time, and what it writes."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor

BENCH = Path(__file__).parents[1] / "bench"

TINY = """
import torch
from harness import benchmark
from suite import Implementation, Suite, Target


def make_inputs(size, dtype, device, generator):
    return (torch.randn(size, generator=generator).to(device, dtype),)


def square(size):
    return lambda x: x * x


def wrong_gradient(size):
    return lambda x: x * x.detach()


def not_a_number(size):
    return lambda x: torch.where(x > 1, torch.nan, x * x)


def raises(size):
    def function(x):
        raise RuntimeError("no such kernel in /some/folder/file.py")

    return function


IMPLEMENTATIONS = [
    Implementation("tersor", square, ours=True),
    Implementation("eager", lambda size: lambda x: x.pow(2), note="as published"),
    Implementation("stand_in", square, stands_in_for="eager"),
    Implementation("forced", square, ours=True, backend="reference"),
    Implementation("raises", raises),
    Implementation("stand_in_for_raises", square, stands_in_for="raises"),
    Implementation("absent", raises, unavailable=lambda: "is not installed"),
    Implementation("wrong_output", lambda size: lambda x: x * x + 1e-3),
    Implementation("wrong_large", lambda size: square(size) if size < 100 else lambda x: x * x * 1.1),
    Implementation("wrong_gradient", wrong_gradient),
    Implementation("wrong_nan", not_a_number),
    Implementation("wrong_raises", raises, ours=True),
]
bench_square = benchmark(
    Suite(
        operator="square",
        sizes={"n4096": 4096},
        small=64,
        dtypes=[torch.float32, torch.bfloat16],
        make_inputs=make_inputs,
        reference=square,
        traffic=lambda size, element, direction: (2 * size * element, size),
        implementations=IMPLEMENTATIONS,
        targets=[Target("square/*/float32/*", "eager", 1e9), Target("square/*/float32/*", "copy", 1e-9)],
    )
)
"""


def load(path):
    """A script of bench/ as a module, with what it imports from its own folders."""
    added = [str(BENCH), str(BENCH / "support")]
    sys.path[:0] = added
    try:
        spec = importlib.util.spec_from_file_location(f"bench_under_test_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        for folder in added:
            sys.path.remove(folder)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The harness in a folder of its own, with one tiny suite."""
    folder = tmp_path_factory.mktemp("tiny") / "bench"
    folder.mkdir()
    for name in ("conftest.py", "run.py", "report.py"):
        shutil.copy(BENCH / name, folder / name)
    shutil.copytree(BENCH / "support", folder / "support", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "bench_tiny.py").write_text(TINY)
    return folder


def run(folder, *arguments, **environment):
    command = [sys.executable, str(folder / "run.py"), "--quick", "--device", "cpu", "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def red_run(tiny):
    """Everything in the tiny suite, wrong implementations too."""
    output = tiny / "red"
    return run(tiny, "--output", str(output)), json.loads((output / "results.json").read_text()), output


def test_a_red_check_gives_no_timing_and_a_red_exit(red_run):
    done, results, _ = red_run
    assert done.returncode == 1
    right = {"tersor", "eager", "forced", "stand_in_for_raises"}
    assert {m["impl"] for m in results["measurements"] if m["dtype"] == "float32"} == right
    # bfloat16 itself rounds by more than 1e-3.
    assert {m["impl"] for m in results["measurements"] if m["dtype"] == "bfloat16"} == right | {"wrong_output"}
    wrong = {(row["impl"], row["group"]): row["reason"] for row in results["not_timed"] if row["kind"] == "wrong"}
    names = {"wrong_output", "wrong_large", "wrong_gradient", "wrong_nan", "wrong_raises"}
    for direction in ("forward", "forward_backward"):
        assert {impl for impl, group in wrong if group == f"square/n4096/float32/{direction}"} == names
        assert f"square/n4096/float32/{direction} wrong_output" in done.stderr
    assert "gradient 0 is off by" in wrong["wrong_gradient", "square/n4096/float32/forward"]
    assert "small size" not in wrong["wrong_large", "square/n4096/float32/forward"]
    assert "nan" in wrong["wrong_nan", "square/n4096/bfloat16/forward"]


def test_what_a_peer_cannot_do_is_a_finding(red_run):
    _, results, output = red_run
    kinds = {(row["impl"], row["kind"]): row["reason"] for row in results["not_timed"]}
    assert kinds["raises", "fails"] == "RuntimeError: no such kernel in file.py"
    assert kinds["absent", "unavailable"] == "is not installed"
    assert not any(row["impl"] == "stand_in" for row in results["not_timed"])
    assert "fails: RuntimeError: no such kernel" in (output / "table.md").read_text()


def test_the_figures_of_a_measurement(red_run):
    _, results, _ = red_run
    found = {(m["group"], m["impl"]): m for m in results["measurements"]}
    assert len(found) == 2 * 4 + 2 * 5
    for m in found.values():
        assert 0 < m["min"] <= m["p20"] <= m["median"] <= m["p80"]
        assert m["min"] <= m["q1"] <= m["median"] <= m["q3"]
        assert m["rounds"] >= 3
        assert m["calls_per_round"] > 1  # 4096 numbers take microseconds, a round lasts milliseconds
        assert m["bytes"] == 2 * 4096 * (4 if m["dtype"] == "float32" else 2)
        assert m["gb_per_s"] == pytest.approx(m["bytes"] / m["median"] / 1e9, rel=1e-4)
        copy = results["groups"][m["group"]]["copy_bytes_per_second"]
        assert m["share_of_copy"] == pytest.approx(m["bytes"] / m["median"] / copy, rel=1e-4)
        base = found[m["group"], "tersor"]["median"]
        assert m["times_tersor"] == pytest.approx(m["median"] / base, rel=1e-4)
    both = found["square/n4096/float32/forward_backward", "tersor"]
    assert both["error"] < 1e-6
    assert both["extra_memory_bytes"] == 0  # x * x keeps x alone
    assert found["square/n4096/float32/forward", "eager"]["note"] == "as published"


def test_the_machine_and_its_limits_are_on_record(red_run):
    _, results, output = red_run
    assert results["machine"]["threads"] == 1
    assert results["machine"]["torch"] == torch.__version__
    assert results["machine"]["freed_memory_is_kept"]
    assert results["limits"]["copy_bytes_per_second"] > 0
    assert set(results["limits"]["matmul_flops_per_second"]) == {"float32", "bfloat16"}
    host = socket.gethostname()
    assert f'"{host}"' not in (output / "results.json").read_text()


def test_targets_say_reached_or_not(red_run):
    _, results, output = red_run
    verdicts = {(t["group"], t["against"]): t for t in results["targets"]}
    assert len(verdicts) == 4  # two targets, two float32 groups
    assert not verdicts["square/n4096/float32/forward", "eager"]["reached"]
    assert verdicts["square/n4096/float32/forward", "eager"]["figure"] > 0
    assert verdicts["square/n4096/float32/forward_backward", "copy"]["reached"]
    text = (output / "table.md").read_text()
    assert text.count("**not reached**") == 2
    assert text.count("| reached |") == 2


def test_plots_are_drawn(red_run):
    for name in ("roofline.png", "speedup.png"):
        content = (red_run[2] / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_a_run_without_wrong_results_is_green_and_times_no_backend_whose_checks_are_red(tiny):
    arguments = ["-k", "float32 and (tersor or eager or forced)"]
    done = run(tiny, "--output", str(tiny / "green"), *arguments, TERSOR_BENCH_WITHOUT="reference")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tiny / "green" / "results.json").read_text())
    assert sorted(m["impl"] for m in results["measurements"]) == ["eager", "eager", "tersor", "tersor"]
    assert {row["impl"] for row in results["not_timed"]} == {"forced"}
    assert {row["reason"] for row in results["not_timed"]} == {"the checks of the reference backend are red"}


def test_a_run_of_nothing_but_wrong_results_has_a_report(tiny):
    done = run(tiny, "--output", str(tiny / "wrong"), "-k", "wrong_gradient and float32")
    assert done.returncode == 1
    text = (tiny / "wrong" / "table.md").read_text()
    assert "## Wrong results" in text
    assert "`square/n4096/float32/forward_backward` **wrong_gradient**" in text


def test_a_group_after_the_time_limit_is_not_timed(tiny):
    done = run(tiny, "--output", str(tiny / "late"), "-k", "tersor and float32", "--time-limit", "0.001")
    results = json.loads((tiny / "late" / "results.json").read_text())
    assert done.returncode == 0
    assert not results["measurements"]
    assert {row["reason"] for row in results["not_timed"]} == {"the time limit of the run was reached"}


def test_an_expression_that_matches_nothing_is_an_error(tiny):
    assert run(tiny, "--output", str(tiny / "nothing"), "-k", "nonesuch").returncode != 0


@pytest.mark.slow
def test_the_dispatch_benchmark_runs(tmp_path):
    done = run(BENCH, "--output", str(tmp_path), "-k", "dispatch")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {m["direction"] for m in results["measurements"]} == {"forward", "forward_graph", "forward_backward"}
    assert {m["impl"] for m in results["measurements"]} == {"tersor", "tersor_operator", "aten_relu"}


@pytest.mark.parametrize(("device", "size", "impl"), [("cpu", "b16", "eager"), ("cuda", "b128", "triton")])
def test_every_bench_file_collects(device, size, impl):
    options = ["addopts=", "python_files=bench_*.py", "python_functions=bench_*"]
    flags = [flag for option in options for flag in ("-o", option)]
    command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "--collect-only", "-q", *flags, str(BENCH)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TERSOR_BENCH_DEVICE": device})
    assert done.returncode == 0, done.stdout
    for path in BENCH.rglob("bench_*.py"):
        assert f"{path.name}::bench_" in done.stdout
    assert f"[dilated_attention/stage1_{size}/bfloat16/forward_backward-{impl}]" in done.stdout


SIZE = (1, 10, 15, 3, 4)


@pytest.fixture(scope="module")
def peers():
    return load(BENCH / "support" / "attention_peers.py")


def expected(qkv):
    with tersor.use_backend("reference"):
        return tersor.dilated_attention(*qkv.unbind(3))


def na2d(query, key, value, kernel_size, dilation, scale):
    """NATTEN's rule: at the border the window moves inwards, within the query's residue class modulo the dilation."""

    def taps(i, length):
        members = list(range(i % dilation, length, dilation))
        first = min(max(members.index(i) - kernel_size // 2, 0), len(members) - kernel_size)
        return members[first : first + kernel_size]

    _, height, width, _, _ = query.shape
    rows = torch.tensor([taps(y, height) for y in range(height)])  # [H, K]
    columns = torch.tensor([taps(x, width) for x in range(width)])  # [W, K]
    k, v = (t[:, rows][:, :, :, columns].permute(0, 1, 3, 2, 4, 5, 6).flatten(3, 4) for t in (key, value))
    weights = (scale * (query.unsqueeze(3) * k).sum(-1)).softmax(3)
    return (weights.unsqueeze(-1) * v).sum(3)


@pytest.mark.parametrize("name", ["natten_padded", "natten_raw"])
def test_natten_is_set_up_fairly(peers, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "natten", type(sys)("natten"))
    sys.modules["natten"].na2d = na2d
    size = (1, 21, 20, 3, 4)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(*size[:3], 3, *size[3:], generator=generator, dtype=torch.float64)
    crop = peers.interior if name == "natten_raw" else lambda tensor: tensor
    grad_output = torch.randn(size, generator=generator, dtype=torch.float64)
    pairs = []
    for function in (getattr(peers, name)(size), expected):
        leaf = qkv.clone().requires_grad_()
        output = function(leaf)
        pairs.append((output.detach(), torch.autograd.grad(output, leaf, grad_output)[0]))
    for got, right in zip(*pairs, strict=True):
        torch.testing.assert_close(crop(got), crop(right), rtol=0, atol=1e-12)
    border_is_equal = torch.allclose(pairs[0][0], pairs[1][0])
    assert border_is_equal == (name == "natten_padded")


@pytest.mark.parametrize("name", ["flex_padded", "flex_corrected"])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_flex_attention_is_exact(peers, monkeypatch, name):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    function = peers.flex_padded(SIZE) if name == "flex_padded" else peers.flex_corrected(SIZE, device="cpu")
    qkv = torch.randn(*SIZE[:3], 3, *SIZE[3:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(function(qkv), expected(qkv), rtol=0, atol=2e-6)


def test_readme_table_is_written_and_checked(red_run, tmp_path, capsys):
    report = load(BENCH / "report.py")
    shutil.copytree(red_run[2], tmp_path / "results" / "machine")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nrest\n")
    arguments = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    assert report.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{report.BEGIN}\n**")
    assert text.endswith(f"\n{report.END}\n\nrest\n")
    assert re.search(r"^\| `square` \| forward \| float32 \| 1 \| \d+% \|", text, re.MULTILINE)
    readme.write_text("# no markers\n")
    assert report.main(arguments) == 1
    assert readme.read_text() == "# no markers\n"


def test_rendering_again_changes_nothing(red_run, tmp_path):
    report = load(BENCH / "report.py")
    folder = tmp_path / "machine"
    shutil.copytree(red_run[2], folder)
    before = (folder / "table.md").read_text()
    assert report.main([str(folder)]) == 0
    assert (folder / "table.md").read_text() == before


def test_gpu_runner_says_that_there_is_no_gpu(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout.startswith("no CUDA device, nothing done")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The GPU runner on no GPU, its files under tmp_path."""
    module = load(BENCH / "gpu.py")
    monkeypatch.setattr(module, "SITE", tmp_path / "site")
    with (tmp_path / "gpu.log").open("w") as log:
        runner = module.Gpu("card", "9.0", tmp_path, log, dict.fromkeys(module.LIMITS, 30))
        runner.module = module
        yield runner


@pytest.mark.parametrize(
    ("failing", "red"),
    [
        ([], set()),
        (["test_parity[triton-float32]"], {"triton"}),
        (["test_parity[native-cuda]", "test_bitwise[triton]"], {"native", "triton"}),
        (["test_anything_else"], {"native", "triton"}),
    ],
)
def test_gpu_runner_blocks_the_backend_that_a_failing_test_names(gpu, monkeypatch, failing, red):
    def write_report(self, *command, env=None):
        report = Path(next(part for part in command if part.startswith("--junitxml=")).removeprefix("--junitxml="))
        cases = "".join(f'<testcase classname="tests" name="{name}"><failure/></testcase>' for name in failing)
        good = '<testcase classname="tests" name="good"/><testcase classname="tests" name="s"><skipped/></testcase>'
        report.write_text(f"<testsuites><testsuite>{cases}{good}</testsuite></testsuites>")
        return int(bool(failing))

    monkeypatch.setattr(type(gpu), "run", write_report)
    result = gpu.stage("check")
    assert set(gpu.red) == red
    assert result.verdict == ("failed" if red else "passed")
    assert result.detail.startswith("1 passed, 1 skipped")


def test_gpu_runner_without_a_verdict_times_no_backend(gpu, monkeypatch):
    monkeypatch.setattr(type(gpu), "run", lambda self, *command, env=None: None)
    assert gpu.stage("check").verdict == "failed"
    assert set(gpu.red) == {"native", "triton"}
    seen = []
    monkeypatch.setattr(type(gpu), "run", lambda self, *command, env=None: seen.append((command, env)) or 0)
    assert gpu.stage("bench").verdict == "passed"
    assert set(seen[0][1]["TERSOR_BENCH_WITHOUT"].split()) == {"native", "triton"}


def test_gpu_runner_ends_what_takes_too_long(gpu):
    gpu.limits["build"] = 1
    gpu.module._STAGES["build"] = lambda runner: gpu.module.Result("passed", str(runner.run("sleep", "60")))
    assert gpu.stage("build").detail == "None"
    assert "time is up" in (gpu.output / "gpu.log").read_text()


def test_gpu_limits_leave_the_whole_run_under_eight_minutes(gpu):
    assert sum(gpu.module.LIMITS.values()) < 480
    assert set(gpu.module.LIMITS) == set(gpu.module._STAGES)


def test_the_readme_shows_the_committed_results() -> None:
    """What the README says is what `bench/report.py --readme` writes from bench/results."""
    done = subprocess.run(
        [sys.executable, str(BENCH / "report.py"), "--readme", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def frozen_results(operator: str, times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Results of a product timed with parts of its weight frozen: size to times of tersor and dense."""
    groups, measurements = {}, []
    for size, seconds in times.items():
        parts = {"operator": operator, "size": size, "dtype": "float32", "direction": "weight_gradient"}
        name = "/".join(parts.values())
        groups[name] = parts | {"bytes": None, "flops": None}
        measurements += [
            {"group": name, "impl": impl, "median": s, "ours": impl == "tersor", "times_tersor": s / seconds["tersor"]}
            for impl, s in seconds.items()
        ]
    machine = {"processor": "one", "threads": 1, "torch": "2", "quick": False}
    return {"groups": groups, "measurements": measurements, "limits": {}, "machine": machine}


def test_the_crossover_plot_needs_dense_and_ours(tmp_path: Path) -> None:
    plots = load(BENCH / "support" / "plots.py")
    times = {
        "none_0": {"tersor": 1.0, "dense": 1.0},
        "tile_75": {"tersor": 1.0, "dense": 4.0},
        "tile_50": {"tersor": 1.0, "dense": 2.0},
        "tile_90": {"tersor": 1.0},
        "element_0": {"tersor": 1.1, "dense": 1.0},
        "layer_100": {"tersor": 1e-3, "dense": 1.0},
    }
    results = frozen_results("frozen_linear", times)
    lines = plots._curves(results, "frozen_linear")
    assert lines["tile"] == [(0, 1.0), (50, 0.5), (75, 0.25), (100, 1e-3)]
    assert lines["element"] == [(0, 1.1), (100, 1e-3)]
    assert set(lines) == {"tile", "element"}
    assert plots.draw(results, tmp_path) == ["crossover.png"]
    assert (tmp_path / "crossover.png").read_bytes().startswith(b"\x89PNG")
    assert plots.draw(frozen_results("square", {"n4": {"tersor": 1.0, "dense": 2.0}}), tmp_path) == ["speedup.png"]
    assert not (tmp_path / "crossover.png").exists()
