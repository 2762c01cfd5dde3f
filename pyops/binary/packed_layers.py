"""Binary layers for inference: packed weights, whole numbers, and what follows the convolution in the same pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import check_floating, check_window
from tersor.binary.binary_packed_conv2d import (
    DTYPES,
    ROWS,
    Epilogue,
    PackedBinaryWeight,
    convolve,
    convolve_to_signs,
    epilogue,
    pack_binary_weight,
)
from tersor.binary.binary_packed_linear import multiply
from tersor.binary.layers import BinaryConv2d, BinaryLayer, BinaryLinear, ChannelBias, ReCUConv2d, _amounts
from tersor.binary.pack_signs import PackedSigns, pack_signs
from tersor.freezing.mask import mask_size, pack_mask, unpack_mask


class _Packed(nn.Module):
    """What the packed layers share.

    The state dict holds plain tensors: ``packed``, one bit a weight in row-major order, set for a positive one;
    ``nonzero``, likewise, where a weight is not zero, if any is; and ``rows`` of the :class:`Epilogue` as far as they
    are used, or ``thresholds`` of the signs. ``half()`` and its like do not touch these, but only say what dtype the
    output has where the input is bits; otherwise it has that of the input: float16, bfloat16 or float32.
    """

    packed: Tensor
    nonzero: Tensor | None
    rows: Tensor | None
    blocks: Tensor
    sums: Tensor
    full_rows: Tensor | None
    dtype: torch.dtype

    def _configure(self, layer: BinaryLayer, groups: int) -> None:
        with torch.no_grad():
            weight = layer.binary_weight()
        self.shape, self.groups, self.dtype = tuple(weight.shape), groups, weight.dtype
        nonzero = (weight > 0) | (weight < 0)  # the sign of NaN is 0
        self.register_buffer("packed", pack_mask(weight > 0))
        self.register_buffer("nonzero", None if bool(nonzero.all()) else pack_mask(nonzero))
        self.fused, self.relu, self.activation = False, False, "none"

    def signs_of_weight(self) -> Tensor:
        """-1, 0 and 1 in the weight's shape."""
        positive = unpack_mask(self.packed, self.shape).float()
        return 2 * positive - 1 if self.nonzero is None else (2 * positive - 1) * unpack_mask(self.nonzero, self.shape)

    def _used_rows(self) -> list[int]:
        return [0, 1, *([2, 3] if self.fused else []), *([4, 5, 6] if self.activation == "prelu" else [])]

    def _prepare(self) -> None:
        """What is not stored: weights and rows as the kernels read them."""
        weight = pack_binary_weight(
            self.signs_of_weight().view(*self.shape, *(1,) * (4 - len(self.shape))), self.groups
        )
        self.register_buffer("blocks", weight.blocks, persistent=False)
        self.register_buffer("sums", weight.sums, persistent=False)
        full = None
        if self.rows is not None:
            used = {ROWS[i]: row for i, row in zip(self._used_rows(), self.rows, strict=True)}
            options: dict[str, Any] = {"relu": self.relu, "activation": self.activation, "device": self.rows.device}
            full = epilogue(self.shape[0], **options, **used).rows
        self.register_buffer("full_rows", full, persistent=False)

    def packed_weight(self) -> PackedBinaryWeight:
        return PackedBinaryWeight(self.blocks, self.sums, self.shape[1])

    def train(self, mode: bool = True) -> _Packed:
        """Stays in eval mode: there is nothing to train."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(self.packed.new_empty(0, dtype=self.dtype)).dtype
        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "packed" in state_dict:
            zeros = prefix + "nonzero" in state_dict
            self._buffers["nonzero"] = self.packed.new_zeros(mask_size(self.shape)) if zeros else None
        before = len(args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(args[-1]) == before:
            self._prepare()


class PackedBinaryConv2d(_Packed):
    r"""A binary convolution for inference, as :func:`convert_` makes it.

    Its sums of signs are exact, and what follows (see :class:`Epilogue`) is computed operation by operation as the
    replaced layers compute it. In float32, where torch's norm multiplies and adds in one rounding (x86-64 with FMA),
    the output is theirs bit by bit; only a bias inside ReCU's scaling is rounded otherwise. With ``signs_for`` the
    layer gives the :class:`PackedSigns` of the output instead; these are the signs that the replaced layers compute,
    for their thresholds are found by running these layers on every whole number there can be.

    Args:
        layer: a trained :class:`BinaryConv2d`, :class:`ReSTEConv2d` or :class:`ReCUConv2d` whose input is binarised.
        norm: a ``torch.nn.BatchNorm2d`` with running statistics that follows.
        relu: a ReLU comes between the two.
        activation: what follows norm and residual: None; a ``torch.nn.Hardtanh`` from -1 to 1; a ``torch.nn.PReLU``,
            or a ``torch.nn.Sequential`` of one with a :class:`ChannelBias` before it, after it or both.
        before: added to the input before its signs are taken, C elements.
        signs_for: groups of the binary convolution that alone takes the output; None for a map of numbers.

    Shape:
        ``(N, C, H, W)`` or :class:`PackedSigns`, and a residual of the output's shape, to ``(N, O, H', W')`` in
        channels-last memory format.

    Raises:
        TypeError, ValueError: an argument is not as stated, or the signs do not grow or fall with the whole numbers.
    """

    before: Tensor | None
    thresholds: Tensor | None

    def __init__(
        self,
        layer: BinaryConv2d | ReCUConv2d,
        norm: nn.BatchNorm2d | None = None,
        *,
        relu: bool = False,
        activation: nn.Module | None = None,
        before: Tensor | None = None,
        signs_for: int | None = None,
    ) -> None:
        super().__init__()
        name = "PackedBinaryConv2d"
        if not isinstance(layer, (BinaryConv2d, ReCUConv2d)):
            raise TypeError(f"{name}: layer must be a binary convolution, got {type(layer).__name__}")
        if not layer.takes_signs:
            raise ValueError(f"{name}: layer must binarise its input, got one that takes it as it is")
        if norm is not None and (norm.num_features != layer.out_channels or norm.running_mean is None):
            raise ValueError(f"{name}: norm must have {layer.out_channels} channels and running statistics")
        self._configure(layer, layer.groups)
        self.stride, self.padding, self.dilation = check_window(name, layer.stride, _amounts(layer), layer.dilation)
        self.fused, self.signs_for = norm is not None, signs_for
        self.register_buffer("before", None if before is None else before.detach().float().flatten().clone())
        rows = thresholds = None
        if signs_for is None:
            self.relu = relu
            rows, self.activation = _rows(layer, norm, relu, activation)
            rows = rows[self._used_rows()].clone()
        else:
            thresholds = _thresholds(layer, norm, relu, activation)
        self.register_buffer("rows", rows)
        self.register_buffer("thresholds", thresholds)
        self._prepare()
        self.eval()

    def forward(self, input: Tensor | PackedSigns, residual: Tensor | None = None) -> Tensor | PackedSigns:
        name, dtype = "PackedBinaryConv2d", self.dtype
        if isinstance(input, Tensor):
            dtype = input.dtype
            if dtype not in DTYPES:
                raise TypeError(f"{name}: input must be float16, bfloat16 or float32, got {dtype}")
            before = None if self.before is None else self.before.to(dtype)
            input = pack_signs(input, before, self.groups)
        words, channels = input
        if channels != self.shape[1] * self.groups or words.shape[4] != self.groups:
            raise ValueError(
                f"{name}: input must have {self.shape[1] * self.groups} channels in {self.groups} groups, "
                f"got {channels} in {words.shape[4]}"
            )
        weight, window = self.packed_weight(), (self.stride, self.padding, self.dilation)
        if self.thresholds is not None:
            assert self.signs_for is not None
            if residual is not None:
                raise ValueError(f"{name}: residual must be None where the layer gives signs, got a tensor")
            return convolve_to_signs(name, words, weight, window, self.thresholds, self.signs_for)
        assert self.full_rows is not None
        end = Epilogue(self.full_rows, self.relu, self.activation)
        return convolve(name, words, weight, window, end, residual, dtype if residual is None else residual.dtype)

    def extra_repr(self) -> str:
        outputs, inputs, *kernel = self.shape
        gives = "numbers" if self.signs_for is None else "signs"
        return (
            f"{inputs * self.groups}, {outputs}, kernel_size={tuple(kernel)}, stride={tuple(self.stride)}, "
            f"padding={tuple(self.padding)}, groups={self.groups}, fused={self.fused}, gives={gives}"
        )


class PackedBinaryLinear(_Packed):
    """A :class:`BinaryLinear` for inference, as :func:`convert_` makes it; see :class:`PackedBinaryConv2d`.

    Args:
        layer: trained, of binarised input.

    Shape:
        as ``torch.nn.Linear``.

    Raises:
        TypeError, ValueError: ``layer`` or the input is not as stated.
    """

    def __init__(self, layer: BinaryLinear) -> None:
        super().__init__()
        if not isinstance(layer, BinaryLinear):
            raise TypeError(f"PackedBinaryLinear: layer must be a BinaryLinear, got {type(layer).__name__}")
        if not layer.takes_signs:
            raise ValueError("PackedBinaryLinear: layer must binarise its input, got one that takes it as it is")
        self._configure(layer, 1)
        self.register_buffer("rows", _rows(layer, None, False, None)[0][:2].clone())
        self._prepare()
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        return multiply("PackedBinaryLinear", input, self.packed_weight(), self.rows)

    def extra_repr(self) -> str:
        return f"{self.shape[1]}, {self.shape[0]}"


class PackedWeightConv2d(_Packed):
    """A :class:`BinaryConv2d` that takes its input as it is: its weight is stored in bits, and it computes in float.

    Args:
        layer: trained.

    Shape:
        as ``torch.nn.Conv2d``.

    Raises:
        TypeError: ``layer`` or the input is not as stated.
    """

    def __init__(self, layer: BinaryConv2d) -> None:
        super().__init__()
        if not isinstance(layer, BinaryConv2d):
            raise TypeError(f"PackedWeightConv2d: layer must be a BinaryConv2d, got {type(layer).__name__}")
        self._configure(layer, layer.groups)
        self.stride, self.padding, self.dilation = layer.stride, _amounts(layer), layer.dilation
        self.register_buffer("rows", _rows(layer, None, False, None)[0][:2].clone())
        self._prepare()
        self.eval()

    def _prepare(self) -> None:
        self.register_buffer("signs", self.signs_of_weight(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        check_floating("PackedWeightConv2d", input=input)
        assert self.rows is not None
        factor, addend = self.rows.to(input.dtype)
        weight = self.signs.to(input.dtype) * factor.view(-1, 1, 1, 1)
        return F.conv2d(input, weight, addend, self.stride, self.padding, self.dilation, self.groups)


@torch.no_grad()
def _rows(
    layer: BinaryLayer, norm: nn.BatchNorm2d | None, relu: bool, activation: nn.Module | None
) -> tuple[Tensor, str]:
    """All rows of the epilogue, and the name of its activation."""
    scale, shift = layer.affine()
    rows = dict(zip(ROWS, torch.zeros(len(ROWS), len(scale), device=scale.device), strict=True))
    gain, offset = (torch.ones_like(scale), torch.zeros_like(scale)) if norm is None else _affine_of(norm)
    rows |= {"scale": scale, "shift": shift, "gain": gain, "offset": offset}
    name = "none"
    if is_hardtanh(activation):
        name = "hardtanh"
    elif activation is not None:
        name = "prelu"
        rows |= {key: row.flatten().expand(len(scale)) for key, row in _prelu_rows(activation).items()}
    return torch.stack([rows[key].float() for key in ROWS]), name


def _affine_of(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and addend that torch makes of the norm, by what it does to 0, and to 1 where nothing is added."""
    assert norm.running_mean is not None
    zero = torch.zeros_like(norm.running_mean)[None, :, None, None]

    def result(x: Tensor, mean: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, norm.running_var, norm.weight, bias, False, 0.0, norm.eps).flatten()

    return result(zero + 1, zero.flatten(), None), result(zero, norm.running_mean, norm.bias)


