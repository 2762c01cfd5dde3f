"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with scratch memory poisoned by NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def runtime(name: str) -> str:
    """The compiler's own shared runtime, which must be loaded before everything else."""
    compiler = os.environ.get("CXX", "g++")
    try:
        done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    except OSError:
        return ""
    path = done.stdout.strip()
    return path if Path(path).is_file() else ""


@pytest.mark.slow
@pytest.mark.skipif(not runtime("libasan.so"), reason="no compiler with libasan here")
def test_no_bad_memory_and_no_undefined_behaviour(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        # Uses of null and wrapped pointers are found by the address sanitizer; checks of every step of a pointer
        # double the time of compilation.
        "CXXFLAGS": "-g1 -O0 -fsanitize=address,undefined -fno-sanitize=null,pointer-overflow -fno-sanitize-recover=all"
        " -DTERSOR_POISON",
        "LDFLAGS": "-fsanitize=address,undefined",
        "TERSOR_CUDA": "0",
    }
    folders = [f"--build-lib={tmp_path / 'library'}", f"--build-temp={tmp_path / 'objects'}"]
    build = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "C++ built" in done.stderr, done.stderr[-3000:]
    environment |= {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",  # CPython and torch leak by design at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TERSOR_NATIVE_DIR": str(tmp_path / "library" / "tersor"),
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "OMP_NUM_THREADS": "2",
    }
    exercise = [sys.executable, str(ROOT / "tests" / "support" / "exercise.py"), "__asan_init"]
    done = subprocess.run(exercise, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("exercised baseline")
    assert "runtime error" not in done.stderr
