"""Token operators: choosing, splitting, merging and dropping the tokens of a vision transformer."""

from tersor.tokens.class_attention import (
    class_attention,
    class_attention_ema,
    class_attention_qkvpacked,
    class_scores,
    mean_heads,
)
from tersor.tokens.compact_unsure import bucket_size, compact_unsure
from tersor.tokens.gather_patches import gather_patches
from tersor.tokens.gather_tokens import gather_tokens
from tersor.tokens.match_tokens import match_tokens
from tersor.tokens.merge_tokens import merge_tokens
from tersor.tokens.prune_tokens import prune_tokens
from tersor.tokens.rank_tokens import rank_tokens
from tersor.tokens.resize_align_corners import resize_align_corners
from tersor.tokens.resplit_tokens import resplit_index, resplit_tokens

__all__ = [
    "bucket_size",
    "class_attention",
    "class_attention_ema",
    "class_attention_qkvpacked",
    "class_scores",
    "compact_unsure",
    "gather_patches",
    "gather_tokens",
    "match_tokens",
    "mean_heads",
    "merge_tokens",
    "prune_tokens",
    "rank_tokens",
    "resize_align_corners",
    "resplit_index",
    "resplit_tokens",
]
