"""Which kernel runs: the only module that knows the backends, and the only one that loads them.

Three backends exist. ``native`` is compiled code (C++ on the CPU, CUDA C++ on GPUs), ``triton`` the Triton
kernels, ``reference`` plain torch. The kernel chosen for a device is registered with torch's dispatcher, so a call
costs nothing extra, and graphs that were compiled or exported earlier follow the choice too.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tersor._operator import REGISTRY, Operator
from tersor._verified import VERIFIED

BACKENDS = ("native", "triton", "reference")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # the dispatcher's names
DEVICES = tuple(_KEYS)
_HERE = Path(__file__).parent
_PYTHON = ".".join(map(str, sys.version_info[:2]))
_FORCE = "TERSOR_BACKEND"
_ISA = "TERSOR_CPU_ISA"
_ISA_LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")

_forced: str | None = None
_overrides: dict[tuple[str, str], torch.library.Library] = {}


class Choice(NamedTuple):
    """What runs for one operator on one device, and why the other backends do not."""

    operator: str
    device: str
    dtypes: str
    runs: str
    refused: dict[str, str]


class Backends(list[Choice]):
    """The choices, printed as a table."""

    def __str__(self) -> str:
        rows = [("operator", "device", "dtypes", "runs", "why not the others")]
        for choice in self:
            why = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
            rows.append((choice.operator, choice.device, choice.dtypes, choice.runs, why))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip() for row in rows]
        return "\n".join([*lines, "", *facts()])

    __repr__ = __str__


def backends() -> Backends:
    """What every operator runs on, per device, and why not on the other backends.

    Returns:
        A list of :class:`Choice` (operator, device, dtypes, runs, refused) that prints as a table, followed by how
        the native library was built and which instruction set it uses. Asks the driver whether a GPU is there.
    """
    rows = Backends()
    for op in REGISTRY.values():
        for device in DEVICES:
            runs, refused = _choose(op, device)
            rows.append(Choice(op.name, device, _dtypes(runs, device), runs, refused))
    return rows


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside the ``with`` block: ``"native"``, ``"triton"`` or ``"reference"``.

    The choice holds for the whole process (all threads). Operators that have no such kernel for the device at hand
    run what they would run otherwise; :func:`backends` names the reason. For comparisons and tests.

    Raises:
        ValueError: ``name`` is not one of the three.
        RuntimeError: that backend cannot run anything in this process; the message says why.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    if reasons := _unusable(name):
        raise RuntimeError(f"use_backend: {name} cannot run here: {reasons}")
    previous = _forced
    _force(name)
    try:
        yield
    finally:
        _force(previous)


def running(operator: str, device: str) -> str:
    """The backend that a call of ``operator`` on ``device`` runs at the moment."""
    return _choose(REGISTRY[operator], device)[0]


def facts() -> list[str]:
    """How the native libraries were built and what they chose, and the operators' notes, one sentence each."""
    lines = [f"{name}: {entry}" for name, entry in _build_report().items()]
    lines += [f"{op.name}: {note}" for op in REGISTRY.values() for note in op.notes]
    module = _introspection()
    if module is not None:
        levels = ", ".join(module.cpu_isa_supported())
        lines.append(f"instruction set: {module.cpu_isa()} (this processor runs {levels}); {module.compiler()}")
    elif not isinstance(_cpu_library(), str):
        lines.append(f"instruction set: unknown, as no introspection module is built for Python {_PYTHON}")
    if _forced:
        lines.append(f"forced: {_forced}")
    return lines


