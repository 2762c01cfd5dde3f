"""Runs every operator at every size, dtype and instruction set once; started under a sanitizer by test_sanitizers."""

import ctypes
import sys

import torch
from subjects import SUBJECTS, gradients

from tersor import _backends

if __name__ == "__main__":
    symbol = sys.argv[1]
    assert hasattr(ctypes.CDLL(None), symbol), f"{symbol} is missing: the sanitizer is not active"
    assert "native" in {_backends.running(name, "cpu") for name in _backends.REGISTRY}
    native = _backends._introspection()
    for level in native.cpu_isa_supported():
        native.set_cpu_isa(level)
        for subject in SUBJECTS:
            for dtype in (*subject.dtypes, *[torch.float64] * subject.float64):
                for size in subject.sizes:
                    results = gradients(subject, subject.make(dtype, "cpu", size=size))
                    assert all(r.isfinite().all() for r in results)
    print("exercised", *native.cpu_isa_supported())
