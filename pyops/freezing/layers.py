"""Layers that quantise their weight and input to few levels and freeze the weights that have settled."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.freezing.freeze_plan import FreezePlan, freeze_plan
from tersor.freezing.freeze_schedule import GRANULARITIES, GROWTHS, FreezeSchedule
from tersor.freezing.frozen_conv2d import frozen_conv2d
from tersor.freezing.frozen_linear import frozen_linear
from tersor.freezing.lts_quantize import LtsState, lts_quantize, lts_state
from tersor.freezing.mask import unpack_mask
from tersor.quantization._quantizer import check_bits, exact_dtype
from tersor.quantization.fake_quantize_bounds import fake_quantize_bounds


class _Bounds(nn.Module):
    """Two learned bounds that a first batch gives their values."""

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(type(self).__name__, bits)
        self.lower, self.upper = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.initializing = False

    @torch.no_grad()
    def _initialize(self, lower: Tensor, upper: Tensor) -> None:
        self.lower.copy_(lower)
        self.upper.copy_(upper)
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class UnitActivation(_Bounds):
    """Quantises to 2^bits levels in [0, 1] between learned bounds, see :func:`tersor.fake_quantize_bounds`.

    The bounds come from the first batch (:func:`initialize_`): lower = min, upper = 3 std / sqrt(1 - 2 / pi).

    Raises:
        ValueError: on the CPU, the bounds were never initialised, or ``lower >= upper``.

    Source: Zhong et al., arXiv 2211.08544.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.bits == 32:
            return input
        if self.initializing:
            _check_initial("input", input)
            self._initialize(input.amin(), 3 * input.std() / math.sqrt(1 - 2 / math.pi))
        return _explained(self, lambda: fake_quantize_bounds(input, self.lower, self.upper, self.bits, rule="unit"))


