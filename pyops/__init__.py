"""tersor: fused operators for efficient vision models, on CPUs and NVIDIA GPUs."""

from tersor import _backends
from tersor._backends import backends, use_backend
from tersor.attention import DilatedAttention, dilated_attention, dilated_attention_qkvpacked

__version__ = "0.1.0"
__all__ = ["DilatedAttention", "backends", "dilated_attention", "dilated_attention_qkvpacked", "use_backend"]

_backends.load()
