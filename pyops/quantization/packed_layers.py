"""Layers of a trained model as they are stored and run: packed weights, whole-number arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import check_window
from tersor.quantization._quantizer import exact_dtype
from tersor.quantization.bounded_activation import BoundedActivation
from tersor.quantization.fake_quantize_bounds import fake_quantize_bounds
from tersor.quantization.layers import QuantizedConv2d, QuantizedLinear
from tersor.quantization.pack_codes import pack_codes, packed_size, unpack_codes
from tersor.quantization.quantized_conv2d import PreparedWeight, convolve, prepare_weight
from tersor.quantization.quantized_linear import multiply
from tersor.quantization.weight_fake_quantize import weight_fake_quantize_with_bounds


class WeightCodes(NamedTuple):
    """A weight as ``(codes + zero) * scale[0] / scale[1]``, in this order bit for bit the fake-quantised one."""

    codes: Tensor  # int8
    scale: Tensor  # (2,) float32
    zero: Tensor  # (1,) float32, a whole number
    clamped: bool  # whether 8 bits had no room for the extra top level


def weight_codes(weight: Tensor, bits: int, mode: str, percentile: float = 99.0) -> WeightCodes:
    """The codes that :func:`weight_fake_quantize` rounds the weight to, from -2^(bits-1) to 2^(bits-1)."""
    weight = weight.detach()
    lower, upper = weight_fake_quantize_with_bounds(weight, bits, mode, percentile)[1]
    exact, half = weight.to(exact_dtype(weight.dtype)), 2 ** (bits - 1)
    if mode == "symmetric":
        zero, scale = torch.zeros_like(upper), torch.stack([upper, torch.full_like(upper, half - 1)])
        codes = torch.round(exact * (half - 1) / upper)
    else:
        steps = torch.full_like(upper, 2**bits - 1) / (upper - lower)
        zero, scale = torch.round(steps * lower) + half, torch.stack([torch.ones_like(steps), steps])
        codes = torch.round(steps * torch.maximum(torch.minimum(exact, upper), lower) - zero)
    clamped = bool(codes.max() > 127)
    return WeightCodes(codes.clamp(max=127).to(torch.int8), scale.float(), zero.float().reshape(1), clamped)


def codes_of(layer: QuantizedConv2d | QuantizedLinear) -> WeightCodes:
    """:func:`weight_codes` with the layer's own options."""
    return weight_codes(layer.weight, layer.bits, layer.quantize_weight.mode, layer.quantize_weight.percentile)


