"""Building and installing with and without a compiler, torch's headers, nvcc and build isolation: it always works.

Each case builds a wheel from a copy of the sources and runs it from a folder of its own, not the working tree. What the
working tree has compiled is copied too: compiled anew is only what a case compiles otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tersor._operator import REGISTRY

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow

SMOKE = """
import tersor, torch, tersor.models
assert "site" in tersor.__file__, tersor.__file__
qkv = torch.randn(1, 5, 6, 3, 3, 4, requires_grad=True)
tersor.dilated_attention_qkvpacked(qkv).sum().backward()
assert qkv.grad.isfinite().all()
print(tersor.backends()[0].runs, "|", tersor.backends()[0].refused.get("native", ""))
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What a fresh clone has, and compiled C++."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = tmp_path / "sources" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)  # with its time, by which a compiled file is known to be newer
    for objects in (ROOT / "build").glob("temp.*"):
        shutil.copytree(objects, tmp_path / "sources" / "build" / objects.name)
    return tmp_path / "sources"


def wheel(sources: Path, *options: str, **environment: str) -> tuple[Path, str]:
    """Builds, and returns the wheel and what the build said."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", str(sources / "dist"), "."]
    done = subprocess.run(command, cwd=sources, env={**os.environ, **environment}, capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode and any(word in output for word in ("No matching distribution", "Connection", "timed out")):
        pytest.skip("pip's build isolation needs a package index, which cannot be reached")
    assert done.returncode == 0, output[-3000:]
    (path,) = (sources / "dist").glob("*.whl")
    said = next((line for line in output.splitlines() if "tersor: C++" in line), "")
    return path, said


def run_from(path: Path, folder: Path) -> str:
    """Unpacks the wheel where nothing else of tersor is, and uses it in a fresh process."""
    site = folder / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SMOKE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def names(path: Path) -> set[str]:
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def clean_environment(folder: Path) -> Path:
    """The python of a new environment that has torch, and nothing else that was installed from here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # of which no .pth is read, hence no tersor
    return folder / "bin" / "python"


@pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
@pytest.mark.skipif(
    not (shutil.which("make") and importlib.util.find_spec("auditwheel")), reason="needs make, auditwheel"
)
def test_release_wheel(sources: Path, tmp_path: Path) -> None:
    """What `make wheel` builds runs right in a clean environment without a compiler."""
    # An environment to build in is here already.
    build = ["make", "-o", ".venv/native", "wheel", f"PY={sys.executable}", "PYTHONS="]
    done = subprocess.run(build, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "C++ built with" in done.stdout
    (path,) = (sources / "dist").glob("*.whl")
    assert re.fullmatch(r"tersor-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", path.name)
    content = names(path)
    assert {"tersor/libtersor_cpu.so", "tersor/_build.json", "tersor/py.typed"} <= content
    assert {"tersor/models/dilateformer.py", "tersor/triton_kernels/attention/dilated_attention.py"} <= content
    libraries = {name for name in content if ".so" in name}
    assert all(re.match(r"tersor/(libtersor_\w+|_native)\.", name) for name in libraries), "no library of torch's"
    top = {name.split("/")[0] for name in content}
    assert top - {"tersor"} == {f"tersor-{path.name.split('-')[1]}.dist-info"}, "one import name, nothing beside it"
    with zipfile.ZipFile(path) as archive:
        for name in libraries:
            assert b"site-packages" not in archive.read(name), f"{name} names folders of the machine that built it"

    python = clean_environment(tmp_path / "clean")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", path]
    subprocess.run(install, check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TERSOR", "PYTHON"))}
    environment |= {"PATH": str(python.parent)}
    done = subprocess.run(
        [python, "-m", "tersor", "selftest"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"from {tmp_path / 'clean'}" in done.stdout
    assert "instruction set: x86-64" in done.stdout or "instruction set: baseline" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert {row[2] for row in rows} == {op.place.split("/")[0] for op in REGISTRY.values()}, "every family is checked"
    assert {row[4] for row in rows if row[1] == "cpu"} == {"native"}


@pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
def test_wheel_under_build_isolation(sources: Path, tmp_path: Path) -> None:
    """The torch of the environment is used, and none is downloaded."""
    path, said = wheel(sources)
    assert "C++ built with" in said
    assert run_from(path, tmp_path) == "native |"


def test_wheel_without_a_compiler(sources: Path, tmp_path: Path) -> None:
    path, said = wheel(sources, "--no-build-isolation", CXX="no-such-compiler")
    assert "C++ not built: no C++ compiler (no-such-compiler) was found" in said
    assert not any(name.endswith(".so") for name in names(path))
    ran = run_from(path, tmp_path)
    assert ran.startswith("reference |")
    assert "no C++ compiler (no-such-compiler) was found" in ran


def test_wheel_with_a_compiler_that_fails(sources: Path, tmp_path: Path) -> None:
    path, said = wheel(sources, "--no-build-isolation", CXX="false")
    assert "C++ not built: compiling" in said
    assert run_from(path, tmp_path).startswith("reference |")


def test_wheel_with_native_code_switched_off(sources: Path, tmp_path: Path) -> None:
    path, said = wheel(sources, "--no-build-isolation", TERSOR_NATIVE="0")
    assert "C++ not built: TERSOR_NATIVE=0" in said
    assert run_from(path, tmp_path).startswith("reference |")


@pytest.mark.skipif(not compiler(), reason="no C++ compiler here")
def test_bad_architecture_list_skips_only_cuda(sources: Path) -> None:
    nvcc = sources / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    _, said = wheel(
        sources, "--no-build-isolation", TERSOR_CUDA="1", CUDA_HOME=str(sources), TORCH_CUDA_ARCH_LIST="hopper"
    )
    assert "C++ built with" in said
    assert "TORCH_CUDA_ARCH_LIST entry 'hopper' is not of the form" in said
