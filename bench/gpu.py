"""Builds, checks and measures on a machine with an NVIDIA GPU, in under eight minutes: ``python bench/gpu.py``.

Needs torch with CUDA, pytest and pytest-benchmark; nvcc, Triton and compute-sanitizer are used where they are. Nothing
is downloaded, and nothing is installed: the package is built into ``build/gpu``. The log, a summary and the results go
to $OUT, or to ``bench/results/<card>``. Exit code 0: all stages passed; 1: one did not; 2: no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SITE = ROOT / "build" / "gpu" / "site"
LIMITS = {"build": 100, "check": 170, "sanitize": 50, "bench": 140, "report": 15}  # seconds; 475 together
BACKENDS = ("native", "triton")
TOOLS = ("memcheck", "racecheck")
# What a GPU changes; installation, sanitizers and the demo are checked on machines without one.
TESTS = [
    "tests/attention",
    "tests/freezing",
    "tests/quantization",
    "tests/sparsity",
    "tests/tokens",
    "tests/models",
    *(f"tests/test_{name}.py" for name in ("conformance", "parity", "backends")),
]
NOT_HERE = 3  # exit code of support/sanitize.py for a backend that does not run on this machine

_PROBE = """
import torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(card.name, f"{card.major}.{card.minor}", sep=";")
"""


class Result(NamedTuple):
    """``passed``, ``failed`` or ``not run``, and a few words."""

    verdict: str
    detail: str


class Gpu:
    """One run: the card, where its files go, and which backends have failed a check so far."""

    def __init__(self, card: str, capability: str, output: Path, log: IO[str], limits: dict[str, int]) -> None:
        self.output, self.log, self.limits = output, log, limits
        self.red: dict[str, str] = {}
        self.built = False
        self.env = dict(os.environ)
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SITE), self.env.get("PYTHONPATH")]))
        self.env.setdefault("TERSOR_CUDA", "1")
        self.env.setdefault("TORCH_CUDA_ARCH_LIST", capability)  # one architecture compiles in a third of the time
        self.deadline = 0.0
        self.say(f"{card}, compute capability {capability}")

    def stage(self, name: str) -> Result:
        self.deadline = time.monotonic() + self.limits[name]
        self.say(f"==== {name} (at most {self.limits[name]} s)")
        return _STAGES[name](self)

    def run(self, *command: str, env: dict[str, str] | None = None) -> int | None:
        """The exit code; None when the stage's time was up. Output goes to the log, children are ended with it."""
        self.say("$ " + " ".join(command))
        left = self.deadline - time.monotonic()
        if left <= 0:
            return None
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.env | (env or {}), stdout=self.log, stderr=self.log, start_new_session=True
        )
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            self.say("the stage's time is up")
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def say(self, text: str) -> None:
        print(text, file=self.log, flush=True)

    def usable(self) -> list[str]:
        return [backend for backend in BACKENDS if backend not in self.red]


def build(gpu: Gpu) -> Result:
    """Into build/gpu, not into the interpreter's packages: a system Python refuses that, and rightly."""
    shutil.rmtree(SITE, ignore_errors=True)
    temporary = f"--build-temp={SITE.parent / 'temp'}"
    code = gpu.run(sys.executable, "setup.py", "build", f"--build-base={SITE.parent}", f"--build-lib={SITE}", temporary)
    if code is None or code:
        return Result("failed", _exit(code))
    code = gpu.run(sys.executable, "-c", "import tersor; print(tersor.__file__); print(tersor.backends())")
    if code is None or code:
        return Result("failed", f"import tersor: {_exit(code)}")
    gpu.built = True
    said = json.loads((SITE / "tersor" / "_build.json").read_text()).get("CUDA C++", "not built")
    return Result("failed" if "failed" in said else "passed", f"CUDA C++ {said}")


def check(gpu: Gpu) -> Result:
    """The tests that a GPU has a part in; one that fails blocks the backend in its name, or both where it has none."""
    report = SITE.parent / "check.xml"
    report.unlink(missing_ok=True)
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    code = gpu.run(sys.executable, "-m", "pytest", *TESTS, "-q", *parallel, f"--junitxml={report}")
    if code is None or not report.is_file():
        gpu.red |= dict.fromkeys(BACKENDS, f"the test-suite gave no verdict: {_exit(code)}")
        return Result("failed", _exit(code))
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    for test in failed:
        named = [backend for backend in BACKENDS if backend in test]
        gpu.red |= dict.fromkeys(named or BACKENDS, f"fails {test}")
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = f"{len(cases) - len(failed) - skipped} passed, {skipped} skipped"
    if failed or code:
        return Result("failed", f"{counts}, {len(failed)} failed: {', '.join(failed[:3]) or _exit(code)}")
    return Result("passed", counts)


