"""Measures and reports: ``python bench/run.py [--quick] [--output bench/results/NAME] [-k EXPRESSION]``.

Everything runs in one child process, whose environment is fixed before it starts: threads, and an allocator that
keeps freed memory (a fresh 64 MB output costs more page faults than the kernel takes to write it).
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import report

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
_KEEP_MEMORY = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
_PYTEST = [
    "--import-mode=importlib",
    "-o",
    "addopts=",
    "-o",
    "python_files=bench_*.py",
    "-o",
    "python_functions=bench_*",
]
_PYTEST += ["-p", "no:cacheprovider", "-ra", "--benchmark-only", "--benchmark-columns=median,iqr,rounds"]
_PYTEST += ["--benchmark-sort=mean", "--benchmark-disable-gc"]


def main() -> int:
    options = parse()
    raw = ROOT / "build" / "bench" / "raw.json"
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--rootdir={ROOT}", *_PYTEST, f"--benchmark-json={raw}"]
    command += ["-k", options.k] if options.k else []
    command += options.paths or [str(BENCH)]
    verdict = subprocess.run(command, cwd=ROOT, env=environment(options)).returncode
    if not raw.is_file() or not raw.stat().st_size:
        print(f"bench: nothing was measured (pytest exited with {verdict})", file=sys.stderr)
        return verdict or 1
    results = report.slim(raw)
    folder = options.output or default_folder(results, options.quick)
    report.write(results, folder)
    print(f"bench: results, table and plots are in {folder}")
    for row in results["not_timed"]:
        if row["kind"] == "wrong":
            print(f"bench: NOT TIMED, wrong result: {row['group']} {row['impl']}: {row['reason']}", file=sys.stderr)
    return verdict


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, under two minutes")
    parser.add_argument("--full", action="store_true", help="slow extras too, such as compiling a whole model")
    parser.add_argument("--output", type=Path, help="folder for the results (default: one named after the machine)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is a card")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("TERSOR_BENCH_THREADS", "2")))
    parser.add_argument("--time-limit", type=float, help="seconds after which no further group is started")
    parser.add_argument("-k", metavar="EXPRESSION", help="as pytest's: only benchmarks whose name matches")
    parser.add_argument("paths", nargs="*", help="bench files (default: all)")
    return parser.parse_args()


def environment(options: argparse.Namespace) -> dict[str, str]:
    # Under pytest-xdist, whose workers start this in a test, pytest-benchmark would switch itself off.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.pop("TERSOR_BACKEND", None)  # `tersor` is to be what a user gets
    env["GLIBC_TUNABLES"] = ":".join(filter(None, [env.get("GLIBC_TUNABLES"), _KEEP_MEMORY]))
    env["TERSOR_BENCH_THREADS"] = env["OMP_NUM_THREADS"] = str(options.threads)
    env["TERSOR_BENCH_QUICK"] = "1" if options.quick else "0"
    env["TERSOR_BENCH_FULL"] = "1" if options.full else "0"
    if options.device:
        env["TERSOR_BENCH_DEVICE"] = options.device
    if options.time_limit:
        env["TERSOR_BENCH_DEADLINE"] = str(time.time() + options.time_limit)
    return env


def default_folder(results: dict, quick: bool) -> Path:
    """``bench/results/<machine>``, to be committed; a quick run is no result and goes below ``build/``."""
    if quick:
        return ROOT / "build" / "bench" / "quick"
    machine = results["machine"]
    name = machine.get("gpu") or f"cpu {machine['processor']} {machine['threads']} threads"
    return (
        BENCH / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    )


if __name__ == "__main__":
    sys.exit(main())
