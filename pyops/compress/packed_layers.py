"""Compressed layers for inference: few bits, few weights, whole-number arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import check_window
from tersor.compress.layers import CompressedConv2d, CompressedLayer, CompressedLinear
from tersor.compress.quantizers import FreezingWeight, LsqWeight
from tersor.quantization._quantizer import exact_dtype
from tersor.quantization.pack_codes import pack_codes, packed_size, unpack_codes
from tersor.quantization.packed_layers import weight_codes
from tersor.quantization.quantized_conv2d import PreparedWeight, convolve, prepare_weight
from tersor.quantization.quantized_linear import multiply
from tersor.sparsity.nm_pack import check_index, index_size, nm_pack
from tersor.sparsity.nm_pattern import from_groups
from tersor.sparsity.nm_unpack import unpack_rows


class Codes(NamedTuple):
    """A weight as ``(step codes + zero) scale``: stored codes from 0 to 2^bits - 1 with an offset and a step."""

    stored: Tensor  # uint8, of the weight's shape
    bits: int  # of one stored code
    step: int  # 1, or 2 where levels are odd numbers
    offset: int  # added to step * stored
    zero: float  # added to the codes, a whole number
    scale: Tensor  # (1,) or (O,) float32


@torch.no_grad()
def codes_of(layer: CompressedLayer) -> Codes:
    """The codes of a compressed layer's weight, before the scores of "lbc" drop any.

    Raises:
        ValueError: the quantiser's bounds or steps cannot be packed.
    """
    quantizer, options = layer.quantize_weight, layer.quantization
    assert options is not None
    weight, bits = layer.sparsified_weight(), options.bits
    half = 2 ** (bits - 1)
    if not weight.isfinite().all():
        raise ValueError(f"weight must be finite, got {int((~weight.isfinite()).sum())} elements that are not")
    assert quantizer is not None
    quantizer(weight)  # which raises where its steps or bounds are none
    if isinstance(quantizer, LsqWeight):
        # In the precision that the quantiser computes in, so that nothing is rounded to another level.
        scale = quantizer.scale.to(exact_dtype(weight.dtype))
        codes = torch.round((weight.to(scale.dtype) / scale).clamp(-half, half - 1))
        stored = (codes + half).to(torch.uint8)
        return Codes(stored, bits, 1, -half, 0.0, scale.flatten().float())
    if isinstance(quantizer, FreezingWeight):
        lower, upper = (bound.to(exact_dtype(weight.dtype)) for bound in (quantizer.lower, quantizer.upper))
        top = 2**bits - 1
        places = (quantizer.effective(weight).to(lower.dtype) - lower) / (upper - lower)
        stored = torch.round(places.clamp(0, 1) * top).to(torch.uint8)
        return Codes(stored, bits, 2, -top, 0.0, ((upper - lower) / 2 / top).flatten().float())
    found = weight_codes(weight, bits, "percentile", quantizer.percentile)
    wide = bits + int(bits < 8 and bool((found.codes >= half).any()))  # the extra top level takes one bit more
    stored = (found.codes.short() + half).to(torch.uint8)
    scale = (found.scale[0].double() / found.scale[1].double()).float().reshape(1)
    return Codes(stored, wide, 1, -half, float(found.zero), scale)


class _Packed(nn.Module):
    """What the packed layers share.

    The state dict holds plain tensors: ``codes``, the weight's codes side by side (of a sparse weight the kept ones,
    with ``index`` as :func:`tersor.sparsity.nm_pack` makes it); ``scale`` and ``bias`` in float32; ``numbers``, int32
    of :data:`NUMBERS`; and for the input ``lower`` and ``upper`` ``(1,)``. What the kernels read is made from it once.
    Half precision does not touch these: the output has the dtype of the input.
    """

    codes: Tensor
    index: Tensor | None
    scale: Tensor
    bias: Tensor | None
    numbers: Tensor
    lower: Tensor  # None where the input stays as it is
    upper: Tensor
    weight: Tensor | None
    blocks: Tensor | None
    sums: Tensor | None
    full_scale: Tensor | None
    full_zero: Tensor | None

    NUMBERS = ("bits of a stored code", "step", "offset", "zero", "bits of the input", "n", "m")

    def __init__(self, layer: CompressedLayer) -> None:
        super().__init__()
        found = codes_of(layer)
        self.shape, self.groups = tuple(layer.weight.shape), int(getattr(layer, "groups", 1))
        self.pattern = None if layer.sparsity is None else (layer.sparsity.n, layer.sparsity.m)
        self.description = layer.describe()
        stored, index = found.stored.flatten(), None
        if self.pattern is not None:
            if not -128 <= -found.zero <= 127:
                raise ValueError(f"the code of a dropped weight must fit 8 bits, got {-found.zero:.0f}")
            stored, index = self._kept(layer, found)
        input_bits = 0 if layer.quantize_input is None else layer.quantize_input.bits
        numbers = [found.bits, found.step, found.offset, int(found.zero), input_bits, *(self.pattern or (0, 0))]
        self.register_buffer("codes", pack_codes(stored, found.bits))
        self.register_buffer("index", index)
        self.register_buffer("scale", found.scale.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.int32))
        bounds = layer.quantize_input
        if bounds is not None and (problem := _bounds_problem(bounds.lower, bounds.upper)):
            raise ValueError(f"{problem}: run tersor.compress.calibrate_(model, batch) before training")
        for name in ("lower", "upper"):
            value = None if bounds is None else getattr(bounds, name).detach().float().clone()
            self.register_buffer(name, value)
        self._prepare()
        self.eval()

    def _kept(self, layer: CompressedLayer, found: Codes) -> tuple[Tensor, Tensor]:
        """The kept codes in their order, and the index of their places; of a group with fewer than n also zeros."""
        assert self.pattern is not None
        with torch.no_grad():
            if layer.scores is not None:
                mask = layer.scores(torch.ones_like(layer.weight))
            else:
                mask = (layer.sparsified_weight() != 0).to(layer.weight)
        # Of a code and 1, so that a kept code of 0 is not taken for a dropped one.
        values, index = nm_pack((found.stored.float() + 1) * mask, None, *self.pattern)
        zero = (-int(found.zero) - found.offset) // found.step
        return torch.where(values == 0, zero, values - 1).to(torch.uint8).flatten(), index

    @property
    def input_bits(self) -> int:
        """Of the input's codes; 0 where the input stays as it is and the layer computes in float."""
        return self._input_bits

    def integer_weight(self) -> Tensor:
        """The codes that the products are computed with, int8; of dropped weights those of the value 0."""
        bits, step, offset, zero, *_ = self.numbers.tolist()
        if self.pattern is None:
            stored = unpack_codes(self.codes, bits, self.shape)
            return (stored.short() * step + offset).to(torch.int8)
        assert self.index is not None
        n, m = self.pattern
        rows = self.shape[0]
        kept = unpack_codes(self.codes, bits, (rows, self.index_groups(), n)).short() * step + offset
        # Shifted by the zero point, so that the places in between, which are filled with 0, stand for the value 0.
        flat = unpack_rows(kept.float() + zero, self.index, n, m) - zero
        return from_groups(flat, self.shape).to(torch.int8).contiguous()

    def index_groups(self) -> int:
        assert self.pattern is not None
        return torch.Size(self.shape[1:]).numel() // self.pattern[1]

    def dense_weight(self) -> Tensor:
        """The weight in float32, with its zeros."""
        integers = self.integer_weight().float() + float(self.numbers[3])
        return integers * self.scale.view(-1, *(1,) * (len(self.shape) - 1))

    def fold_(self, scale: Tensor, shift: Tensor) -> None:
        """Multiplies the output's channels and adds to them, ``(O,)`` each, by changing scale and bias."""
        bias = 0 if self.bias is None else self.bias.double()
        self.bias = (bias * scale.double() + shift.double()).float()
        self.scale = (self.scale.double() * scale.double()).float()
        self._prepare()

    def prepared_weight(self) -> PreparedWeight:
        parts: Any = self._buffers  # a tenth of the time that attributes take, which shows in a batch of one
        numbers = parts["full_scale"], parts["full_zero"], parts["bias"]
        return PreparedWeight(parts["blocks"], parts["sums"], *numbers, self.shape[1])

    def _prepare(self) -> None:
        """What is not stored: the numbers on the host, and the weight as the kernels read it."""
        self._input_bits = int(self.numbers[4])
        made: dict[str, Tensor | None] = dict.fromkeys(("weight", "blocks", "sums", "full_scale", "full_zero"))
        if self._input_bits:
            zero = self.scale.new_tensor([float(self.numbers[3])]) if self.numbers[3] else None
            integers = self.integer_weight().view((*self.shape, 1, 1)[:4])
            blocks, sums, scale, zero, *_ = prepare_weight(integers, self.scale, zero, None, self.groups)
            made |= {"blocks": blocks, "sums": sums, "full_scale": scale, "full_zero": zero}
        else:
            made["weight"] = self.dense_weight()
        for name, tensor in made.items():
            self.register_buffer(name, tensor, persistent=False)

    def train(self, mode: bool = True) -> _Packed:
        """Stays in eval mode: there is nothing to train."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        errors = args[-1]
        numbers = state_dict.get(prefix + "numbers")
        if isinstance(numbers, Tensor) and (problem := self._adapt(numbers, state_dict, prefix)):
            errors.append(f"{prefix}{problem}")
            return
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) == before:
            self._prepare()

    def _adapt(self, numbers: Tensor, state_dict: dict[str, Any], prefix: str) -> str:
        """Makes room for what is to be loaded; or says why that cannot be."""
        if numbers.shape != self.numbers.shape or numbers.dtype != torch.int32:
            return f"numbers: must be {len(self.NUMBERS)} of int32, got {numbers.dtype} {tuple(numbers.shape)}"
        bits, step, offset, zero, inputs, n, m = numbers.tolist()
        dropped = self.pattern is None or -128 <= -zero <= 127  # the code of a dropped weight
        if step not in (1, 2) or not 1 <= bits <= 8 or not -128 <= offset <= 0 or not dropped:
            return f"numbers: must be what a packed layer has written, got {numbers.tolist()}"
        fits = (n, m) == (self.pattern or (0, 0)) and (inputs > 0) == (self.lower is not None)
        if not fits or inputs not in (0, *range(2, 9)):
            return f"numbers: must be of {self.description}, got {numbers.tolist()}"
        count = torch.Size(self.shape).numel()
        if self.pattern is not None:
            index, groups = state_dict.get(prefix + "index"), self.index_groups()
            count = self.shape[0] * groups * n
            if not isinstance(index, Tensor) or index.dtype != torch.uint8:
                return "index: must be uint8"
            if tuple(index.shape) != (self.shape[0], index_size(groups, n, m)):
                return f"index: must be {(self.shape[0], index_size(groups, n, m))}, got {tuple(index.shape)}"
            try:
                check_index("index", index, groups, n, m)
            except ValueError as error:
                return str(error)
        if problem := self._values_problem(state_dict, prefix, count, bits, step, offset):
            return problem
        if self.codes.numel() != packed_size(count, bits):
            self.codes = self.codes.new_zeros(packed_size(count, bits))
        for name in ("scale", "bias"):
            given: Any = state_dict.get(prefix + name)
            own = getattr(self, name)
            fits = isinstance(given, Tensor) and given.shape in ((1,), (self.shape[0],))
            if fits and (own is None or own.shape != given.shape):  # a norm has been folded in, there or here
                setattr(self, name, self.scale.new_zeros(given.shape))
        return ""

    def _values_problem(self, state: dict[str, Any], prefix: str, count: int, *numbers: int) -> str:
        """What is wrong with codes or numbers that are to be loaded, if anything is."""
        bits, step, offset = numbers
        codes = state.get(prefix + "codes")
        if isinstance(codes, Tensor) and (codes.dtype != torch.uint8 or codes.shape != (packed_size(count, bits),)):
            shape = (packed_size(count, bits),)
            return f"codes: must be uint8 of shape {shape}, got {codes.dtype} {tuple(codes.shape)}"
        if isinstance(codes, Tensor) and count and int(unpack_codes(codes, bits, (count,)).max()) * step + offset > 127:
            return "codes: must stand for whole numbers of 8 bits"
        for name in ("scale", "bias", "lower", "upper"):
            given = state.get(prefix + name)
            if isinstance(given, Tensor) and not (given.is_floating_point() and given.isfinite().all()):
                return f"{name}: must be finite and floating point"
        bounds = state.get(prefix + "lower"), state.get(prefix + "upper")
        if self.lower is not None and all(isinstance(bound, Tensor) and bound.shape == (1,) for bound in bounds):
            return _bounds_problem(*bounds)
        return ""


def _bounds_problem(lower: Any, upper: Any) -> str:
    if bool(lower.isfinite() & upper.isfinite() & (lower < upper)):
        return ""
    return f"the input's bounds must be finite and not equal, got {lower.item()} and {upper.item()}"


class PackedCompressedConv2d(_Packed):
    """A :class:`CompressedConv2d` for inference, as :func:`tersor.compress.convert_` makes it.

    With quantised inputs it computes in whole numbers, see :func:`tersor.quantization.quantized_conv2d`, which states
    the accuracy; float64 inputs are rounded to float32. Without, it computes in float with the weight put together.

    Shape:
        as ``torch.nn.Conv2d``, for batches.

    Raises:
        ValueError: a quantiser cannot be packed.
    """

    def __init__(self, layer: CompressedConv2d) -> None:
        super().__init__(layer)
        self.border = tuple(layer._reversed_padding_repeated_twice)
        self.padding_mode = layer.padding_mode
        self.stride, self.padding, self.dilation = check_window(
            "PackedCompressedConv2d", layer.stride, self.border[::-2], layer.dilation
        )
        self.activation, self.adds_residual = "none", False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution, plus a residual where ``adds_residual``, through a ReLU where ``activation`` says so."""
        padding, relu = self.padding, self.activation == "relu"
        if self.padding_mode != "zeros":  # which commutes with rounding
            input, padding = F.pad(input, self.border, self.padding_mode), [0, 0]
        if not self.input_bits:
            assert self.weight is not None
            bias = None if self.bias is None else self.bias.to(input.dtype)
            weight = self.weight.to(input.dtype)
            output = F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)
            output = output if residual is None else output + residual
            return F.relu(output) if relu else output
        window = (self.stride, padding, self.dilation)
        name, dtype = "PackedCompressedConv2d", input.dtype
        if dtype == torch.float64:
            input, residual = input.float(), None if residual is None else residual.float()
        quantizer, end = (self.lower, self.upper, self.input_bits), {"residual": residual, "output_relu": relu}
        return convolve(name, input, self.prepared_weight(), *quantizer, *window, **end).to(dtype)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.shape
        window = f"kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, padding={tuple(self.padding)}"
        after = (", plus residual" if self.adds_residual else "") + (", ReLU" if self.activation == "relu" else "")
        return f"{inputs * self.groups}, {outputs}, {window}, groups={self.groups}, {self.description}{after}"


class PackedCompressedLinear(_Packed):
    """A :class:`CompressedLinear` for inference; see :class:`PackedCompressedConv2d`.

    Shape:
        as ``torch.nn.Linear``.
    """

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__(layer)

    def forward(self, input: Tensor) -> Tensor:
        if not self.input_bits:
            assert self.weight is not None
            bias = None if self.bias is None else self.bias.to(input.dtype)
            return F.linear(input, self.weight.to(input.dtype), bias)
        name, dtype = "PackedCompressedLinear", input.dtype
        input = input.float() if dtype == torch.float64 else input
        return multiply(name, input, self.prepared_weight(), self.lower, self.upper, self.input_bits).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}, {self.description}"
