"""Low-bit quantisation: trainable fake-quantisers, layers, packed inference and export."""

import importlib
from typing import Any

from tersor.quantization.bounded_activation import BoundedActivation
from tersor.quantization.bounds_schedule import BoundsSchedule
from tersor.quantization.convert import convert_
from tersor.quantization.dynamic_gate import dynamic_gate
from tersor.quantization.fake_quantize_add import fake_quantize_add
from tersor.quantization.fake_quantize_affine import fake_quantize_affine
from tersor.quantization.fake_quantize_bounds import fake_quantize_bounds
from tersor.quantization.fake_quantize_lsq import fake_quantize_lsq, lsq_scale
from tersor.quantization.fake_quantize_lsq_plus import fake_quantize_lsq_plus, lsq_plus_parameters
from tersor.quantization.fake_quantize_pact import fake_quantize_pact
from tersor.quantization.layers import QuantizedConv2d, QuantizedLinear, WeightFakeQuantize
from tersor.quantization.pack_codes import pack_codes, unpack_codes
from tersor.quantization.packed_layers import PackedConv2d, PackedLinear
from tersor.quantization.percentile_bounds import percentile_bounds
from tersor.quantization.quantized_conv2d import quantized_conv2d
from tersor.quantization.quantized_linear import quantized_linear
from tersor.quantization.weight_fake_quantize import weight_fake_quantize

__all__ = [
    "BoundedActivation",
    "BoundsSchedule",
    "PackedConv2d",
    "PackedLinear",
    "QuantizedConv2d",
    "QuantizedLinear",
    "WeightFakeQuantize",
    "convert_",
    "dynamic_gate",
    "export_onnx",
    "fake_quantize_add",
    "fake_quantize_affine",
    "fake_quantize_bounds",
    "fake_quantize_lsq",
    "fake_quantize_lsq_plus",
    "fake_quantize_pact",
    "lsq_plus_parameters",
    "lsq_scale",
    "pack_codes",
    "percentile_bounds",
    "quantized_conv2d",
    "quantized_linear",
    "unpack_codes",
    "weight_fake_quantize",
]


def __getattr__(name: str) -> Any:
    """What is imported on first use."""
    if name == "export_onnx":
        return importlib.import_module("tersor.quantization.onnx_export").export_onnx
    raise AttributeError(f"module 'tersor.quantization' has no attribute {name!r}")