def load() -> None:
    """Loads the CPU library and applies ``TERSOR_BACKEND``; called once, at import. Touches no driver."""
    level = os.environ.get(_ISA) or _ISA_LEVELS[0]
    if level not in _ISA_LEVELS:
        raise ValueError(f"{_ISA} must be one of {', '.join(_ISA_LEVELS)}, got {level!r}")
    _cpu_library()
    forced = os.environ.get(_FORCE) or None
    if forced is not None and forced not in BACKENDS:
        raise ValueError(f"{_FORCE} must be one of {', '.join(BACKENDS)}, got {forced!r}")
    # With a CUDA torch only the driver could tell, and it is not asked before the first CUDA tensor comes.
    if forced and torch.version.cuda is None and (reasons := _unusable(forced)):
        warnings.warn(f"{_FORCE}={forced} has no effect: {reasons}", RuntimeWarning, stacklevel=3)
        forced = None
    global _forced
    _forced = forced
    for op in REGISTRY.values():
        _install(op, "cpu")
        if torch.version.cuda is not None and (op.place in VERIFIED or forced in ("native", "triton")):
            _install_at_first_call(op, "cuda")


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    for op in REGISTRY.values():
        for device in DEVICES:
            _install(op, device)


def _choose(op: Operator, device: str) -> tuple[str, dict[str, str]]:
    """The backend that runs and the reason against each other one."""
    refused = {name: reason for name in BACKENDS if (reason := _refusal(op, device, name))}
    allowed = [name for name in BACKENDS if name not in refused]
    if _forced in allowed:
        chosen = _forced
    elif device == "cpu":
        chosen = allowed[0] if allowed[0] != "triton" else "reference"  # the interpreter is for tests only
    else:
        chosen = VERIFIED.get(op.place, "reference")
        chosen = chosen if chosen in allowed else "reference"
    for name in allowed:
        if name != chosen:
            refused[name] = _not_chosen(op, device, name, chosen)
    return chosen, refused


def _not_chosen(op: Operator, device: str, name: str, chosen: str) -> str:
    if chosen == _forced:
        return f"{chosen} is forced"
    if name == "reference":
        return "slower"
    if device == "cuda" and op.place not in VERIFIED:
        return f"unverified on a GPU; use_backend({name!r}) runs it"
    return "interpreter, for tests only" if device == "cpu" else f"measured slower than {chosen}"


def _refusal(op: Operator, device: str, name: str) -> str | None:
    """Why backend ``name`` cannot run ``op`` on ``device``; None where it can."""
    if name == "reference":
        return None
    if device == "cuda" and (reason := _no_gpu()):
        return reason
    if name == "triton":
        if not _has_triton_module(op):
            return "no Triton kernel"
        if reason := _no_triton():
            return reason
        if device == "cpu" and not _interpreting():
            return "CPU tensors need TRITON_INTERPRET=1"
        return None
    if device == "cpu":
        library = _cpu_library()
        if isinstance(library, str):
            return library
        return None if op.name in _cpu_kernels() else "no C++ kernel"
    reason = _build_report().get("CUDA C++", "not built")
    if not _library_path("cuda").exists():
        return reason
    if _cuda_library.cache_info().currsize and isinstance(_cuda_library(), str):
        return _cuda_library()
    return None if op.place in _cuda_places() else "no CUDA C++ kernel"


def _unusable(name: str) -> str:
    """Why backend ``name`` can run no operator in this process; empty where it can run some."""
    reasons = {device: _refusal(op, device, name) for op in REGISTRY.values() for device in DEVICES}
    if any(_refusal(op, device, name) is None for op in REGISTRY.values() for device in DEVICES):
        return ""
    return "; ".join(f"{device}: {reason}" for device, reason in reasons.items())


def _install(op: Operator, device: str) -> None:
    """Makes the chosen backend the dispatcher's kernel for ``op`` on ``device``."""
    chosen = _choose(op, device)[0]
    if device == "cuda" and chosen == "native" and _load_cuda_library():
        return  # which has installed everything
    if (op.name, device) in _overrides:
        _overrides.pop((op.name, device))._destroy()
    if chosen != _beneath(op, device):
        _override(op, device, op.reference if chosen == "reference" else _triton_launcher(op))


