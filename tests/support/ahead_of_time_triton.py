"""Compiles the Triton kernels of every module for GPUs that are not there, and reads what came out.

The cases come from each module's ``ahead_of_time_cases()``, which yields ``(kernel, label, signature, constants,
options)`` with the signature in the notation of Triton's compiler driver: ``"i32"``, ``"fp32"``, ``"*fp16"``, and
``":16"`` behind it for a pointer to aligned bytes or a number that 16 divides.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import tersor.triton_kernels

CAPABILITIES = (80, 90)
WIDE = 8  # bytes: half of the widest load, and what four float16 numbers take
WIDE_SHARE = 0.75  # of the loaded bytes; the rest is statistics, one number per position


class Case(NamedTuple):
    """One kernel as a launch would compile it."""

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


class Report(NamedTuple):
    """What the compiler made of a case; ``spills`` in bytes of local memory, ``load`` and ``store`` in bytes."""

    name: str
    label: str
    capability: int
    registers: int
    spills: int
    shared: int
    load: int
    store: int
    wide_share: float

    def complaints(self) -> list[str]:
        """Why this kernel is not to be shipped; empty where there is no reason."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes of registers spilled")
        if self.load < WIDE:
            found.append(f"the widest load is {self.load} bytes, of {WIDE} at least")
        if self.wide_share < WIDE_SHARE:
            found.append(f"{self.wide_share:.0%} of the bytes come in loads of {WIDE} or more, of {WIDE_SHARE:.0%}")
        return found


def modules() -> list[ModuleType]:
    """Every module below ``tersor.triton_kernels``."""
    package = tersor.triton_kernels
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return [importlib.import_module(info.name) for info in found]


def jitted(module: ModuleType) -> list[JITFunction]:
    """The jitted functions that the module defines."""
    functions = [f for f in vars(module).values() if isinstance(f, JITFunction)]
    return [f for f in functions if f.__module__ == module.__name__]


def cases(module: ModuleType) -> Iterator[Case]:
    """The module's cases; none where it has no jitted function."""
    if jitted(module):
        yield from (Case(*case) for case in module.ahead_of_time_cases())


def without_case(found: list[ModuleType]) -> list[str]:
    """Jitted functions that are neither a case nor called, hence compiled, by another jitted function."""
    functions = [f for module in found for f in jitted(module)]
    compiled = {id(case.kernel) for module in found if hasattr(module, "ahead_of_time_cases") for case in cases(module)}
    compiled |= {id(called) for function in functions for called in _calls(function)}
    return [f"{f.__module__}.{f.__name__}" for f in functions if id(f) not in compiled]


def _calls(function: JITFunction) -> list[Any]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return [function.fn.__globals__[name] for name in names if name in function.fn.__globals__]


def compile_case(case: Case, capability: int, folder: Path) -> Report:
    """Compiles for ``sm_<capability>``; ``folder`` holds the machine code while it is read.

    Raises:
        ValueError: the signature and constants do not name the kernel's arguments, or their order.
    """
    named = {*case.signature, *case.constants}
    if named != set(case.kernel.arg_names):
        raise ValueError(f"{case.name}: cases name {sorted(named ^ set(case.kernel.arg_names))} otherwise than it does")
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = [i for i, kind in enumerate(signature.values()) if kind.endswith(":16")]
    source = ASTSource(
        case.kernel,
        {name: kind.removesuffix(":16") for name, kind in signature.items()},
        case.constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    resources = _resources(compiled.asm["cubin"], folder)
    loads, stores = _accesses(compiled.asm["ptx"], "ld"), _accesses(compiled.asm["ptx"], "st")
    loads += _copies(compiled.asm["ptx"])
    return Report(
        case.name,
        case.label,
        capability,
        resources["REG"],
        resources["STACK"] + resources["LOCAL"],
        resources["SHARED"],
        max(loads, default=0),
        max(stores, default=0),
        sum(n for n in loads if n >= WIDE) / max(sum(loads), 1),
    )


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers per thread, and bytes of stack, local and shared memory, by the names that cuobjdump gives them."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}


def _accesses(ptx: str, operation: str) -> list[int]:
    """Bytes that each load (``ld``) or store (``st``) instruction of global memory moves per thread."""
    found = re.findall(rf"\b{operation}\.(?:\w+\.)?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    return [int(lanes or 1) * int(bits) // 8 for lanes, bits in found]


def _copies(ptx: str) -> list[int]:
    """Bytes that each asynchronous copy to shared memory, which is a load too, moves per thread."""
    found = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(\w+)", ptx)
    return [int(size, 0) for size in found]


def table(reports: list[Report]) -> str:
    """One line per report: kernel, dtype and shape, architecture, registers, spills, widths."""
    rows = [("kernel", "case", "arch", "registers", "spills", "shared", "widest load", "widest store", "wide bytes")]
    for r in reports:
        sizes = (f"{r.registers}", f"{r.spills} B", f"{r.shared} B", f"{r.load} B", f"{r.store} B")
        rows.append((r.name, r.label, f"sm_{r.capability}", *sizes, f"{r.wide_share:.0%}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
