"""Triton kernels and their launchers: one module per operator, at the operator's own place.

A launcher bears the name of its operator and takes the operator's arguments; :mod:`tersor._backends` finds it by that
name and loads it when it is first needed. It checks only what protects memory, computes the grid and launches on the
current stream; it neither synchronises nor tunes, so a CUDA graph can capture it.

A module also has ``ahead_of_time_cases()``: for every kernel what a launch compiles, so that a machine without a GPU
can compile it for one, see ``tests/test_ahead_of_time_triton.py``.
"""