def _install_at_first_call(op: Operator, device: str) -> None:
    """Puts off what asks a driver or loads a library until the first call on ``device``.

    The stand-in is never destroyed while it runs: the C++ kernel is registered over it, a Triton launcher called by it.
    """
    kernel: Callable[..., Any] | None = None

    def first_call(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            chosen = _choose(op, device)[0]
            if chosen == "native":
                _load_cuda_library(besides=op)
                chosen = _choose(op, device)[0]  # again, since the library may not load
            kernel = {"native": op.overload, "reference": op.reference}.get(chosen) or _triton_launcher(op)
        return kernel(*args)

    _override(op, device, first_call)


def _load_cuda_library(besides: Operator | None = None) -> bool:
    """Loads the CUDA library; True if that was news. Its kernels come over what Python had installed before, so the
    choices of all operators (``besides`` one that is being called) are installed anew."""
    if _cuda_library.cache_info().currsize:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its kernels may come after stand-ins
        _cuda_library()
    for op in REGISTRY.values():
        if op is not besides:
            _install(op, "cuda")
    return True


def _beneath(op: Operator, device: str) -> str:
    """What the dispatcher runs where Python overrides nothing."""
    if device == "cpu":
        return "native" if op.name in _cpu_kernels() else "reference"
    loaded = _cuda_library.cache_info().currsize and not isinstance(_cuda_library(), str)
    return "native" if loaded and op.place in _cuda_places() else "reference"


def _override(op: Operator, device: str, kernel: Callable[..., Any]) -> None:
    library = torch.library.Library("tersor", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of an override, which is what is meant here
        library.impl(op.name, kernel, _KEYS[device])
    _overrides[op.name, device] = library


def _dtypes(backend: str, device: str) -> str:
    if backend == "triton" or (backend == "native" and device == "cuda"):
        return "f16 bf16 f32"
    return "f16 bf16 f32 f64"


def _native_folder() -> Path:
    """Where the native libraries lie: in the package, or where a sanitizer build was put."""
    return Path(os.environ.get("TERSOR_NATIVE_DIR") or _HERE)


def _library_path(device: str) -> Path:
    return _native_folder() / f"libtersor_{device}.so"


@functools.cache
def _build_report() -> dict[str, str]:
    """What setup.py wrote about each native part: how it was built, or why it was skipped."""
    try:
        return json.loads((_native_folder() / "_build.json").read_text())
    except (OSError, ValueError):
        return {"C++": "not built", "CUDA C++": "not built"}


@functools.cache
def _cpu_library() -> Any:
    """The loaded library, or the reason why there is none."""
    return _load_library(_library_path("cpu"), _build_report().get("C++", "not built"))


@functools.cache
def _cuda_library() -> Any:
    return _load_library(_library_path("cuda"), _build_report().get("CUDA C++", "not built"))


def _load_library(path: Path, reason: str) -> Any:
    if not path.exists():
        return reason
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"could not be loaded: {error}"


@functools.cache
def _cpu_kernels() -> frozenset[str]:
    if isinstance(_cpu_library(), str):
        return frozenset()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(name for name in REGISTRY if has(f"tersor::{name}", "CPU"))


@functools.cache
def _cuda_places() -> frozenset[str]:
    return frozenset(_build_report().get("CUDA C++ kernels", "").split())


@functools.cache
def _introspection() -> Any:
    """The pybind11 module with build facts and the instruction-set switch; None where it was not built."""
    for path in sorted(_native_folder().glob(f"_native*{importlib.machinery.EXTENSION_SUFFIXES[0]}")):
        spec = importlib.util.spec_from_file_location("tersor._native", path)
        if spec is not None and spec.loader is not None:
            with contextlib.suppress(ImportError):
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device"


@functools.cache
def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_module(op: Operator) -> str:
    return "tersor.triton_kernels." + op.place.replace("/", ".")


def _has_triton_module(op: Operator) -> bool:
    try:
        return importlib.util.find_spec(_triton_module(op)) is not None
    except ModuleNotFoundError:  # no operator of its family has one
        return False


def _triton_launcher(op: Operator) -> Callable[..., Any]:
    """The launcher; float64 goes to the reference, since the Triton kernels accumulate in float32."""
    launch = getattr(importlib.import_module(_triton_module(op)), op.name)

    def launch_or_refer(first: torch.Tensor, *args: Any) -> Any:
        return (op.reference if first.dtype == torch.float64 else launch)(first, *args)

    return launch_or_refer