class _Packed(nn.Module):
    """What the packed layers share.

    The state dict holds plain tensors: ``packed`` (the weight's codes), ``weight_scale`` ``(2,)`` and ``weight_zero``
    ``(1,)`` (see :class:`WeightCodes`), ``bias``, ``bits`` (of the weight, of one stored code, of the input's codes or
    0), and for the input ``lower`` and ``upper`` ``(1,)`` or, if its bounds are dynamic, the whole
    :class:`BoundedActivation` under ``activation``. Loading takes over whether bounds are dynamic and how many bits the
    codes have. What the kernels read is made from it once. Half and double precision do not touch these numbers: the
    output has the dtype of the input.
    """

    bits: Tensor
    packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    lower: Tensor  # None where the bounds are dynamic or the input is not quantised
    upper: Tensor
    activation: BoundedActivation | None
    codes: Tensor  # None where blocks, sums, scale and zero are made of them
    blocks: Tensor
    sums: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(
        self, weight: WeightCodes, bits: int, bias: Tensor | None, activation: BoundedActivation | None
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.codes.shape)
        half = 2 ** (bits - 1)
        stored = bits + int(bits < 8 and bool((weight.codes >= half).any()))  # the extra top level takes one bit more
        activation_bits = 0 if activation is None else activation.bits
        self.per_sample = activation is not None and activation.per_sample
        self.register_buffer("packed", pack_codes(weight.codes.short() + half, stored))
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("weight_zero", weight.zero.clone())
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("bits", torch.tensor([bits, stored, activation_bits], dtype=torch.int32))
        self.activation = None
        lower = upper = None
        if activation is not None and activation.dynamic and activation.stage == "dynamic":
            self.activation = copy.deepcopy(activation).requires_grad_(False)
        elif activation is not None:
            lower, upper = (b.detach().float().clone() for b in (activation.alpha_lower, activation.alpha_upper))
        self.register_buffer("lower", lower)
        self.register_buffer("upper", upper)
        self._prepare()
        self.eval()

    @property
    def quantizes_input(self) -> bool:
        """Whether the layer is given the unquantised input and computes in whole numbers."""
        return self.activation_bits > 0

    def bounds(self, input: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
        """Of the input's quantiser: one each, or one per sample where they are dynamic."""
        if self.activation is None:
            return self.lower, self.upper
        lower, upper = self.activation.bounds(input, relu)
        return lower.detach(), upper.detach()

    def dequantized_weight(self) -> Tensor:
        """The fake-quantised weight, in float32."""
        return (self.codes.float() + self.weight_zero) * self.weight_scale[0] / self.weight_scale[1]

    def prepared_weight(self) -> PreparedWeight:
        return PreparedWeight(self.blocks, self.sums, self.scale, self.zero, self.bias, self.shape[1])

    def _prepare(self) -> None:
        """What is not stored: the numbers of bits on the host, and the codes as the kernels read them."""
        self.weight_bits, self.stored_bits, self.activation_bits = self.bits.tolist()
        codes = unpack_codes(self.packed, self.stored_bits, self.shape).short() - 2 ** (self.weight_bits - 1)
        codes = codes.to(torch.int8)
        names = ("codes", "blocks", "sums", "scale", "zero")
        made: Sequence[Tensor | None] = (codes, None, None, None, None)
        if self.quantizes_input:
            zero = self.weight_zero if self.weight_zero.item() else None
            step = self.weight_scale[0].double() / self.weight_scale[1].double()
            shape = (*self.shape, 1, 1)[:4]
            made = (None, *prepare_weight(codes.view(shape), step, zero, None, self._groups())[:4])
        for name, tensor in zip(names, made, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def _groups(self) -> int:
        return 1

    def train(self, mode: bool = True) -> _Packed:
        """Stays in eval mode: there is nothing to train."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        bits = state_dict.get(prefix + "bits")
        if bits is not None and (problem := self._adapt(bits.tolist(), state_dict, prefix)):
            error_msgs.append(f"{prefix}bits: {problem}")
            return
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        before = len(error_msgs)
        super()._load_from_state_dict(*arguments)
        if len(error_msgs) == before:
            self._prepare()

    def _adapt(self, bits: list[int], state_dict: dict[str, Any], prefix: str) -> str:
        """Makes room for what is to be loaded; or says why that cannot be."""
        if len(bits) != 3 or not (2 <= bits[0] <= 8 and bits[0] <= bits[1] <= min(8, bits[0] + 1)):
            return f"must be three numbers that a packed layer has written, got {bits}"
        if (bits[2] > 0) != self.quantizes_input or bits[2] not in (0, *range(2, 9)):
            now = f"of {self.activation_bits} bits" if self.quantizes_input else "not quantised"
            return f"the input's codes here are {now}, got {bits[2]} bits (0 for an input that is not quantised)"
        size = packed_size(torch.Size(self.shape).numel(), bits[1])
        if self.packed.numel() != size:
            self.packed = self.packed.new_zeros(size)
        if not self.quantizes_input:
            return ""
        dynamic = any(key.startswith(prefix + "activation.") for key in state_dict)
        if dynamic and self.activation is None:
            self._buffers["lower"] = self._buffers["upper"] = None
            self.activation = BoundedActivation(self._channels(), bits[2], per_sample=self.per_sample)
            self.activation.requires_grad_(False).eval().to(self.packed.device)
        elif not dynamic and self.activation is not None:
            self.activation = None
            self.lower, self.upper = (self.weight_scale.new_zeros(1) for _ in range(2))
        if self.activation is not None:
            self.activation.bits = bits[2]
        return ""

    def _channels(self) -> int:
        return self.shape[1]

    def extra_repr(self) -> str:
        computes = f"input of {self.activation_bits} bits" if self.quantizes_input else "computes in float"
        return f"weight of {self.weight_bits} bits, {computes}"


class PackedConv2d(_Packed):
    """A :class:`QuantizedConv2d` for inference, as :func:`convert_` makes it.

    With an activation it takes the unquantised input and computes by :func:`quantized_conv2d`; against the
    fake-quantised layer in float32, summed without rounding, the difference is at most 3 eps times the sum of the
    terms' absolute values, bias included, with eps = 2^-23. Without one, the weight is stored packed, and the layer
    computes in float with the dequantised weight.

    Args:
        layer: the trained layer.
        activation: its input's quantiser; None for none.
        weight: the layer's codes; None computes them.

    Shape:
        as ``torch.nn.Conv2d``.

    Raises:
        ValueError: the layer's padding is not the same on both sides.
    """

    def __init__(
        self, layer: QuantizedConv2d, activation: BoundedActivation | None = None, weight: WeightCodes | None = None
    ) -> None:
        windows = zip(layer.dilation, layer.kernel_size, strict=True)
        if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in windows):
            raise ValueError(
                f"padding must be the same on both sides, got 'same' for kernel {layer.kernel_size} and "
                f"dilation {layer.dilation}"
            )
        self.groups = layer.groups
        super().__init__(weight or codes_of(layer), layer.bits, layer.bias, activation)
        # What nn.Conv2d pads: right and left, bottom and top, also for "same" and "valid".
        self.border = tuple(layer._reversed_padding_repeated_twice)
        self.padding_mode = layer.padding_mode
        amounts = layer.padding if not isinstance(layer.padding, str) else self.border[::-2]
        self.stride, self.padding, self.dilation = check_window("PackedConv2d", layer.stride, amounts, layer.dilation)

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """``relu`` takes ``relu(input)`` instead, in the same pass."""
        if not self.quantizes_input:
            input = torch.relu(input) if relu else input
            weight = self.dequantized_weight().to(input.dtype)
            bias = None if self.bias is None else self.bias.to(input.dtype)
            input, padding = self._padded(input)
            return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
        lower, upper = self.bounds(input, relu)
        input, padding = self._padded(input)
        window = (self.stride, padding, self.dilation)
        prepared = self.prepared_weight()
        return convolve("PackedConv2d", input, prepared, lower, upper, self.activation_bits, *window, relu=relu)

    def _padded(self, input: Tensor) -> tuple[Tensor, list[int]]:
        """Any padding but zeros is done beforehand: it commutes with quantisation."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self.border, self.padding_mode), [0, 0]

    def _groups(self) -> int:
        return self.groups

    def _channels(self) -> int:
        return self.shape[1] * self.groups

    def extra_repr(self) -> str:
        outputs, _, *kernel = self.shape
        window = f"kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, padding={tuple(self.padding)}"
        return f"{self._channels()}, {outputs}, {window}, {super().extra_repr()}"


class PackedLinear(_Packed):
    """A :class:`QuantizedLinear` for inference, as :func:`convert_` makes it; see :class:`PackedConv2d`.

    Args:
        layer, activation, weight: as for :class:`PackedConv2d`; the activation's bounds are static.

    Shape:
        as ``torch.nn.Linear``.

    Raises:
        ValueError: the activation is dynamic.
    """

    def __init__(
        self, layer: QuantizedLinear, activation: BoundedActivation | None = None, weight: WeightCodes | None = None
    ) -> None:
        if activation is not None and activation.dynamic and activation.stage == "dynamic":
            raise ValueError("the activation of a linear layer must be static: a gate takes images")
        super().__init__(weight or codes_of(layer), layer.bits, layer.bias, activation)

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """``relu`` takes ``relu(input)`` instead, in the same pass."""
        if not self.quantizes_input:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(torch.relu(input) if relu else input, self.dequantized_weight().to(input.dtype), bias)
        lower, upper = self.bounds(input, relu)
        return multiply("PackedLinear", input, self.prepared_weight(), lower, upper, self.activation_bits, relu=relu)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {super().extra_repr()}"


class PackedActivation(nn.Module):
    """Stands where a model had the activation that a packed layer has taken over; quantises as that layer does.

    Holds no tensors of its own, so that the state dict has them once.
    """

    def __init__(self, layer: _Packed) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, lest it becomes a part of this module

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        (layer,) = self._layer
        return fake_quantize_bounds(input, *layer.bounds(input, relu), layer.activation_bits, relu=relu)
