"""Freezing during quantisation-aware training: what has settled is neither computed nor updated any more."""

from tersor.freezing.authors_checkpoint import authors_state_dict, load_authors_state_dict
from tersor.freezing.freeze_plan import FreezePlan, freeze_plan
from tersor.freezing.freeze_schedule import FreezeSchedule
from tersor.freezing.frozen_conv2d import frozen_conv2d
from tersor.freezing.frozen_linear import frozen_linear
from tersor.freezing.layers import (
    LtsConv2d,
    LtsLinear,
    LtsWeight,
    UnitActivation,
    frozen_ratio,
    frozen_weights,
    initialize_,
    refresh_,
)
from tersor.freezing.lts_quantize import LtsState, lts_quantize, lts_state
from tersor.freezing.mask import mask_size, pack_mask, unpack_mask
from tersor.freezing.optimizers import FrozenAdamW, FrozenSGD
from tersor.freezing.zero_frozen import zero_frozen

__all__ = [
    "FreezePlan",
    "FreezeSchedule",
    "FrozenAdamW",
    "FrozenSGD",
    "LtsConv2d",
    "LtsLinear",
    "LtsState",
    "LtsWeight",
    "UnitActivation",
    "authors_state_dict",
    "freeze_plan",
    "frozen_conv2d",
    "frozen_linear",
    "frozen_ratio",
    "frozen_weights",
    "initialize_",
    "load_authors_state_dict",
    "lts_quantize",
    "lts_state",
    "mask_size",
    "pack_mask",
    "refresh_",
    "unpack_mask",
    "zero_frozen",
]