def _prelu_rows(activation: nn.Module) -> dict[str, Tensor]:
    parts: list[Any] = list(activation) if isinstance(activation, nn.Sequential) else [activation]
    rows: dict[str, Tensor] = {}
    if parts and isinstance(parts[0], ChannelBias):
        rows["before"] = parts.pop(0).bias
    if parts and isinstance(parts[-1], ChannelBias):
        rows["after"] = parts.pop().bias
    if len(parts) != 1 or not isinstance(parts[0], nn.PReLU):
        raise ValueError(
            "activation must be a Hardtanh from -1 to 1, or a PReLU that may have ChannelBias around it, "
            f"got {activation}"
        )
    return rows | {"slope": parts[0].weight}


def is_hardtanh(module: Any) -> bool:
    """From -1 to 1, as the epilogue has it; also alone in a ``Sequential``."""
    if isinstance(module, nn.Sequential) and len(module) == 1:
        module = module[0]
    return isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (-1, 1)


@torch.no_grad()
def _thresholds(
    layer: BinaryConv2d | ReCUConv2d, norm: nn.BatchNorm2d | None, relu: bool, activation: nn.Module | None
) -> Tensor:
    """Where the sign of what the layers make of a whole number changes, by trying all of them."""
    terms = layer.weight[0].numel()
    y = torch.arange(-terms, terms + 1, dtype=layer.weight.dtype, device=layer.weight.device)
    y = layer.rescale(y.view(-1, 1, 1, 1).expand(-1, layer.out_channels, 1, 1))
    y = F.relu(y) if relu else y
    if norm is not None:
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    y = y if activation is None else activation(y)
    signs = torch.sign(y).flatten(1).int()  # (2 terms + 1, O)
    direction = torch.where(signs[-1] < signs[0], -1, 1).int()
    signs = signs * direction
    if bool((signs[1:] < signs[:-1]).any()):
        raise ValueError("the signs of the output must grow or fall with the sums, got neither")
    lower, upper = (signs < 0).sum(0) - terms, (signs <= 0).sum(0) - terms - 1
    return torch.stack([direction, lower.int(), upper.int()])