def sanitize(gpu: Gpu) -> Result:
    """Each backend's kernels under compute-sanitizer, every tensor in an allocation of its own."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return Result("not run", "compute-sanitizer was not found")
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts, bad = [], False
    for backend in gpu.usable():
        script = [sys.executable, str(BENCH / "support" / "sanitize.py"), backend]
        code = gpu.run(*script)  # bare first: it also fills Triton's cache, whose compiler would be traced otherwise
        if code == NOT_HERE:
            verdicts.append(f"{backend}: does not run here")
            continue
        codes = {"results": code}
        for tool in TOOLS:
            codes[tool] = gpu.run(program, "--tool", tool, "--error-exitcode", "9", *script, env=env)
        wrong = [f"{name} {_exit(code)}" for name, code in codes.items() if code != 0]
        if wrong:
            bad = True
            gpu.red[backend] = f"sanitize: {', '.join(wrong)}"
        verdicts.append(f"{backend}: {', '.join(wrong) or 'clean'}")
    return Result("failed" if bad else "passed", "; ".join(verdicts) or "no backend left to look at")


def bench(gpu: Gpu) -> Result:
    """All benchmarks, without the backends that are red; a group that would start too late is left out."""
    env = {"TERSOR_BENCH_WITHOUT": " ".join(gpu.red)}
    for backend, reason in gpu.red.items():
        gpu.say(f"no timing of {backend}: {reason}")
    margin = 30  # what the last group and the report take
    limit = str(max(1, int(gpu.deadline - time.monotonic()) - margin))
    program = [sys.executable, str(BENCH / "run.py"), "--device", "cuda"]
    code = gpu.run(*program, "--output", str(gpu.output), "--time-limit", limit, env=env)
    without = f", without {' and '.join(gpu.red)} (checks are red)" if gpu.red else ""
    return Result("failed" if code is None or code else "passed", _exit(code) + without)


def report(gpu: Gpu) -> Result:
    if not (gpu.output / "results.json").is_file():
        return Result("not run", "there are no results")
    code = gpu.run(sys.executable, str(BENCH / "report.py"), str(gpu.output))
    return Result("failed" if code is None or code else "passed", "table.md, roofline.png, speedup.png")


_STAGES: dict[str, Callable[[Gpu], Result]] = {
    "build": build,
    "check": check,
    "sanitize": sanitize,
    "bench": bench,
    "report": report,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", action="append", choices=list(_STAGES), help="only this one (may be repeated)")
    parser.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another time limit")
    options = parser.parse_args()
    try:
        limits = LIMITS | {name: int(value) for name, value in (text.split("=") for text in options.limit)}
    except ValueError:
        parser.error(f"--limit must be STAGE=SECONDS, got {options.limit}")
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if ";" not in probe.stdout:
        why = probe.stderr.strip().splitlines()[-1:] or ["torch sees none"]
        print(f"no CUDA device, nothing done ({why[0]})")
        return 2
    card, capability = probe.stdout.strip().split(";")
    folder = BENCH / "results" / re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    output = Path(os.environ.get("OUT") or folder).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with (output / "gpu.log").open("w") as log:
        rows = stages(Gpu(card, capability, output, log, limits), options.stage or list(_STAGES))
    lines = ["| stage | verdict | seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {r.verdict} | {spent:.0f} | {r.detail} |" for name, r, spent in rows]
    (output / "summary.md").write_text("\n".join([f"# {card}", "", *lines]) + "\n")
    print("\n".join([*lines, f"log and results: {output}"]))
    return int(any(result.verdict == "failed" for _, result, _ in rows))


def stages(gpu: Gpu, wanted: list[str]) -> list[tuple[str, Result, float]]:
    """Runs them in order; a package that cannot be imported ends the run, since there is nothing to check."""
    rows: list[tuple[str, Result, float]] = []
    for name in (name for name in _STAGES if name in wanted):
        start = time.monotonic()
        stopped = bool(rows) and rows[0][0] == "build" and not gpu.built
        result = Result("not run", "the build failed") if stopped else gpu.stage(name)
        rows.append((name, result, time.monotonic() - start))
        gpu.say(f"==== {name}: {result.verdict}, {result.detail}")
        print(f"{name}: {result.verdict}, {result.detail}", flush=True)
    return rows


def _exit(code: int | None) -> str:
    return "time is up" if code is None else f"exit code {code}" if code else "done"


if __name__ == "__main__":
    sys.exit(main())
