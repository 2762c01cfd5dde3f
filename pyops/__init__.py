"""tersor: fused operators for efficient vision models, on CPUs and NVIDIA GPUs."""

from tersor import _backends
from tersor._backends import backends, use_backend
from tersor.attention import (
    DilatedAttention,
    LeFF,
    dilated_attention,
    dilated_attention_qkvpacked,
    leff,
    window_attention,
    window_attention_kvpacked,
    window_attention_qkpacked,
    window_attention_qkvpacked,
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

__version__ = "0.1.0"
__all__ = [
    "BoundedActivation",
    "BoundsSchedule",
    "DilatedAttention",
    "FreezeSchedule",
    "FrozenAdamW",
    "FrozenSGD",
    "LeFF",
    "LtsConv2d",
    "LtsLinear",
    "NMConv2d",
    "NMLinear",
    "NMSchedule",
    "QuantizedConv2d",
    "QuantizedLinear",
    "WeightFakeQuantize",
    "backends",
    "dilated_attention",
    "dilated_attention_qkvpacked",
    "dynamic_gate",
    "fake_quantize_add",
    "fake_quantize_affine",
    "fake_quantize_bounds",
    "fake_quantize_lsq",
    "fake_quantize_lsq_plus",
    "fake_quantize_pact",
    "frozen_conv2d",
    "frozen_linear",
    "leff",
    "lts_quantize",
    "nm_conv2d",
    "nm_linear",
    "nm_sparsify",
    "percentile_bounds",
    "srste_sparsify",
    "use_backend",
    "weight_fake_quantize",
    "window_attention",
    "window_attention_kvpacked",
    "window_attention_qkpacked",
    "window_attention_qkvpacked",
]

_backends.load()
