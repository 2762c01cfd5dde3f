"""Binary layers for training, with the parameters and state-dict keys of the published networks."""

from __future__ import annotations

import abc
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.binary.binary_sign import binary_sign
from tersor.binary.estimators import Estimator, check_estimator, reste
from tersor.binary.functional import binary_linear, recu_conv2d, scaled_conv2d, weight_scale
from tersor.binary.recu_weight import check_tau, recu_weight

SCALES = ("layer", "channel")


class BinaryLayer(abc.ABC):
    """What the layers share, and packing needs to know: how whole numbers become the layer's output."""

    weight: Tensor
    bias: Any  # of torch's layers: a tensor or None

    @property
    def takes_signs(self) -> bool:
        """Whether of the input only the signs matter."""
        return True

    def binary_weight(self) -> Tensor:
        """Of which the signs are taken, as they are in evaluation."""
        return self.weight

    @abc.abstractmethod
    def rescale(self, sums: Tensor) -> Tensor:
        """The layer's output for sums of signs ``(N, O, ...)``."""

    @abc.abstractmethod
    def affine(self) -> tuple[Tensor, Tensor]:
        """:meth:`rescale` as a factor and an addend, each ``(O,)``."""


class _Scaled(BinaryLayer):
    """Layers whose sums are multiplied by the mean of \\|weight\\|."""

    @property
    def takes_signs(self) -> bool:
        return self.estimator is not None

    def _configure(self, estimator: Any, weight_estimator: Any, scale: str | None) -> None:
        name = type(self).__name__
        if scale is not None and scale not in SCALES:
            raise ValueError(f"{name}: scale must be one of {', '.join(SCALES)} or None, got {scale!r}")
        self.estimator = None if estimator is None else check_estimator(name, estimator)
        self.weight_estimator = check_estimator(name, self.estimator if weight_estimator is None else weight_estimator)
        self.scale = scale
        # The exponents of both once more: a tensor of the CPU, which a compiled layer reads.
        self.exponents = torch.ones(2, dtype=torch.float64, device="cpu")
        self._note_exponents()

    def _note_exponents(self) -> None:
        for i, rule in enumerate((self.estimator, self.weight_estimator)):
            self.exponents[i] = 1.0 if rule is None else rule.o

    def _rules(self) -> tuple[Estimator | None, Estimator]:
        """Of input and weight."""
        rules = (self.estimator, self.weight_estimator)
        if not torch.compiler.is_compiling():
            return rules
        made: list[Any] = [
            rule if rule is None or rule.name != "reste" else Estimator("reste", exponent, rule.t, rule.interval)  # type: ignore[arg-type]
            for rule, exponent in zip(rules, self.exponents.unbind(), strict=True)
        ]
        return made[0], made[1]

    def set_o_(self, o: float) -> None:
        """Sets the exponent of ``"reste"`` estimators; leaves others."""
        name = type(self).__name__
        if self.estimator is not None and self.estimator.name == "reste":
            self.estimator = check_estimator(name, self.estimator._replace(o=o))
        if self.weight_estimator.name == "reste":
            self.weight_estimator = check_estimator(name, self.weight_estimator._replace(o=o))
        self._note_exponents()

    def rescale(self, sums: Tensor) -> Tensor:
        trailing = (1,) * (sums.dim() - 2)
        factor = weight_scale(self.weight, self.scale)
        output = sums if factor is None else sums * factor.view(-1, *trailing)
        return output if self.bias is None else output + self.bias.view(-1, *trailing)

    def affine(self) -> tuple[Tensor, Tensor]:
        outputs = self.weight.shape[0]
        factor = weight_scale(self.weight, self.scale)
        one = self.weight.new_ones(1) if factor is None else factor
        zero = self.weight.new_zeros(outputs) if self.bias is None else self.bias
        return one.expand(outputs), zero

    def _describe(self) -> str:
        name = "float" if self.estimator is None else self.estimator.name
        return f"input={name}, weight={self.weight_estimator.name}, scale={self.scale}"


