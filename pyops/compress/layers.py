"""Convolution and linear layer in training with everything that a recipe can ask of a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.compress.quantizers import FreezingWeight, InputBounds, LsqWeight, PercentileWeight
from tersor.compress.transforms import FakeQuantize, Freeze, NMSparse, Transform
from tersor.freezing.freeze_plan import FreezePlan, freeze_plan
from tersor.freezing.frozen_conv2d import frozen_conv2d
from tersor.freezing.frozen_linear import frozen_linear
from tersor.sparsity.layers import NMScores
from tersor.sparsity.srste_sparsify import srste_sparsify


class CompressedLayer:
    """What the compressed layers add to torch's; not a module, so that ``weight`` and ``bias`` keep their keys.

    The weight is sparsified and rounded on each forward pass. Rounding comes before the scores of ``"lbc"``, whose
    zeros need no level; after the dropping of ``"srste"``, which looks at the weight itself.
    """

    weight: Tensor
    bias: Any  # of torch's layers: a tensor or None
    training: bool
    quantize_input: InputBounds | None
    quantize_weight: LsqWeight | PercentileWeight | FreezingWeight | None
    scores: NMScores | None
    plan: FreezePlan | None
    skippable: Tensor | None  # what was frozen when the plan was made: a resumed run makes the same one of it

    def _configure(self, transforms: Iterable[Transform]) -> None:
        found: dict[type[Any], Any] = {type(transform): transform for transform in transforms}
        self.quantization: FakeQuantize | None = found.get(FakeQuantize)
        self.sparsity: NMSparse | None = found.get(NMSparse)
        self.freezing: Freeze | None = found.get(Freeze)
        self.quantize_input = self.quantize_weight = self.scores = self.plan = None
        if self.quantization is not None:
            self.quantize_weight = _weight_quantizer(self.weight, self.quantization)
            if self.quantization.bits_of_input != 32:
                bounds = InputBounds(self.quantization.bits_of_input, self.quantization.percentile)
                self.quantize_input = bounds.to(self.weight.device, _exact(self.weight.dtype))
        if self.sparsity is not None and self.sparsity.method == "lbc":
            self.scores = NMScores(self.weight, self.sparsity.n, self.sparsity.m)
        frozen = self.quantize_weight.frozen if isinstance(self.quantize_weight, FreezingWeight) else None
        skippable = None if frozen is None or self.freezing is None else torch.zeros_like(frozen)
        nn.Module.register_buffer(self, "skippable", skippable)  # type: ignore[arg-type]
        if skippable is not None:
            nn.Module.register_load_state_dict_post_hook(self, _plan_again)  # type: ignore[arg-type]

    def compressed_weight(self) -> Tensor:
        """The weight that the product is computed with."""
        weight = self.sparsified_weight()
        if self.quantize_weight is not None:
            weight = self.quantize_weight(weight)
        return weight if self.scores is None else self.scores(weight)

    def sparsified_weight(self) -> Tensor:
        """The weight that is rounded: without those that "srste" drops."""
        sparse = self.sparsity
        if sparse is None or sparse.method != "srste":
            return self.weight
        return srste_sparsify(self.weight, sparse.n, sparse.m, sparse.decay)

    def compressed_input(self, input: Tensor) -> Tensor:
        return input if self.quantize_input is None else self.quantize_input(input)

    def refresh_plan(self) -> None:
        """Looks at what is frozen; the backward pass leaves it out from now on."""
        if self.skippable is None:
            return
        assert isinstance(self.quantize_weight, FreezingWeight)
        self.skippable.copy_(self.quantize_weight.frozen)
        self.make_plan()

    def make_plan(self) -> None:
        """Of what was frozen at the last look."""
        if self.skippable is None:
            return
        assert self.freezing is not None
        border = getattr(self, "_reversed_padding_repeated_twice", [0] * 4)
        if border[0] == border[1] and border[2] == border[3]:  # frozen_conv2d pads as much on either side
            groups = getattr(self, "groups", 1)
            self.plan = freeze_plan(self.skippable, self.weight.shape, self.freezing.tile, groups=groups)

    @property
    def skips(self) -> bool:
        """Whether the backward pass leaves something out."""
        return self.training and self.plan is not None and self.plan.level != "dense"

    def describe(self) -> str:
        return ", ".join(str(each) for each in (self.quantization, self.sparsity, self.freezing) if each is not None)


def _plan_again(layer: Any, incompatible: Any) -> None:
    if not layer.skippable.is_meta:
        layer.make_plan()


class CompressedConv2d(CompressedLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` whose weight and input are rounded, sparsified and frozen as the transforms say.

    :func:`tersor.compress.prepare_` makes these of a model's layers and :func:`tersor.compress.step` moves them on.
    ``weight`` and ``bias`` are those of ``torch.nn.Conv2d``, in the state dict too.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``.
        transforms: :class:`FakeQuantize`, :class:`NMSparse`, :class:`Freeze`.
    """

    def __init__(self, *args: Any, transforms: Iterable[Transform], **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._configure(transforms)

    def forward(self, input: Tensor) -> Tensor:
        input, weight = self.compressed_input(input), self.compressed_weight()
        if not self.skips:
            return self._conv_forward(input, weight, self.bias)
        if self.padding_mode == "zeros":
            amounts = self._reversed_padding_repeated_twice[::-2]
        else:
            input, amounts = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), [0, 0]
        return frozen_conv2d(input, weight, self.bias, self.stride, amounts, self.dilation, self.groups, plan=self.plan)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"


class CompressedLinear(CompressedLayer, nn.Linear):
    """``torch.nn.Linear`` whose weight and input are rounded, sparsified and frozen; see :class:`CompressedConv2d`."""

    def __init__(self, *args: Any, transforms: Iterable[Transform], **kwargs: Any) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._configure(transforms)

    def forward(self, input: Tensor) -> Tensor:
        input, weight = self.compressed_input(input), self.compressed_weight()
        if not self.skips:
            return F.linear(input, weight, self.bias)
        return frozen_linear(input, weight, self.bias, plan=self.plan)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.describe()}"


def compressed(layer: nn.Conv2d | nn.Linear, transforms: Iterable[Transform]) -> CompressedConv2d | CompressedLinear:
    """A compressed layer with the very parameters, hooks apart, of a plain one."""
    options: dict[str, Any] = {"device": "meta", "dtype": layer.weight.dtype, "bias": layer.bias is not None}
    options["transforms"] = ()
    made: Any
    if isinstance(layer, nn.Conv2d):
        window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        options["padding_mode"] = layer.padding_mode
        made = CompressedConv2d(layer.in_channels, layer.out_channels, *window, **options)
    else:
        made = CompressedLinear(layer.in_features, layer.out_features, **options)
    made.weight, made.bias = layer.weight, layer.bias
    made._configure(transforms)
    return made.train(layer.training)


def _weight_quantizer(weight: Tensor, options: FakeQuantize) -> LsqWeight | PercentileWeight | FreezingWeight:
    if options.method == "lsq":
        return LsqWeight(weight.detach(), options.bits)
    if options.method == "ddtb":
        return PercentileWeight(options.bits)
    return FreezingWeight(weight.detach(), options.bits)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
