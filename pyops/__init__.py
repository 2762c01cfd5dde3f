"""tersor: fused operators for efficient vision models, on CPUs and NVIDIA GPUs."""

import contextlib
import gc
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """A garbage collection while modules load walks over all of torch's objects, 80 ms, and finds nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


with _without_collections():
    from tersor import _backends
    from tersor._backends import backends, use_backend
    from tersor._folding import fold_norms_
    from tersor.attention import (
        DilatedAttention,
        LadderAttention,
        LadderBlock,
        LeFF,
        MlpLight,
        WindowAttention,
        dilated_attention,
        dilated_attention_qkvpacked,
        leff,
        pixel_adaptive_fusion,
        window_attention,
        window_attention_kvpacked,
        window_attention_qkpacked,
        window_attention_qkvpacked,
    )
    from tersor.binary import (
        BinaryConv2d,
        BinaryLinear,
        BinarySchedule,
        ReCUConv2d,
        ReSTEConv2d,
        approx_sign,
        binarize_activation,
        binary_conv2d,
        binary_linear,
        binary_sign,
        pack_signs,
        recu_conv2d,
        recu_tau,
        recu_weight,
        reste_conv2d,
        reste_o,
        reste_sign,
        ste_sign,
        unpack_signs,
    )
    from tersor.freezing import (
        FreezeSchedule,
        FrozenAdamW,
        FrozenSGD,
        LtsConv2d,
        LtsLinear,
        frozen_conv2d,
        frozen_linear,
        lts_quantize,
    )
    from tersor.quantization import (
        BoundedActivation,
        BoundsSchedule,
        QuantizedConv2d,
        QuantizedLinear,
        WeightFakeQuantize,
        dynamic_gate,
        fake_quantize_add,
        fake_quantize_affine,
        fake_quantize_bounds,
        fake_quantize_lsq,
        fake_quantize_lsq_plus,
        fake_quantize_pact,
        percentile_bounds,
        weight_fake_quantize,
    )
    from tersor.sparsity import NMConv2d, NMLinear, NMSchedule, nm_conv2d, nm_linear, nm_sparsify, srste_sparsify
    from tersor.tokens import (
        bucket_size,
        class_attention,
        class_attention_ema,
        class_attention_qkvpacked,
        class_scores,
        compact_unsure,
        gather_patches,
        gather_tokens,
        match_tokens,
        merge_tokens,
        prune_tokens,
        rank_tokens,
        resize_align_corners,
        resplit_index,
        resplit_tokens,
    )

__version__ = "0.1.0"
__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BinarySchedule",
    "BoundedActivation",
    "BoundsSchedule",
    "DilatedAttention",
    "FreezeSchedule",
    "FrozenAdamW",
    "FrozenSGD",
    "LadderAttention",
    "LadderBlock",
    "LeFF",
    "LtsConv2d",
    "LtsLinear",
    "MlpLight",
    "NMConv2d",
    "NMLinear",
    "NMSchedule",
    "QuantizedConv2d",
    "QuantizedLinear",
    "ReCUConv2d",
    "ReSTEConv2d",
    "WeightFakeQuantize",
    "WindowAttention",
    "approx_sign",
    "backends",
    "binarize_activation",
    "binary_conv2d",
    "binary_linear",
    "binary_sign",
    "bucket_size",
    "class_attention",
    "class_attention_ema",
    "class_attention_qkvpacked",
    "class_scores",
    "compact_unsure",
    "dilated_attention",
    "dilated_attention_qkvpacked",
    "dynamic_gate",
    "fake_quantize_add",
    "fake_quantize_affine",
    "fake_quantize_bounds",
    "fake_quantize_lsq",
    "fake_quantize_lsq_plus",
    "fake_quantize_pact",
    "fold_norms_",
    "frozen_conv2d",
    "frozen_linear",
    "gather_patches",
    "gather_tokens",
    "leff",
    "lts_quantize",
    "match_tokens",
    "merge_tokens",
    "nm_conv2d",
    "nm_linear",
    "nm_sparsify",
    "pack_signs",
    "percentile_bounds",
    "pixel_adaptive_fusion",
    "prune_tokens",
    "rank_tokens",
    "recu_conv2d",
    "recu_tau",
    "recu_weight",
    "resize_align_corners",
    "resplit_index",
    "resplit_tokens",
    "reste_conv2d",
    "reste_o",
    "reste_sign",
    "srste_sparsify",
    "ste_sign",
    "unpack_signs",
    "use_backend",
    "weight_fake_quantize",
    "window_attention",
    "window_attention_kvpacked",
    "window_attention_qkpacked",
    "window_attention_qkvpacked",
]


def __getattr__(name: str) -> Any:
    """What is imported on first use: neither is needed by who uses operators only."""
    if name in ("compress", "sharding"):
        return importlib.import_module(f"tersor.{name}")
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")


_backends.load()