class LtsWeight(_Bounds):
    """Quantises a weight to 2^bits levels in [-1, 1] and freezes what has settled, see :func:`lts_quantize`.

    Usable as a parametrization (``torch.nn.utils.parametrize``) of any layer's weight. Everything that a run needs to
    resume is in the state dict, the step and the schedule's numbers among it.

    Args:
        weight: of the layer, for its shape, dtype and device.
        bits: 2 to 8; 32 for no quantisation.
        schedule: None never freezes, which is plain quantisation-aware training. May be set later.
        saved: keep the frozen weights' values apart, so that any optimiser may go on changing the raw ones. False with
            :class:`FrozenSGD` and :class:`FrozenAdamW`, which leave frozen weights alone.
        frozen_step: also keep in which step each weight froze.

    Source: Zhong et al., arXiv 2211.08544.
    """

    distance: Tensor
    code: Tensor
    frozen: Tensor
    counters: Tensor
    saved: Tensor | None
    frozen_step: Tensor | None
    settings: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        schedule: FreezeSchedule | None = None,
        *,
        saved: bool = True,
        frozen_step: bool = False,
    ) -> None:
        super().__init__(bits)
        for name, tensor in lts_state(weight.detach(), saved=saved, frozen_step=frozen_step)._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("settings", torch.zeros(len(_settings(None)), dtype=torch.float64))
        self.lower.data, self.upper.data = self.lower.to(self.distance), self.upper.to(self.distance)
        self.schedule = schedule
        self.register_load_state_dict_post_hook(_warn_of_other_settings)

    @property
    def schedule(self) -> FreezeSchedule | None:
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: FreezeSchedule | None) -> None:
        if schedule is not None and not isinstance(schedule, FreezeSchedule):
            raise TypeError(f"LtsWeight: schedule must be a FreezeSchedule or None, got {type(schedule).__name__}")
        self._schedule = schedule
        self.settings.copy_(torch.tensor(_settings(schedule), dtype=torch.float64))

    @property
    def state(self) -> LtsState:
        return LtsState(self.distance, self.code, self.frozen, self.counters, self.saved, self.frozen_step)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and casts; but the state stays contiguous and exact, whatever format and dtype the weight gets."""
        exact = {"distance": self.distance, "settings": self.settings}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            now = getattr(self, name)
            dtype = torch.float64 if name == "settings" else exact_dtype(now.dtype)
            if now.dtype != dtype:  # a detour through half precision would have rounded it
                setattr(self, name, before.to(now.device, dtype))
        for name in ("distance", "code", "saved", "frozen_step"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).contiguous())
        return self

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantize(weight, self.schedule)

    def quantize(self, weight: Tensor, schedule: FreezeSchedule | None) -> Tensor:
        """The quantised weight; a step of the schedule in training."""
        if self.bits != 32 and self.initializing:
            _check_initial("weight", weight)
            spread = 3 * weight.std()
            self._initialize(-spread, spread)
        schedule = schedule if self.training and not self.initializing else None
        return _explained(self, lambda: lts_quantize(weight, self.state, self.lower, self.upper, self.bits, schedule))

    @torch.no_grad()
    def effective(self, weight: Tensor) -> Tensor:
        """The weight that is quantised: where frozen, the saved one."""
        if self.saved is None:
            return weight
        return torch.where(unpack_mask(self.frozen, weight.shape), self.saved, weight)


def _check_initial(name: str, tensor: Tensor) -> None:
    if tensor.numel() < 2:
        raise ValueError(f"initialize_: {name} must have at least two elements for a deviation, got {tensor.numel()}")


def _explained(module: _Bounds, quantize: Any) -> Tensor:
    try:
        return quantize()
    except ValueError as error:
        if module.initialized or torch.compiler.is_compiling():
            raise
        raise ValueError(
            f"bounds not initialised: run tersor.freezing.initialize_(model, batch) first ({error})"
        ) from None


def _settings(schedule: FreezeSchedule | None) -> list[float]:
    """The schedule as numbers; all zero for none."""
    if schedule is None:
        return [0.0] * 10
    numbers = dataclasses.asdict(schedule)
    numbers["growth"] = GROWTHS.index(schedule.growth) + 1
    numbers["granularity"] = GRANULARITIES.index(schedule.granularity) + 1
    rows, columns = numbers.pop("tile")
    return [float(value) for value in (*numbers.values(), rows, columns)]


def _warn_of_other_settings(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, LtsWeight)
    wanted = _settings(module.schedule)
    if any(module.settings.tolist()) and any(wanted) and module.settings.tolist() != wanted:
        warnings.warn(
            f"the loaded state was made with another FreezeSchedule than {module.schedule}: its step "
            f"{int(module.counters[0])} goes on under the new one",
            stacklevel=2,
        )
    module.settings.copy_(torch.tensor(wanted, dtype=torch.float64))


def _forget_plan(layer: Any, incompatible: Any) -> None:
    layer.plan = layer._constant = None  # of another mask


class _Lts:
    """What the layers add to torch's."""

    weight: Tensor
    training: bool

    def _configure(self, bits: int, schedule: FreezeSchedule | None, saved: bool, frozen_step: bool) -> None:
        self.quantize_weight = LtsWeight(self.weight, bits, schedule, saved=saved, frozen_step=frozen_step)
        self.quantize_input = UnitActivation(bits)
        self.quantize_input.to(self.weight.device, self.quantize_weight.distance.dtype)
        self.plan: FreezePlan | None = None
        self._constant: tuple[Any, Tensor] | None = None
        nn.Module.register_load_state_dict_post_hook(self, _forget_plan)  # type: ignore[arg-type]

    def refresh_plan(self) -> FreezePlan:
        """Looks at the mask and skips from now on what is frozen, see :func:`refresh_`."""
        schedule = self.quantize_weight.schedule
        tile = (64, 64) if schedule is None else schedule.tile
        groups = getattr(self, "groups", 1)
        self.plan = freeze_plan(self.quantize_weight.frozen, self.weight.shape, tile, groups=groups)
        return self.plan

    def _quantized_weight(self) -> Tensor:
        schedule = self.quantize_weight.schedule
        if self.plan is not None and self.plan.level == "layer":
            schedule = None  # nothing is left to freeze
            if self.training and not torch.compiler.is_compiling():
                return self._constant_weight()
        return self.quantize_weight.quantize(self.weight, schedule)

    def _constant_weight(self) -> Tensor:
        """The quantised weight of a layer that is frozen as a whole, kept until something it comes from changes."""
        sources = self.weight, self.quantize_weight.lower, self.quantize_weight.upper
        key = [(t._version, t.data_ptr(), t.dtype) for t in sources]
        if self._constant is None or self._constant[0] != key:
            with torch.no_grad():
                self._constant = key, self.quantize_weight.quantize(self.weight, None)
        return self._constant[1]


