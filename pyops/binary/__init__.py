"""Binary networks: signs with estimated gradients in training, exclusive or and counting of bits in deployment."""

from tersor.binary.binary_conv2d import binary_conv2d
from tersor.binary.binary_packed_conv2d import (
    Epilogue,
    PackedBinaryWeight,
    binary_packed_conv2d,
    binary_packed_conv2d_signs,
    epilogue,
    pack_binary_weight,
)
from tersor.binary.binary_packed_linear import binary_packed_linear
from tersor.binary.binary_sign import approx_sign, binarize_activation, binary_sign, reste_sign, ste_sign
from tersor.binary.convert import BinaryStep, binary_step, convert_
from tersor.binary.estimators import Estimator
from tersor.binary.functional import binary_linear, recu_conv2d, reste_conv2d
from tersor.binary.layers import BinaryConv2d, BinaryLinear, ChannelBias, ReCUConv2d, ReSTEConv2d
from tersor.binary.pack_signs import PackedSigns, pack_signs
from tersor.binary.packed_layers import PackedBinaryConv2d, PackedBinaryLinear, PackedWeightConv2d
from tersor.binary.recu_weight import recu_weight
from tersor.binary.schedules import BinarySchedule, estimating_error, gradient_stability, recu_tau, reste_o
from tersor.binary.unpack_signs import unpack_signs

__all__ = [
    "BinaryConv2d",
    "BinaryLinear",
    "BinarySchedule",
    "BinaryStep",
    "ChannelBias",
    "Epilogue",
    "Estimator",
    "PackedBinaryConv2d",
    "PackedBinaryLinear",
    "PackedBinaryWeight",
    "PackedSigns",
    "PackedWeightConv2d",
    "ReCUConv2d",
    "ReSTEConv2d",
    "approx_sign",
    "binarize_activation",
    "binary_conv2d",
    "binary_linear",
    "binary_packed_conv2d",
    "binary_packed_conv2d_signs",
    "binary_packed_linear",
    "binary_sign",
    "binary_step",
    "convert_",
    "epilogue",
    "estimating_error",
    "gradient_stability",
    "pack_binary_weight",
    "pack_signs",
    "recu_conv2d",
    "recu_tau",
    "recu_weight",
    "reste_conv2d",
    "reste_o",
    "reste_sign",
    "ste_sign",
    "unpack_signs",
]
