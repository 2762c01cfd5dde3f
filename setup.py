"""Builds what this machine can build, and says in one line what was built and what was skipped.

The operators need only torch's headers (its stable ABI), so torch is looked up in the target environment and never
imported: a build under pip's isolation uses the torch that is installed, and downloads none.
"""

import concurrent.futures
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_MINIMUM = (2, 11)
# IEEE arithmetic, the same on every instruction set: no contraction to fused multiply-add, no fast-math.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-ffp-contract=off", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class SkippedError(Exception):
    """A part that cannot be built here, with the reason in plain words."""


def find_torch():
    """``(folder, version)`` of the environment's torch, or None. Under isolation sys.path does not show it."""
    places = [Path(p) for p in [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path] if p]
    for place in places:
        version = place / "torch" / "version.py"
        if version.is_file() and (match := re.search(r"__version__ = '([^']+)'", version.read_text())):
            return place / "torch", match[1]
    return None


def torch_flags(torch):
    """Include folders and the oldest torch whose ABI the libraries are to run with."""
    folder, version = torch
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < TORCH_MINIMUM:
        raise SkippedError(f"torch {version} is older than {'.'.join(map(str, TORCH_MINIMUM))}")
    include = folder / "include"
    target = f"0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000ULL"
    return [f"-I{CSRC.name}", "-isystem", str(include), f"-DTORCH_TARGET_VERSION={target}", "-DTORCH_STABLE_ONLY"]


def nameless(package):
    """A flag: the compiled code names the package's headers, but not the folder of this machine that they lie in."""
    return f"-fmacro-prefix-map={package.parent}/="


def from_environment(name):
    return shlex.split(os.environ.get(name, ""))


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(c) for c in candidates if c.is_file()), None)


