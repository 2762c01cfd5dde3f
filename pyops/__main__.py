"""``python -m tersor``: what is installed, which kernels run, and whether they are right."""

from tersor import _selftest

raise SystemExit(0 if _selftest.run() else 1)
