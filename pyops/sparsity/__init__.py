"""N:M sparsity: training by learned combinations (LBC) or magnitudes (SR-STE), and packed weights for inference."""

from tersor.sparsity.functional import nm_conv2d, nm_linear, srste_conv2d, srste_linear
from tersor.sparsity.layers import NMConv2d, NMLinear, NMSchedule, NMScores, SrSte
from tersor.sparsity.nm_compact import expand_
from tersor.sparsity.nm_matmul import nm_matmul
from tersor.sparsity.nm_pack import nm_pack
from tersor.sparsity.nm_packed_conv2d import nm_packed_conv2d
from tersor.sparsity.nm_pattern import nm_combinations
from tersor.sparsity.nm_remove import nm_remove_
from tersor.sparsity.nm_schedule import nm_schedule
from tersor.sparsity.nm_sparsify import nm_mask, nm_sparsify
from tersor.sparsity.nm_unpack import nm_unpack
from tersor.sparsity.packed_layers import PackedNMConv2d, PackedNMLinear, convert_
from tersor.sparsity.semi_structured import pack_semi_structured, unpack_semi_structured
from tersor.sparsity.srste_sparsify import srste_sparsify

__all__ = [
    "NMConv2d",
    "NMLinear",
    "NMSchedule",
    "NMScores",
    "PackedNMConv2d",
    "PackedNMLinear",
    "SrSte",
    "convert_",
    "expand_",
    "nm_combinations",
    "nm_conv2d",
    "nm_linear",
    "nm_mask",
    "nm_matmul",
    "nm_pack",
    "nm_packed_conv2d",
    "nm_remove_",
    "nm_schedule",
    "nm_sparsify",
    "nm_unpack",
    "pack_semi_structured",
    "srste_conv2d",
    "srste_linear",
    "srste_sparsify",
    "unpack_semi_structured",
]
