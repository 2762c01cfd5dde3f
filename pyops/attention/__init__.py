"""Attention operators."""

from tersor.attention.dilated_attention import DilatedAttention, dilated_attention, dilated_attention_qkvpacked
from tersor.attention.window_attention import (
    window_attention,
    window_attention_kvpacked,
    window_attention_qkpacked,
    window_attention_qkvpacked,
)

__all__ = [
    "DilatedAttention",
    "dilated_attention",
    "dilated_attention_qkvpacked",
    "window_attention",
    "window_attention_kvpacked",
    "window_attention_qkpacked",
    "window_attention_qkvpacked",
]
