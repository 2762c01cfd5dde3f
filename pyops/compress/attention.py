"""torchvision's window attention replaced by ours, which has the same parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.attention.layers import WindowAttention

SWIN = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")  # torchvision.models.swin_transformer


def window_attention_of(module: Any) -> tuple[nn.Module | None, str]:
    """The replacement with the module's own projections and table; or None, and why there is none."""
    if type(module).__name__ == SWIN[1]:
        return None, "its attention is of cosines, which window_attention does not compute"
    if not hasattr(module, "relative_position_bias_table"):
        return None, "it is not torchvision's"
    if module.attention_dropout:
        return None, f"its attention_dropout is {module.attention_dropout}, the kernels keep no matrix to drop from"
    dim = module.proj.in_features
    options = {"qkv_bias": module.qkv.bias is not None, "proj_bias": module.proj.bias is not None}
    made = WindowAttention(
        dim, module.window_size, module.shift_size, module.num_heads, dropout=module.dropout, **options
    )
    made.qkv, made.proj = module.qkv, module.proj
    made.relative_position_bias_table = module.relative_position_bias_table
    return made.train(module.training), ""
