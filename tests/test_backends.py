"""Which kernel runs, and what happens where one cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from subject import in_ci

import tersor
from tersor import _backends

OPERATOR = "dilated_attention_forward"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def tensors() -> list[torch.Tensor]:
    return [torch.randn(1, 3, 4, 3, 4) for _ in range(3)]


def test_native_kernels_are_built_in_ci() -> None:
    if not in_ci():
        pytest.skip("outside CI a machine without a compiler is a legitimate place to test")
    assert _backends.running(OPERATOR, "cpu") == "native"


def test_table_names_every_operator_device_and_reason() -> None:
    table = tersor.backends()
    assert {(row.operator, row.device) for row in table} == {
        (name, device) for name in _backends.REGISTRY for device in ("cpu", "cuda")
    }
    for row in table:
        assert {row.runs, *row.refused} == {"native", "triton", "reference"}
        assert all(row.refused.values())
    text = str(table)
    assert OPERATOR in text
    assert "instruction set" in text or "not built" in text


def test_forcing_a_backend_changes_what_runs_and_is_undone() -> None:
    q, k, v = tensors()
    default = _backends.running(OPERATOR, "cpu")
    calls = []
    original = _backends.REGISTRY[OPERATOR]
    spied = original.__class__(
        **{**vars(original), "reference": lambda *a: calls.append(1) or original.reference(*a)}  # type: ignore[func-returns-value]
    )
    _backends.REGISTRY[OPERATOR] = spied
    try:
        with tersor.use_backend("reference"):
            assert _backends.running(OPERATOR, "cpu") == "reference"
            torch.ops.tersor.dilated_attention_forward(q, k, v, 3, [1], 0.5)
            if default == "native":
                assert calls == [1]
                with tersor.use_backend("native"):
                    torch.ops.tersor.dilated_attention_forward(q, k, v, 3, [1], 0.5)
                    assert calls == [1]
            assert _backends.running(OPERATOR, "cpu") == "reference"
        assert _backends.running(OPERATOR, "cpu") == default
        with pytest.raises(KeyError), tersor.use_backend("reference"):
            raise KeyError
        assert _backends.running(OPERATOR, "cpu") == default
    finally:
        _backends.REGISTRY[OPERATOR] = original


def test_compiled_graphs_follow_the_forced_backend() -> None:
    compiled = torch.compile(tersor.dilated_attention, fullgraph=True, backend="aot_eager")
    q, k, v = tensors()
    first = compiled(q, k, v)
    with tersor.use_backend("reference"):
        second = compiled(q, k, v)
        assert torch.equal(second, tersor.dilated_attention(q, k, v))
    torch.testing.assert_close(first, second)


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="must be one of native, triton, reference, got 'fast'"),
        tersor.use_backend("fast"),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run Triton on")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs Triton here")
def test_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="triton cannot run here: "), tersor.use_backend("triton"):
        pass
    done = python("import tersor; print(tersor.backends()[0].runs)", TERSOR_BACKEND="triton")
    assert done.returncode == 0
    assert "TERSOR_BACKEND=triton has no effect" in done.stderr
    assert done.stdout.strip() in ("native", "reference")


def test_environment_forces_a_backend() -> None:
    done = python("import tersor; print({row.runs for row in tersor.backends()})", TERSOR_BACKEND="reference")
    assert done.stdout.strip() == "{'reference'}", done.stderr
    done = python("import tersor", TERSOR_BACKEND="fast")
    assert "TERSOR_BACKEND must be one of native, triton, reference, got 'fast'" in done.stderr
    assert done.returncode == 1


def test_everything_works_without_compiled_kernels(tmp_path: Path) -> None:
    code = """
import torch, tersor
row = tersor.backends()[0]
assert row.runs == "reference" and "not built" in row.refused["native"], row
q = torch.randn(1, 3, 4, 3, 4, requires_grad=True)
tersor.dilated_attention(q, q, q).sum().backward()
assert q.grad.isfinite().all()
"""
    done = python(code, TERSOR_NATIVE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (tmp_path / "libtersor_cpu.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text("{")
    done = python("import tersor; print(tersor.backends()[0].refused['native'])", TERSOR_NATIVE_DIR=str(tmp_path))
    assert "could not be loaded" in done.stdout, done.stderr


def test_facts_without_the_introspection_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Python that a wheel has no module for: operators run, and what cannot be told is said."""
    monkeypatch.setattr(_backends, "_introspection", lambda: None)
    if not isinstance(_backends._cpu_library(), str):
        assert "no introspection module is built for Python" in str(tersor.backends())


def test_everything_works_without_triton() -> None:
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import tersor
print(tersor.backends()[0].refused["triton"])
"""
    done = python(code)
    assert done.stdout.strip() == "triton is not installed", done.stderr


def test_import_is_light(tmp_path: Path) -> None:
    """No driver, no Triton, no plotting; and at most 150 ms more than torch itself.

    Of processor time, best of three: other tests run at the same time. As installed, that is from compiled bytecode,
    which the first run writes, whatever the environment says of that.
    """
    code = """
import sys, time
import torch
loaded = set(sys.modules)
start = time.process_time()
import tersor
seconds = time.process_time() - start
new = set(sys.modules) - loaded
heavy = {name.partition(".")[0] for name in new} & {"triton", "numpy", "matplotlib", "rich", "sklearn", "timm"}
assert not heavy, heavy
assert not torch.cuda.is_initialized()
print(seconds)
"""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    best = min(float(python(code, **compiled).stdout) for _ in range(3))
    assert best < 0.150


def test_import_touches_no_driver() -> None:
    """torch.cuda.is_available and everything below it raise; the import and a CPU call work all the same."""
    code = """
import torch
def refuse(*args, **kwargs): raise AssertionError("the driver was asked")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init", "get_device_capability"):
    setattr(torch.cuda, name, refuse)
import tersor
tersor.dilated_attention(*[torch.randn(1, 3, 4, 3, 4) for _ in range(3)])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_registering_an_operator_twice_is_an_error() -> None:
    op = _backends.REGISTRY[OPERATOR]
    from tersor._operator import operator

    with pytest.raises(RuntimeError, match="already registered"):
        operator(op.schema, reference=op.reference, fake=op.reference, vmap=op.reference)


def test_choices_on_a_gpu_are_made_at_the_first_call() -> None:
    """No GPU needed: meta tensors play the GPU's part, a recorded function the launcher's."""
    code = """
import sys, torch
torch.version.cuda = "13.0"
calls, asked = [], []
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: object() if name == "triton" else find(name, *a)
import tersor
from tersor import _backends as b
b._KEYS["cuda"] = "Meta"
b._no_gpu = lambda: asked.append(1)
b._triton_launcher = lambda op: lambda *a: calls.append(op.name) or op.reference(*a)
q = torch.randn(1, 3, 4, 3, 4, device="meta")
def run(): calls.clear(); torch.ops.tersor.dilated_attention_forward(q, q, q, 3, [1], 0.5); return list(calls)
name = "dilated_attention_forward"
assert b.running(name, "cuda") == "reference" and run() == []
assert "unverified" in [row for row in tersor.backends() if row.device == "cuda"][0].refused["triton"]
with tersor.use_backend("triton"):
    assert b.running(name, "cuda") == "triton" and run() == [name]
    with tersor.use_backend("reference"):
        assert run() == []
    assert run() == [name]
assert run() == []
b.VERIFIED["attention/dilated_attention"] = "triton"
asked.clear()
b.load()
assert not asked, "loading must not ask the driver"
assert run() == [name] and asked
assert run() == [name]
with tersor.use_backend("reference"):
    assert run() == []
assert run() == [name]
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
