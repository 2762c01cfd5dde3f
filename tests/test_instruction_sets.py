"""The CPU kernels at every instruction-set level that this processor runs, and that the levels stay apart."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from subjects import SUBJECTS, check_quantizer, clones, gradients

from tersor import _backends

native = _backends._introspection()
LEVELS = native.cpu_isa_supported() if native else ["none"]
pytestmark = pytest.mark.skipif(native is None, reason="the C++ library was not built here")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.cpu_isa()
    native.set_cpu_isa(request.param)
    yield request.param
    native.set_cpu_isa(before)


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_every_level_is_right(subject, level: str) -> None:
    assert native.cpu_isa() == level
    tolerances = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for dtype, tolerance in tolerances.items():
        if dtype not in (*subject.dtypes, *[torch.float64] * subject.float64):
            continue
        for size in subject.sizes:
            tensors = subject.make(dtype, "cpu", size=size)
            if subject.quantizer:
                check_quantizer(subject, tensors)
                continue
            exact = gradients(subject.exact, subject.widened(tensors), dtype)
            for wanted, given in zip(exact, gradients(subject, clones(tensors)), strict=True):
                error = (given.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
                assert error <= tolerance, f"{dtype} {size}"


def test_unknown_level() -> None:
    with pytest.raises(ValueError, match=r"must be one of baseline.*got 'avx9'"):
        native.set_cpu_isa("avx9")


@pytest.mark.parametrize("wanted", ["baseline", "x86-64-v3", "x86-64-v4"])
def test_environment_chooses_the_level(wanted: str) -> None:
    code = "import tersor; print(tersor._backends._introspection().cpu_isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TERSOR_CPU_ISA": wanted}, capture_output=True, text=True
    )
    # A level above the processor's own must never be run: the best one it has is taken.
    assert done.stdout.strip() == (wanted if wanted in LEVELS else LEVELS[-1]), done.stderr


def test_environment_with_an_unknown_level() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tersor"],
        env={**os.environ, "TERSOR_CPU_ISA": "avx9"},
        capture_output=True,
        text=True,
    )
    assert "TERSOR_CPU_ISA must be one of baseline, x86-64-v3, x86-64-v4, got 'avx9'" in done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the levels are x86-64's")
def test_wide_registers_stay_in_their_own_namespace() -> None:
    """No code outside a level's namespace may use its registers, or a lesser processor dies of SIGILL."""
    library = _backends._library_path("cpu")
    listing = subprocess.run(["objdump", "-d", "-C", "--no-show-raw-insn", library], capture_output=True, text=True)
    function, seen, leaks = "", set(), set()
    for line in listing.stdout.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = match[1]
        for register, homes in (("zmm", ("x86_64_v4",)), ("ymm", ("x86_64_v3", "x86_64_v4"))):
            if f"%{register}" in line:
                home = next((h for h in homes if f"::{h}::" in function), None)
                if home is None:
                    leaks.add((register, function))
                else:
                    seen.add((register, home))
    assert not leaks
    assert seen == {("zmm", "x86_64_v4"), ("ymm", "x86_64_v3"), ("ymm", "x86_64_v4")}
