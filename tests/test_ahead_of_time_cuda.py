"""Every CUDA source compiles for sm_80 and sm_90, and no kernel spills registers or keeps a stack frame."""

import concurrent.futures
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*/*.cu"))
ARCHITECTURES = (80, 90)
WARPS = 64  # that a multiprocessor of either architecture holds, with 65536 registers


class Kernel(NamedTuple):
    """What ptxas says about one kernel; bytes, except the registers of a thread."""

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def warps(self) -> int:
        """Warps that fit a multiprocessor by registers, which a quarter of it hands out 256 at a time per warp."""
        return min(WARPS, 4 * (16384 // (-(-self.registers * 32 // 256) * 256)))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.path.join(home, "bin", "nvcc")] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if os.path.isfile(c)), None)


def flags():
    """The flags of setup.py, read from it: importing it would start a build."""
    text = (ROOT / "setup.py").read_text()
    nvcc = re.search(r"^NVCC_FLAGS = \[(.*)\]$", text, re.MULTILINE)
    minimum = re.search(r"^TORCH_MINIMUM = \((\d+), (\d+)\)$", text, re.MULTILINE)
    assert None not in (nvcc, minimum), "setup.py no longer writes NVCC_FLAGS and TORCH_MINIMUM in one line each"
    target = f"-DTORCH_TARGET_VERSION=0x{int(minimum[1]):02x}{int(minimum[2]):02x}000000000000ULL"
    include = Path(torch.__file__).parent / "include"
    places = [f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    return [*re.findall(r'"([^"]+)"', nvcc[1]), *places, target, "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]


def compile_source(nvcc, source, architecture, folder):
    """The kernels of one source for one architecture, and the compiler's text."""
    target = folder / f"{source.stem}.{architecture}.o"
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, *flags(), code, "-Werror", "all-warnings", "-Xptxas", "-v", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return parse(done.stderr)


def parse(text):
    kernels, name, frame = [], None, (0, 0, 0)
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name, frame = match[1], (0, 0, 0)
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame = tuple(map(int, match.groups()))
        elif name and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(name, int(match[1]), *frame, int(shared[1]) if shared else 0))
            name = None
    return kernels


def readable(kernels):
    """The names as C++ writes them, without arguments and namespaces."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    names = [kernel.name for kernel in kernels]
    if tool:
        names = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    return [re.sub(r"\(.*|^void |\w+::", "", re.sub(r"\(anonymous namespace\)", "", name)) for name in names]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
    folder = tmp_path_factory.mktemp("cuda")
    pairs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_source, nvcc, *pair, folder) for pair in pairs]
        return {pair: job.result() for pair, job in zip(pairs, jobs, strict=True)}


def test_no_spills(compiled):
    rows = [f"{'kernel':76}{'sm':>4}{'registers':>11}{'warps/SM':>10}{'static shared':>15}{'stack':>7}{'spills':>8}"]
    offenders = []
    for (source, architecture), kernels in compiled.items():
        for kernel, name in zip(kernels, readable(kernels), strict=True):
            spills = kernel.spill_stores + kernel.spill_loads
            row = f"{f'{source.stem}: {name}':76}{architecture:4}{kernel.registers:11}{kernel.warps:10}"
            rows.append(f"{row}{kernel.shared:15}{kernel.stack:7}{spills:8}")
            if spills or kernel.stack:
                offenders.append(rows[-1])
    print("\n".join(["", *rows]))
    assert not offenders, "\n".join([rows[0], *offenders])


def test_every_source_has_kernels(compiled):
    assert SOURCES
    for (source, architecture), kernels in compiled.items():
        assert kernels, f"{source.name} has no kernel for sm_{architecture}"


def test_the_parser_sees_spills():
    text = """ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem"""
    assert parse(text) == [Kernel("_Z1kPf", 96, 16, 12, 8, 512)]
    assert parse(text)[0].warps == 20
