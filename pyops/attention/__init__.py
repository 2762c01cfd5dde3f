"""Attention operators."""

from tersor.attention.dilated_attention import DilatedAttention, dilated_attention, dilated_attention_qkvpacked

__all__ = ["DilatedAttention", "dilated_attention", "dilated_attention_qkvpacked"]
