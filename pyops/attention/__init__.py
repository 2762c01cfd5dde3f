"""Attention operators."""

from tersor.attention.dilated_attention import DilatedAttention, dilated_attention, dilated_attention_qkvpacked
from tersor.attention.ladder_attention import LadderAttention, LadderBlock, MlpLight, pixel_adaptive_fusion
from tersor.attention.layers import WindowAttention
from tersor.attention.leff import LeFF, leff
from tersor.attention.window_attention import (
    window_attention,
    window_attention_kvpacked,
    window_attention_qkpacked,
    window_attention_qkvpacked,
)

__all__ = [
    "DilatedAttention",
    "LadderAttention",
    "LadderBlock",
    "LeFF",
    "MlpLight",
    "WindowAttention",
    "dilated_attention",
    "dilated_attention_qkvpacked",
    "leff",
    "pixel_adaptive_fusion",
    "window_attention",
    "window_attention_kvpacked",
    "window_attention_qkpacked",
    "window_attention_qkvpacked",
]
