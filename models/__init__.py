"""Models built on the operators, with the published models' parameter names.

With timm the published variants are also ``timm.create_model("tersor_dilateformer_tiny")`` and so on: they register
themselves if timm was imported before this package, else call :func:`register_timm`. timm itself is never imported
here unasked, as that takes seconds.
"""

import sys

from tersor.models._super_resolution import attention_transfer, load_full_precision
from tersor.models._timm import register_timm
from tersor.models.dilateformer import (
    DilateFormer,
    dilateformer_base,
    dilateformer_nano,
    dilateformer_small,
    dilateformer_tiny,
)
from tersor.models.edsr import EDSR, edsr_baseline, edsr_tiny
from tersor.models.layers import load_checkpoint
from tersor.models.rdn import RDN, rdn_a, rdn_b, rdn_tiny
from tersor.models.srresnet import SRResNet, srresnet, srresnet_tiny

__all__ = [
    "EDSR",
    "RDN",
    "DilateFormer",
    "SRResNet",
    "attention_transfer",
    "dilateformer_base",
    "dilateformer_nano",
    "dilateformer_small",
    "dilateformer_tiny",
    "edsr_baseline",
    "edsr_tiny",
    "load_checkpoint",
    "load_full_precision",
    "rdn_a",
    "rdn_b",
    "rdn_tiny",
    "register_timm",
    "srresnet",
    "srresnet_tiny",
]

if "timm" in sys.modules:
    register_timm()
