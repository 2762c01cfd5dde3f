"""What the super-resolution networks share: layers with or without quantisers, the upsampler, the feature loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor import fake_quantize_add
from tersor._checks import as_int, check_floating, check_same
from tersor.quantization import BoundedActivation, QuantizedConv2d

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, as in the published EDSR


class PassThrough(nn.Module):
    """Stands where a full-precision network has no :class:`BoundedActivation`; adds no keys."""

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        return torch.relu(input) if relu else input


class LayerFactory:
    """Makes a network's convolutions and activations, quantised or, for the teacher, not.

    Args:
        quantized: False makes plain convolutions and no activations.
        bits: of weights and activations.
        mode: of the weights, see :func:`tersor.weight_fake_quantize`.
        activation: options of :class:`BoundedActivation`.
    """

    def __init__(self, quantized: bool, bits: int, mode: str, activation: Mapping[str, Any]) -> None:
        self.quantized, self.bits, self.mode, self.options = bool(quantized), bits, mode, dict(activation)

    def conv(self, before: int, after: int, kernel_size: int = 3, bias: bool = True) -> nn.Conv2d:
        """A convolution that keeps the image's size."""
        options: dict[str, Any] = {"padding": kernel_size // 2, "bias": bias}
        if self.quantized:
            return QuantizedConv2d(before, after, kernel_size, bits=self.bits, mode=self.mode, **options)
        return nn.Conv2d(before, after, kernel_size, **options)

    def activation(self, channels: int) -> nn.Module:
        return BoundedActivation(channels, self.bits, **self.options) if self.quantized else PassThrough()


class SuperResolution(nn.Module):
    """Base of the networks: ``(N, 3, H, W)`` images of values 0 to 255 to ``(sr, feature)``.

    ``sr`` is ``(N, 3, scale * H, scale * W)``, not clipped to 0..255; ``feature`` is the ``(N, C, H, W)`` map that
    enters the tail, which :func:`attention_transfer` compares with the teacher's.
    """

    scale: int

    def quantized_pairs(self) -> Iterator[tuple[str, str, bool]]:
        """See :func:`quantized_pairs`."""
        return quantized_pairs(self)

    @staticmethod
    def student_key(key: str) -> str:
        """The quantised network's key for a full-precision network's key."""
        return key

    def check_input(self, input: Tensor) -> None:
        name = type(self).__name__
        check_floating(name, input=input)
        if input.dim() != 4 or input.shape[1] != 3 or not input.numel():
            raise ValueError(
                f"{name}: input must be (N, 3, H, W) with at least one pixel, got shape {tuple(input.shape)}"
            )


def quantized_pairs(module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Which convolutions see only the output of one activation, so that a kernel may compute both from its codes.

    Yields:
        (name of the :class:`BoundedActivation`, name of the :class:`QuantizedConv2d`, whether a ReLU comes before the
        activation), relative to ``module``. Layers that do not quantise (``bits=32``) are left out.
    """
    for prefix, child in module.named_modules():
        for activation, layer, relu in getattr(child, "pairs", ()):
            first, second = child.get_submodule(activation), child.get_submodule(layer)
            if isinstance(first, BoundedActivation) and isinstance(second, QuantizedConv2d) and first.bits != 32:
                dot = f"{prefix}." if prefix else ""
                yield f"{dot}{activation}", f"{dot}{layer}", relu


def activated(activation: nn.Module, layer: nn.Module, input: Tensor, relu: bool = False) -> Tensor:
    """``layer(activation(input))``, of ``relu(input)`` if so asked.

    A layer with a true attribute ``quantizes_input`` takes ``(input, relu=relu)`` as they are instead: a converted
    layer quantises on its own.
    """
    if getattr(layer, "quantizes_input", False):
        return layer(input, relu=relu)
    return layer(activation(input, relu=relu))


def activated_and_kept(activation: nn.Module, layer: nn.Module, input: Tensor) -> tuple[Tensor, Tensor]:
    """``activation(input)``, for other uses, and what :func:`activated` returns."""
    kept = activation(input)
    return kept, layer(input, relu=False) if getattr(layer, "quantizes_input", False) else layer(kept)


def activated_sum(activation: nn.Module, input: Tensor, other_activation: nn.Module, other: Tensor) -> Tensor:
    """``activation(input) + other_activation(other)``, in one pass over both where both quantise alike."""
    if (
        isinstance(activation, BoundedActivation)
        and isinstance(other_activation, BoundedActivation)
        and activation.bits != 32
        and activation.stage == other_activation.stage
        and activation.stage in ("static", "dynamic")
        and (activation.bits, activation.tie) == (other_activation.bits, other_activation.tie)
        and input.dtype == other.dtype
    ):
        bounds, other_bounds = activation.bounds(input), other_activation.bounds(other)
        return fake_quantize_add(input, other, *bounds, *other_bounds, bits=activation.bits, tie=activation.tie)
    return activation(input) + other_activation(other)


def upsampler(before: int, after: int, scale: int) -> list[nn.Module]:
    """From ``before`` to ``after`` channels: convolution and pixel shuffle for each factor 2, or once for 3."""
    layers: list[nn.Module] = []
    for factor in (3,) if scale == 3 else (2,) * int(math.log2(scale)):
        layers += [nn.Conv2d(before, after * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
        before = after
    return layers


def check_scale(where: str, scale: int, allowed: Sequence[int]) -> int:
    scale = as_int(where, scale=scale)
    if scale not in allowed:
        raise ValueError(f"{where}: scale must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}, got {scale}")
    return scale


def check_sizes(where: str, **sizes: int) -> None:
    """Every named number of layers or channels is a positive int."""
    for name, size in sizes.items():
        if as_int(where, **{name: size}) < 1:
            raise ValueError(f"{where}: {name} must be at least 1, got {size}")


def attention_transfer(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    r"""How far the student attends to other places than the teacher does; from 0 to 2 / (H W).

    With a(F) = the mean of F^2 over the channels, flattened and divided by its Euclidean norm, per sample: the mean
    over samples and places of (a(student) - a(teacher))^2. DDTB adds 1000 times this to the L1 loss.

    Args:
        student_feature, teacher_feature: ``(N, C, H, W)`` each, the numbers of channels may differ.

    Returns:
        A scalar. The teacher's feature gets a gradient too, if it asks for one.

    Raises:
        TypeError, ValueError: not floating-point maps of the same samples and size.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", arXiv 1612.03928.
    """
    name = "attention_transfer"
    check_floating(name, student_feature=student_feature, teacher_feature=teacher_feature)
    for argument, feature in (("student_feature", student_feature), ("teacher_feature", teacher_feature)):
        if feature.dim() != 4 or not feature.numel():
            raise ValueError(f"{name}: {argument} must be (N, C, H, W) and not empty, got shape {tuple(feature.shape)}")
    student, teacher = (feature.square().mean(1) for feature in (student_feature, teacher_feature))
    check_same(name, student_feature=student, teacher_feature=teacher)
    student, teacher = (F.normalize(attention.flatten(1)) for attention in (student, teacher))
    return (student - teacher).square().mean()


def load_full_precision(student: SuperResolution, state: Mapping[str, Tensor]) -> None:
    """Loads a full-precision network's weights into its quantised version; bounds and gates stay as they are.

    Where the two networks' keys differ (in EDSR ``body.i.body.2`` becomes ``body.i.body.3``) they are renamed.

    Args:
        student: receives the weights in place.
        state: the full-precision network's state dict.

    Raises:
        TypeError: ``student`` is not one of these networks.
        RuntimeError: keys or shapes do not match the student's; then nothing is loaded.
    """
    if not isinstance(student, SuperResolution):
        raise TypeError(f"load_full_precision: student must be EDSR, RDN or SRResNet, got {type(student).__name__}")
    state = {student.student_key(key): value for key, value in state.items()}
    own = student.state_dict()
    names = [name for name, m in student.named_modules(remove_duplicate=False) if isinstance(m, BoundedActivation)]
    prefixes = tuple(f"{name}." for name in names)
    expected = {key for key in own if not key.startswith(prefixes)}
    shapes = [f"{k} {tuple(state[k].shape)}" for k in sorted(expected & set(state)) if state[k].shape != own[k].shape]
    for what, wrong in (
        ("has not", sorted(expected - set(state))),
        ("must not have", sorted(set(state) - expected)),
        ("has in another shape", shapes),
    ):
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise RuntimeError(f"load_full_precision: the checkpoint {what} {', '.join(wrong[:4])}{more}")
    student.load_state_dict(state, strict=False)
