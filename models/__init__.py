"""Models built on the operators, with the published models' parameter names.

With timm the published variants are also ``timm.create_model("tersor_dilateformer_tiny")`` and so on: they register
themselves if timm was imported before this package, else call :func:`register_timm`. timm itself is never imported
here unasked, as that takes seconds.
"""

import sys

from tersor.models._timm import register_timm
from tersor.models.dilateformer import (
    DilateFormer,
    dilateformer_base,
    dilateformer_nano,
    dilateformer_small,
    dilateformer_tiny,
)
from tersor.models.layers import load_checkpoint

__all__ = [
    "DilateFormer",
    "dilateformer_base",
    "dilateformer_nano",
    "dilateformer_small",
    "dilateformer_tiny",
    "load_checkpoint",
    "register_timm",
]

if "timm" in sys.modules:
    register_timm()
