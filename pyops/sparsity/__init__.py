"""N:M sparsity in training: learned combinations (LBC) and magnitudes (SR-STE)."""

from tersor.sparsity.functional import nm_conv2d, nm_linear, srste_conv2d, srste_linear
from tersor.sparsity.layers import NMConv2d, NMLinear, NMSchedule, SrSte
from tersor.sparsity.nm_pattern import nm_combinations
from tersor.sparsity.nm_remove import nm_remove_
from tersor.sparsity.nm_schedule import nm_schedule
from tersor.sparsity.nm_sparsify import nm_sparsify
from tersor.sparsity.semi_structured import pack_semi_structured, unpack_semi_structured
from tersor.sparsity.srste_sparsify import srste_sparsify

__all__ = [
    "NMConv2d",
    "NMLinear",
    "NMSchedule",
    "SrSte",
    "nm_combinations",
    "nm_conv2d",
    "nm_linear",
    "nm_remove_",
    "nm_schedule",
    "nm_sparsify",
    "pack_semi_structured",
    "srste_conv2d",
    "srste_linear",
    "srste_sparsify",
    "unpack_semi_structured",
]
