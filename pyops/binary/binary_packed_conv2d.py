"""Convolution of signs with signs by exclusive or and counting of bits, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor._batching import one_by_one
from tersor._checks import as_int, check_floating, check_window
from tersor._operator import operator
from tersor._window import check_fits, output_sizes
from tersor.binary.pack_signs import WORD, PackedSigns, words_of
from tersor.binary.unpack_signs import _reference as unpack_words
from tersor.binary.unpack_signs import check_signs

BLOCK = 8  # output channels that lie together in a packed weight
MOST_TERMS = 2**23  # of one sum, which float32 holds
ACTIVATIONS = ("none", "hardtanh", "prelu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = ("scale", "shift", "gain", "offset", "before", "slope", "after")


class PackedBinaryWeight(NamedTuple):
    """The signs of a weight ``(O, C / groups, KH, KW)`` as the kernels read them; from :func:`pack_binary_weight`.

    Attributes:
        blocks: int64 ``(planes, groups, ceil(O / groups / 8), KH, KW, ceil(C / groups / 64), 8)``: the words of
            :class:`PackedSigns` with 8 output channels side by side, 0 beyond them. One plane where no weight is zero,
            else two.
        sums: int32 ``(O, KH, KW)``: how many weights are positive.
        channels: C / groups.
    """

    blocks: Tensor
    sums: Tensor
    channels: int


class Epilogue(NamedTuple):
    r"""What :func:`binary_packed_conv2d` does to its whole numbers s, channel by channel, in float32.

    .. math:: y = scale \cdot s + shift, \quad [y \leftarrow \max(y, 0)], \quad
        y \leftarrow gain \cdot y + offset, \quad y \leftarrow y + residual,

    the bracket with ``relu`` only; then the activation: none, hardtanh(y), or with z = y + before
    (z > 0 ? z : slope z) + after. Each operation is rounded once, gain y + offset as a whole (as torch's norms do).

    Attributes:
        rows: float32 ``(7, O)``: scale, shift, gain, offset, before, slope, after.
        relu: whether the part in brackets is done.
        activation: ``"none"``, ``"hardtanh"`` or ``"prelu"``.
    """

    rows: Tensor
    relu: bool = False
    activation: str = "none"


def epilogue(
    outputs: int,
    *,
    relu: bool = False,
    activation: str = "none",
    device: torch.device | None = None,
    **rows: Tensor,
) -> Epilogue:
    """An :class:`Epilogue` of the named rows, each ``(O,)`` or of one element; the others change nothing."""
    if unknown := sorted(set(rows) - set(ROWS)):
        raise TypeError(f"epilogue: rows are {', '.join(ROWS)}, got {', '.join(unknown)}")
    given = []
    for name in ROWS:
        default = torch.tensor(float(name in ("scale", "gain")), device=device)
        row = rows.get(name, default).detach().float().reshape(-1)
        if row.numel() not in (1, outputs):
            raise ValueError(f"epilogue: {name} must have 1 or {outputs} elements, got shape {tuple(rows[name].shape)}")
        given.append(row.expand(outputs))
    result = Epilogue(torch.stack(given), bool(relu), activation)
    _check_epilogue("epilogue", result, outputs)
    return result


make_epilogue = epilogue  # by another name where an argument is called so


def pack_binary_weight(weight: Tensor, groups: int = 1) -> PackedBinaryWeight:
    """Packs the signs of a weight ``(O, C / groups, KH, KW)``.

    Raises:
        TypeError: ``weight`` is not a floating-point tensor.
        ValueError: its shape does not fit ``groups``, or there are more than 2^23 weights for an output channel.
    """
    name = "pack_binary_weight"
    check_floating(name, weight=weight)
    groups = as_int(name, groups=groups)
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(f"{name}: weight must be (O, C / groups, KH, KW), not empty, got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({weight.shape[0]}), got {groups}")
    if weight[0].numel() > MOST_TERMS:
        raise ValueError(
            f"{name}: weight must have at most {MOST_TERMS} weights for an output, got {weight[0].numel()}"
        )
    weight = weight.detach()
    signs = weight.permute(0, 2, 3, 1)
    words = torch.stack([words_of(signs > 0, 1), words_of((signs > 0) | (signs < 0), 1)]).squeeze(-2)
    planes = 1 if bool(((weight > 0) | (weight < 0)).all()) else 2
    return PackedBinaryWeight(_blocks(words[:planes], groups), _sums(weight), weight.shape[1])


def _blocks(words: Tensor, groups: int) -> Tensor:
    """Of words ``(planes, O, KH, KW, words)``."""
    words = words.unflatten(1, (groups, -1))
    padded = F.pad(words, (0, 0, 0, 0, 0, 0, 0, -words.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK))
    return padded.permute(0, 1, 2, 4, 5, 6, 3).contiguous()


def _sums(weight: Tensor) -> Tensor:
    return (weight > 0).sum(1, dtype=torch.int32)


def binary_packed_conv2d(
    signs: PackedSigns,
    weight: PackedBinaryWeight,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """The convolution of two maps of signs, in whole numbers, and an :class:`Epilogue` in float32.

    The whole numbers are exact: they equal ``conv2d`` of the two maps of -1, 0 and 1. The padding stands for 0.

    Args:
        signs: from :func:`pack_signs` with the weight's groups.
        weight: from :func:`pack_binary_weight`.
        stride, padding, dilation: as for ``torch.nn.functional.conv2d``.
        epilogue: None returns the whole numbers.
        residual: ``(N, O, H', W')`` of ``dtype``, any strides; added where the epilogue says.
        dtype: of the output, to which it is rounded once: float16, bfloat16 or float32.
        channels_last: the output's memory format.

    Returns:
        ``(N, O, H', W')``. Has no derivative: a backward pass through it is an error.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "binary_packed_conv2d"
    window = _check(name, signs, weight, stride, padding, dilation)
    if dtype not in DTYPES:
        raise TypeError(f"{name}: dtype must be float16, bfloat16 or float32, got {dtype}")
    outputs = weight.sums.shape[0]
    if epilogue is not None:
        _check_epilogue(name, epilogue, outputs)
        _check_device(name, signs, epilogue=epilogue.rows)
    if residual is not None:
        epilogue = epilogue or make_epilogue(outputs, device=signs.words.device)
    return convolve(name, signs.words, weight, window, epilogue, residual, dtype, bool(channels_last))


def convolve(
    where: str,
    words: Tensor,
    weight: PackedBinaryWeight,
    window: Sequence[list[int]],
    epilogue: Epilogue | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool = True,
) -> Tensor:
    """:func:`binary_packed_conv2d` of what has been checked but for the input's size and the residual."""
    sizes = _sizes(words, weight.sums, *window)
    if min(sizes) < 1:
        _check_fits(where, words, weight, window)
    if residual is not None:
        check_floating(where, residual=residual)
        shape = (words.shape[1], weight.sums.shape[0], *sizes)
        if residual.shape != shape or residual.dtype != dtype:
            raise ValueError(
                f"{where}: residual must be {dtype} of shape {tuple(shape)}, got {residual.dtype} of shape "
                f"{tuple(residual.shape)}"
            )
        if residual.device != words.device:
            raise ValueError(f"{where}: residual must be on the device of signs {words.device}, got {residual.device}")
        residual = residual.detach()
    rows, relu, activation = epilogue or (None, False, "none")
    end = (rows, relu, activation, residual, dtype, channels_last)
    return _binary_packed_conv2d.without_gradient(words, *weight, *window, *end)


def convolve_to_signs(
    where: str,
    words: Tensor,
    weight: PackedBinaryWeight,
    window: Sequence[list[int]],
    thresholds: Tensor,
    groups: int,
) -> PackedSigns:
    """:func:`binary_packed_conv2d_signs` of what has been checked but for the input's size."""
    _check_fits(where, words, weight, window)
    result = _binary_packed_conv2d_signs.without_gradient(words, *weight, *window, thresholds, groups)
    return PackedSigns(result, weight.sums.shape[0])


def _check_fits(where: str, words: Tensor, weight: PackedBinaryWeight, window: Sequence[list[int]]) -> None:
    _, batch, height, width, groups, _ = words.shape
    check_fits(where, (batch, weight.channels * groups, height, width), weight.sums.shape[1:], *window)


def binary_packed_conv2d_signs(
    signs: PackedSigns,
    weight: PackedBinaryWeight,
    thresholds: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    *,
    groups: int = 1,
) -> PackedSigns:
    """As :func:`binary_packed_conv2d`, with signs for an output, so that binary layers in a row pass bits only.

    With the whole number s of an output channel and its thresholds (direction, lower, upper), the sign is
    ``direction * ((s > upper) - (s < lower))``.

    Args:
        signs, weight, stride, padding, dilation: as for :func:`binary_packed_conv2d`.
        thresholds: int32 ``(3, O)``: direction 1 or -1, lower, upper, with lower <= upper + 1.
        groups: of the convolution that takes the output.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name = "binary_packed_conv2d_signs"
    window = _check(name, signs, weight, stride, padding, dilation)
    outputs, groups = weight.sums.shape[0], as_int(name, groups=groups)
    if not isinstance(thresholds, Tensor) or thresholds.dtype != torch.int32:
        given = thresholds.dtype if isinstance(thresholds, Tensor) else type(thresholds).__name__
        raise TypeError(f"{name}: thresholds must be a tensor of int32, got {given}")
    if thresholds.shape != (3, outputs):
        raise ValueError(f"{name}: thresholds must be (3, {outputs}), got shape {tuple(thresholds.shape)}")
    if groups < 1 or outputs % groups:
        raise ValueError(f"{name}: groups must divide the output channels ({outputs}), got {groups}")
    _check_device(name, signs, thresholds=thresholds)
    return convolve_to_signs(name, signs.words, weight, window, thresholds, groups)


def _check(
    where: str, signs: PackedSigns, weight: PackedBinaryWeight, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[int]]:
    check_signs(where, signs)
    if not isinstance(weight, PackedBinaryWeight):
        raise TypeError(f"{where}: weight must be a PackedBinaryWeight, got {type(weight).__name__}")
    channels = weight.channels * weight.blocks.shape[1]
    if signs.channels != channels or signs.words.shape[4] != weight.blocks.shape[1]:
        raise ValueError(
            f"{where}: signs must have {channels} channels in {weight.blocks.shape[1]} groups for this weight, "
            f"got {signs.channels} in {signs.words.shape[4]}"
        )
    _check_device(where, signs, weight=weight.blocks)
    return check_window(where, stride, padding, dilation)


def _check_device(where: str, signs: PackedSigns, **tensors: Tensor) -> None:
    device = signs.words.device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{where}: {name} must be on the device of signs {device}, got {tensor.device}")


def _check_epilogue(where: str, epilogue: Any, outputs: int) -> None:
    if not isinstance(epilogue, Epilogue):
        raise TypeError(f"{where}: epilogue must be an Epilogue, got {type(epilogue).__name__}")
    if epilogue.rows.shape != (len(ROWS), outputs) or epilogue.rows.dtype != torch.float32:
        raise ValueError(
            f"{where}: rows of the epilogue must be float32 ({len(ROWS)}, {outputs}), got {epilogue.rows.dtype} of "
            f"shape {tuple(epilogue.rows.shape)}"
        )
    if epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}, got {epilogue.activation!r}")


def _sizes(words: Tensor, sums: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    return output_sizes((words.shape[1], 1, *words.shape[2:4]), sums.shape[1:], stride, padding, dilation)


def unblock(blocks: Tensor, outputs: int, channels: int) -> Tensor:
    """The weight ``(O, C / groups, KH, KW)`` of -1, 0 and 1, float32."""
    words = blocks.permute(0, 1, 2, 6, 3, 4, 5).flatten(2, 3)[:, :, : outputs // blocks.shape[1]].flatten(1, 2)
    positive = words[0].unsqueeze(-2)
    nonzero = words[1].unsqueeze(-2) if words.shape[0] == 2 else torch.full_like(positive, -1)
    return unpack_words(torch.stack([positive, nonzero]), channels, torch.float32, False)


def whole_numbers(
    signs: Tensor, blocks: Tensor, sums: Tensor, channels: int, stride: Any, padding: Any, dilation: Any
) -> Tensor:
    """The sums as float32, which holds them; rounded, for a convolution by transforms has errors."""
    groups = blocks.shape[1]
    map, weight = unpack_words(signs, channels * groups, torch.float32, False), unblock(blocks, sums.shape[0], channels)
    return torch.round(F.conv2d(map, weight, None, stride, padding, dilation, groups))


def _reference(
    signs: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    rows: Tensor | None,
    relu: bool,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    y = whole_numbers(signs, weight, weight_sums, channels, stride, padding, dilation)
    if rows is not None:
        scale, shift, gain, offset, before, slope, after = rows.view(len(ROWS), -1, 1, 1)
        y = scale * y + shift
        y = torch.relu(y) if relu else y
        y = (gain.double() * y.double() + offset.double()).float()
        y = y if residual is None else y + residual.float()
        if activation == "hardtanh":
            y = F.hardtanh(y)
        elif activation == "prelu":
            y = torch.where(y + before > 0, y + before, slope * (y + before)) + after
    return y.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _reference_signs(
    signs: Tensor,
    weight: Tensor,
    weight_sums: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    thresholds: Tensor,
    groups: int,
) -> Tensor:
    s = whole_numbers(signs, weight, weight_sums, channels, stride, padding, dilation).permute(0, 2, 3, 1)
    direction, lower, upper = thresholds
    sign = direction * ((s > upper).int() - (s < lower).int())
    return torch.stack([words_of(sign > 0, groups), words_of(sign != 0, groups)])


def _fake(signs: Tensor, weight: Tensor, weight_sums: Tensor, channels: int, *args: Any) -> Tensor:
    *window, _, _, _, _, dtype, channels_last = args
    shape = (signs.shape[1], weight_sums.shape[0], *_sizes(signs, weight_sums, *window))
    format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=signs.device, memory_format=format)


def _fake_signs(signs: Tensor, weight: Tensor, weight_sums: Tensor, channels: int, *args: Any) -> Tensor:
    *window, _, groups = args
    words = (weight_sums.shape[0] // groups + WORD - 1) // WORD
    return signs.new_empty((2, signs.shape[1], *_sizes(signs, weight_sums, *window), groups, words))


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_binary_packed_conv2d.overload, info, in_dims, args)


def _vmap_signs(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(_binary_packed_conv2d_signs.overload, info, in_dims, args)


_WINDOW = "SymInt channels, int[] stride, int[] padding, int[] dilation"
_binary_packed_conv2d = operator(
    f"binary_packed_conv2d(Tensor signs, Tensor weight, Tensor weight_sums, {_WINDOW}, Tensor? rows, bool relu,"
    " str activation, Tensor? residual, ScalarType dtype, bool channels_last) -> Tensor",
    reference=_reference,
    fake=_fake,
    vmap=_vmap,
)
_binary_packed_conv2d_signs = operator(
    f"binary_packed_conv2d_signs(Tensor signs, Tensor weight, Tensor weight_sums, {_WINDOW}, Tensor thresholds,"
    " SymInt groups) -> Tensor",
    reference=_reference_signs,
    fake=_fake_signs,
    vmap=_vmap_signs,
)