def cuda_architectures():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX" where it is not set), never for a visible card."""
    flags = []
    for entry in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX"):
        if not (match := re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)):
            raise SkippedError(f"TORCH_CUDA_ARCH_LIST entry {entry!r} is not of the form 9.0 or 9.0+PTX")
        number = f"{match[1]}{match[2]}{match[3]}"
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_pythons():
    """``(version, folder of Python.h, suffix of extension modules)`` of this CPython and of those that TERSOR_PYTHONS
    names and that have headers: a wheel for several gets a module for each."""
    asked = "from sysconfig import *; print(get_python_version(), get_path('include'), get_config_var('EXT_SUFFIX'))"
    found = {}
    for python in [sys.executable, *from_environment("TERSOR_PYTHONS")]:
        try:
            done = subprocess.run([python, "-c", asked], capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and (Path(done.stdout.split()[1]) / "Python.h").is_file():
            version, headers, suffix = done.stdout.split()
            found[suffix] = version, headers, suffix
    return sorted(found.values(), key=lambda python: [int(n) for n in python[0].split(".")])


def from_root(path):
    """Where compilers run, so that neither their commands nor what they make depend on where the sources lie."""
    return os.path.relpath(path, ROOT)


def is_newer(target, includes):
    """Whether a compiled file is newer than all that it was made of, which the compiler listed as a make rule."""
    if not target.is_file() or not includes.is_file():
        return False
    sources = map(Path, includes.read_text().replace("\\\n", " ").partition(":")[2].split())
    made = target.stat().st_mtime
    return all((ROOT / path).is_file() and (ROOT / path).stat().st_mtime < made for path in sources)


class BuildNative(build_ext):
    """Compiles csrc/ into two operator libraries and one pybind11 module; each part may be skipped, none may fail."""

    def run(self):
        in_place = self.editable_mode or self.inplace
        self.package = ROOT / "pyops" if in_place else Path(self.build_lib).resolve() / "tersor"
        self.package.mkdir(parents=True, exist_ok=True)
        self.objects = Path(self.build_temp).resolve()
        self.report = {}
        self.outputs = [str(self.package / "_build.json")]
        for part, build in (
            ("C++", self.build_cpu),
            ("introspection", self.build_introspection),
            ("CUDA C++", self.build_cuda),
        ):
            try:
                self.report[part] = build()
            except SkippedError as reason:
                self.report[part] = f"not built: {reason}"
        (self.package / "_build.json").write_text(json.dumps(self.report, indent=1) + "\n")
        summary = "; ".join(f"{part} {said}" for part, said in self.report.items())
        # pip hides the output of a build unless it is verbose; a terminal, where there is one, still shows this line.
        print(f"tersor: {summary}", file=sys.stderr)

    def get_outputs(self):
        return getattr(self, "outputs", [])

    def get_output_mapping(self):
        return {}

    def build_cpu(self):
        compiler, torch = self.need_compiler(), self.need_torch()
        flags = [*CXX_FLAGS, *torch_flags(torch), nameless(torch[0]), *from_environment("CXXFLAGS")]
        sources = [*sorted(CSRC.glob("*/*.cpp")), CSRC / "isa.cpp"]
        objects = self.compile_all([*compiler, *flags], sources)
        library = self.package / "libtersor_cpu.so"
        link = [*compiler, "-shared", *objects, "-o", str(library), f"-Wl,-soname,{library.name}"]
        self.execute_link(library, [*link, *from_environment("LDFLAGS"), f"-L{torch[0] / 'lib'}", "-ltorch_cpu"])
        return f"built with {Path(compiler[0]).name} against torch {torch[1]}"

    def build_introspection(self):
        compiler = self.need_compiler()
        library = self.package / "libtersor_cpu.so"
        if not self.report["C++"].startswith("built"):
            raise SkippedError("it describes the C++ library")
        try:
            import pybind11
        except ImportError:
            raise SkippedError("pybind11 is not installed") from None
        pythons = find_pythons()
        if not pythons:
            raise SkippedError("Python.h is not installed")
        flags = [
            *CXX_FLAGS,
            f"-I{CSRC.name}",
            "-isystem",
            pybind11.get_include(),
            nameless(Path(pybind11.__file__).parent),
        ]
        for version, headers, suffix in pythons:
            command = [*compiler, *flags, "-isystem", headers]
            objects = self.compile_all(command, [CSRC / "native.cpp"], f"python{version}")
            module = self.package / f"_native{suffix}"
            link = [*compiler, "-shared", *objects, "-o", str(module), f"-L{self.package}", f"-l:{library.name}"]
            link += [*from_environment("LDFLAGS"), "-Wl,-rpath,$ORIGIN"]
            self.execute_link(module, link)
        versions = ", ".join(version for version, _, _ in pythons)
        return f"built with pybind11 {pybind11.__version__} for CPython {versions}"

    def build_cuda(self):
        wanted = os.environ.get("TERSOR_CUDA", "auto")
        if wanted == "0":
            raise SkippedError("TERSOR_CUDA=0")
        compiler, torch, nvcc = self.need_compiler(), self.need_torch(), find_nvcc()
        if nvcc is None:
            raise SkippedError("nvcc was not found")
        torch_has_cuda = (torch[0] / "lib" / "libtorch_cuda.so").is_file()
        if not torch_has_cuda and wanted != "1":
            raise SkippedError("this torch is built without CUDA (TERSOR_CUDA=1 builds all the same)")
        sources = sorted(CSRC.glob("*/*.cu"))
        flags = [*NVCC_FLAGS, *cuda_architectures(), *torch_flags(torch), "-DUSE_CUDA", "-ccbin", compiler[0]]
        objects = self.compile_all([nvcc, *flags], sources)
        library = self.package / "libtersor_cuda.so"
        link = [nvcc, "-shared", "-cudart=static", *objects, "-o", str(library)]
        libraries = ["-ltorch_cpu", *(["-ltorch_cuda"] if torch_has_cuda else [])]
        self.execute_link(library, [*link, f"-L{torch[0] / 'lib'}", *libraries])
        self.report["CUDA C++ kernels"] = " ".join(str(s.relative_to(CSRC).with_suffix("")) for s in sources)
        return f"built with {Path(nvcc).name} against torch {torch[1]}"

    def need_torch(self):
        if os.environ.get("TERSOR_NATIVE") == "0":
            raise SkippedError("TERSOR_NATIVE=0")
        if (torch := find_torch()) is None:
            raise SkippedError("torch was not installed when tersor was built")
        return torch

    def need_compiler(self):
        if sys.platform != "linux":
            raise SkippedError(f"the native kernels are built on Linux only, this is {sys.platform}")
        named = from_environment("CXX")
        found = [named] if named else [[name] for name in ("g++", "c++", "clang++")]
        compiler = next((c for c in found if shutil.which(c[0])), None)
        if compiler is None:
            raise SkippedError(f"no C++ compiler ({', '.join(c[0] for c in found)}) was found")
        return compiler

    def compile_all(self, command, sources, folder=""):
        """Compiles what is older than a file it includes or the command; two at a time on two cores."""
        jobs, objects = [], []
        for source in sources:
            target = self.objects / folder / source.relative_to(CSRC).with_suffix(source.suffix + ".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            stamp, includes = target.with_suffix(".command"), target.with_suffix(".d")
            files = ["-MF", from_root(includes), "-c", from_root(source), "-o", from_root(target)]
            line = shlex.join([*command, "-MMD", *files])
            objects.append(from_root(target))
            if not (stamp.is_file() and stamp.read_text() == line and is_newer(target, includes)):
                jobs.append((line, source, stamp))
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for job, error in zip(jobs, pool.map(lambda job: self.execute(job[0]), jobs), strict=True):
                if error:
                    raise SkippedError(f"compiling {job[1].stem} failed: {error}")
                job[2].write_text(job[0])
        return objects

    def execute_link(self, target, command):
        if error := self.execute(shlex.join(command)):
            raise SkippedError(f"linking {target.name} failed: {error}")
        self.outputs.append(str(target))

    @staticmethod
    def execute(line):
        """Runs a command; the empty string, or its first error line. The whole output goes to stderr."""
        try:
            done = subprocess.run(shlex.split(line), capture_output=True, text=True, cwd=ROOT)
        except OSError as error:
            return str(error)
        if done.stderr:
            print(done.stderr, file=sys.stderr)
        if done.returncode == 0:
            return ""
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return next((text for text in lines if "error" in text), lines[-1])[:300]


def packages():
    """Every folder with an __init__.py, under the import name that pyproject.toml maps it to."""
    roots = {"pyops": "tersor", "models": "tersor.models", "triton_kernels": "tersor.triton_kernels"}
    for folder, name in roots.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            yield ".".join([name, *init.parent.relative_to(ROOT / folder).parts])


setup(
    packages=list(packages()),
    # Only a marker that there is native code; BuildNative finds the sources by their place.
    ext_modules=[Extension("tersor._native", ["csrc/native.cpp"])],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if find_torch() else [f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"],
)
