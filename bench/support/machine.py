"""The machine: what it is, and its limits as measured in the same run."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import settings
import timing
import torch

import tersor

_ROOT = Path(__file__).resolve().parents[2]
_MALLOC = "mmap_threshold"


def facts(device: str) -> dict[str, Any]:
    """What a reader needs to place a figure; no name of the host."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "device": device,
        "processor": _processor(),
        "logical_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tersor": tersor.__version__,
        "freed_memory_is_kept": _MALLOC in os.environ.get("GLIBC_TUNABLES", ""),
        "quick": settings.QUICK,
    }
    for package in ("triton", "natten"):
        if importlib.util.find_spec(package):
            found[package] = metadata.version(package)
    lines = str(tersor.backends()).split("\n\n", 1)[-1]
    found["tersor_build"] = [line for line in lines.splitlines() if ": " in line]
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gpu_memory_bytes": card.total_memory, "cuda": torch.version.cuda}
        found["capability"] = f"{card.major}.{card.minor}"
    return found


def limits(device: str) -> dict[str, Any]:
    """Copy bandwidth of a large block and the rate of a square matrix product, per dtype."""
    block = (4 << 30 if device == "cuda" else 512 << 20) >> (3 if settings.QUICK else 0)
    contenders = {"copy": copy_contender(block, device)}
    size = (8192 if device == "cuda" else 1024) // (4 if settings.QUICK else 1)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        contenders[f"matmul {dtype}"] = timing.Contender(functools.partial(torch.matmul, a, b))
    median = {name: float(torch.tensor(t.seconds).median()) for name, t in timing.measure(contenders, device).items()}
    return {
        "copy_bytes": block,
        "copy_bytes_per_second": block / median["copy"],
        "matmul_size": size,
        "matmul_flops_per_second": {
            name.split(".")[1]: 2 * size**3 / seconds for name, seconds in median.items() if name != "copy"
        },
    }


def copy_contender(total_bytes: int, device: str) -> timing.Contender:
    """Copying one block onto another, ``total_bytes`` read and written together; both blocks exist already."""
    source, target = (torch.ones(max(1, total_bytes // 8), device=device) for _ in range(2))
    return timing.Contender(lambda: target.copy_(source))


def _processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor()


def _commit() -> str:
    """The commit, with a plus sign where files differ from it."""
    try:
        git = ["git", "-C", str(_ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