class BinaryConv2d(_Scaled, nn.Conv2d):
    """``torch.nn.Conv2d`` of the signs of input and weight, times mean\\|weight\\|, plus bias.

    The state dict is that of ``torch.nn.Conv2d``. Zeros of the padding count as 0.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``; the padding is zeros.
        estimator: gradient of the input's sign, see :class:`Estimator`; None takes the input as it is.
        weight_estimator: of the weight's; None for the input's.
        scale: ``"layer"``: one factor, ``"channel"``: one for each output, None: none. Gradients flow through it.
    """

    def __init__(
        self,
        *args: Any,
        estimator: str | Estimator | None = "ste",
        weight_estimator: str | Estimator | None = None,
        scale: str | None = "layer",
        **kwargs: Any,
    ) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        if estimator is None and weight_estimator is None:
            weight_estimator = "ste"
        self._configure(estimator, weight_estimator, scale)
        _check_padding(self)

    def forward(self, input: Tensor) -> Tensor:
        window = (self.stride, _amounts(self), self.dilation)
        rules = self._rules()
        return scaled_conv2d(
            type(self).__name__, input, self.weight, self.bias, window, self.groups, *rules, self.scale
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"


class ReSTEConv2d(BinaryConv2d):
    """ReSTE's convolution, see :func:`reste_conv2d`; :class:`BinarySchedule` sets o and o_a.

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``.
        o, t: of the weight's sign.
        o_a, t_a: of the input's.
        act_bits32: takes the input as it is.

    Source: arXiv 2308.06689.
    """

    def __init__(
        self,
        *args: Any,
        o: float = 1.0,
        t: float = 1.5,
        o_a: float = 1.0,
        t_a: float = 1.5,
        act_bits32: bool = False,
        **kwargs: Any,
    ) -> None:
        rules: dict[str, Any] = {"estimator": None if act_bits32 else reste(o_a, t_a), "weight_estimator": reste(o, t)}
        super().__init__(*args, **rules, **kwargs)


class BinaryLinear(_Scaled, nn.Linear):
    """``torch.nn.Linear`` of the signs of input and weight; see :class:`BinaryConv2d`."""

    def __init__(
        self,
        *args: Any,
        estimator: str | Estimator | None = "ste",
        weight_estimator: str | Estimator | None = None,
        scale: str | None = "layer",
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, *args, **kwargs)
        if estimator is None and weight_estimator is None:
            weight_estimator = "ste"
        self._configure(estimator, weight_estimator, scale)

    def forward(self, input: Tensor) -> Tensor:
        estimator, weight_estimator = self._rules()
        signs, factor = binary_sign(self.weight, weight_estimator), weight_scale(self.weight, self.scale)
        if estimator is None:
            output = F.linear(input, signs if factor is None else signs * factor.view(-1, 1))
        else:
            output = binary_linear(binary_sign(input, estimator), signs, scale=factor)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"


class ReCUConv2d(BinaryLayer, nn.Conv2d):
    """ReCU's convolution, see :func:`recu_conv2d`; :class:`BinarySchedule` sets tau.

    The state dict has ``weight``, ``alpha`` ``(O, 1, 1)``, uniform in [0, 1) at first, and the buffer ``tau`` without
    dimensions (of shape ``(1,)`` in the published checkpoints, which load).

    Args:
        args, kwargs: as for ``torch.nn.Conv2d``; the padding is zeros.

    Source: arXiv 2103.12369.
    """

    alpha: nn.Parameter
    tau: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nn.Conv2d.__init__(self, *args, **kwargs)
        like = self.weight
        self.alpha = nn.Parameter(torch.rand(self.out_channels, 1, 1, dtype=like.dtype, device=like.device))
        self.register_buffer("tau", torch.tensor(1.0, device=like.device))
        _check_padding(self)

    def set_tau_(self, tau: float) -> None:
        """Raises ValueError unless it is above 0.5 and at most 1."""
        self.tau.fill_(check_tau("ReCUConv2d", tau))

    def forward(self, input: Tensor) -> Tensor:
        window = (self.stride, _amounts(self), self.dilation, self.groups)
        return recu_conv2d(input, self.weight, self.alpha, self.tau, self.bias, *window, self.training)

    def binary_weight(self) -> Tensor:
        return recu_weight(self.weight, self.tau)

    def rescale(self, sums: Tensor) -> Tensor:
        return self.alpha * (sums if self.bias is None else sums + self.bias[:, None, None])

    def affine(self) -> tuple[Tensor, Tensor]:
        alpha = self.alpha.flatten()
        return alpha, torch.zeros_like(alpha) if self.bias is None else alpha * self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        tau = state_dict.get(prefix + "tau")
        if isinstance(tau, Tensor) and tau.shape == (1,):
            state_dict[prefix + "tau"] = tau.reshape(())
        super()._load_from_state_dict(state_dict, prefix, *args)


class ChannelBias(nn.Module):
    """Adds a learnable number to each channel, 0 at first: ReActNet's shifts in front of a sign and around a PReLU.

    Shape:
        ``(N, C, H, W)`` to the same; the parameter ``bias`` is ``(1, C, 1, 1)``.

    Source: arXiv 2003.03488.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.bias

    def extra_repr(self) -> str:
        return str(self.bias.shape[1])


def _check_padding(layer: nn.Conv2d) -> None:
    if layer.padding_mode != "zeros":
        raise ValueError(f"{type(layer).__name__}: padding_mode must be 'zeros', got {layer.padding_mode!r}")
    border = layer._reversed_padding_repeated_twice
    if border[0] != border[1] or border[2] != border[3]:
        raise ValueError(f"{type(layer).__name__}: padding must be as much on either side, got {layer.padding!r}")


def _amounts(layer: nn.Conv2d) -> Any:
    """The padding of rows and columns, also for "same" and "valid"."""
    return layer._reversed_padding_repeated_twice[::-2] if isinstance(layer.padding, str) else layer.padding