class LtsConv2d(_Lts, nn.Conv2d):
    """``torch.nn.Conv2d`` with weight and input quantised to few levels, which are not scaled back.

    The zero padding is applied to the quantised input, where 0 is the level of the lower bound. Run
    :func:`initialize_` once before the first step; :func:`refresh_` from time to time makes the backward pass skip
    what is frozen.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``.
        bits, schedule, saved, frozen_step: see :class:`LtsWeight`.

    Source: Zhong et al., arXiv 2211.08544.
    """

    def __init__(
        self,
        *args: Any,
        bits: int = 4,
        schedule: FreezeSchedule | None = None,
        saved: bool = True,
        frozen_step: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError("LtsConv2d: padding must be numbers, of mode 'zeros'")
        self._configure(bits, schedule, saved, frozen_step)

    def forward(self, input: Tensor) -> Tensor:
        input, weight = self.quantize_input(input), self._quantized_weight()
        if self.plan is None or self.plan.level == "dense" or not self.training:
            return self._conv_forward(input, weight, self.bias)
        assert not isinstance(self.padding, str)
        window = self.stride, self.padding, self.dilation
        return frozen_conv2d(input, weight, self.bias, *window, self.groups, plan=self.plan)


class LtsLinear(_Lts, nn.Linear):
    """``torch.nn.Linear`` with weight and input quantised to few levels; see :class:`LtsConv2d`.

    Args:
        args, kwargs: as for ``torch.nn.Linear``.
        bits, schedule, saved, frozen_step: see :class:`LtsWeight`.

    Source: Zhong et al., arXiv 2211.08544.
    """

    def __init__(
        self,
        *args: Any,
        bits: int = 4,
        schedule: FreezeSchedule | None = None,
        saved: bool = True,
        frozen_step: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        self._configure(bits, schedule, saved, frozen_step)

    def forward(self, input: Tensor) -> Tensor:
        input, weight = self.quantize_input(input), self._quantized_weight()
        if self.plan is None or self.plan.level == "dense" or not self.training:
            return F.linear(input, weight, self.bias)
        return frozen_linear(input, weight, self.bias, plan=self.plan)


def initialize_(model: nn.Module, *batch: Any) -> Any:
    """Sets all bounds from one forward pass over a batch of training data, layer by layer, and returns its output.

    Weights: lower, upper = -3 std, 3 std; activations: see :class:`UnitActivation`. Every layer sees what the quantised
    layers before it give. The model runs in training mode (BatchNorm's statistics move), without a gradient, and no
    weight's freezing state but ``saved`` changes.

    Raises:
        ValueError: ``model`` has no layer of this kind, or a tensor with fewer than two elements.
    """
    bounds = [m for m in model.modules() if isinstance(m, _Bounds)]
    if not bounds:
        raise ValueError(f"initialize_: model must hold LTS layers, got {type(model).__name__} without one")
    training = model.training
    model.train()
    try:
        for module in bounds:
            module.initializing = True
        with torch.no_grad():
            return model(*batch)
    finally:
        for module in bounds:
            module.initializing = False
        model.train(training)


def frozen_weights(model: nn.Module) -> Iterator[tuple[Tensor, LtsWeight]]:
    """Every parameter that may freeze, with the module that holds its mask."""
    for module in model.modules():
        if isinstance(module, _Lts):
            yield module.weight, module.quantize_weight
        for name, chain in getattr(module, "parametrizations", {}).items():
            for transform in chain:
                if isinstance(transform, LtsWeight):
                    yield getattr(module.parametrizations, name).original, transform


def refresh_(model: nn.Module) -> dict[str, FreezePlan]:
    """Makes every layer skip what is frozen by now in its weight's gradient; call it every so many steps.

    What a plan skips does not move the bounds of its weight either: they learn from the computed gradients only. That
    is where a run departs from the published method, which computes all gradients and then masks them.

    Returns:
        The plans by the layers' names.
    """
    return {name: module.refresh_plan() for name, module in model.named_modules() if isinstance(module, _Lts)}


def frozen_ratio(model: nn.Module) -> float:
    """Share of the elements that are frozen, of all parameters that may freeze; waits for the device."""
    pairs = list(frozen_weights(model))
    count = sum(parameter.numel() for parameter, _ in pairs)
    return sum(int(transform.counters[1]) for _, transform in pairs) / count if count else 0.0
