"""Which GPU kernel is the default for an operator: what a measurement on a real GPU has shown, and nothing else.

An operator that is not listed runs its reference on CUDA; its kernels are reached with ``tersor.use_backend``.
Each entry names the backend and, in a comment, the GPU, the date and the results file that it rests on.
"""

VERIFIED: dict[str, str] = {}
