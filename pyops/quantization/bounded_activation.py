"""Activation quantiser with trainable bounds, static or scaled per sample by a gate."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tersor._checks import as_int
from tersor.quantization._quantizer import check_bits
from tersor.quantization.dynamic_gate import dynamic_gate
from tersor.quantization.fake_quantize_bounds import fake_quantize_bounds
from tersor.quantization.percentile_bounds import check_percentile, percentile_bounds

STAGES = ("float", "record", "static", "dynamic")
START = 10.0  # the published first bounds are -10 and 10
HIDDEN = 32


class BoundedActivation(nn.Module):
    """Fake-quantises an activation between two trainable bounds, as the layers of DDTB do.

    What a call does depends on :attr:`stage`, which :class:`BoundsSchedule` sets through a training:

    - ``"float"``: the input passes through. ``"record"``: it does, and its extremes are recorded.
    - ``"static"``: quantised between the bounds. A dynamic layer also runs its gate in training mode, whose
      logits (:attr:`logits`) a regulariser pulls to 0, that is, the bounds' factors to 1.
    - ``"dynamic"`` (as a module begins, for inference with a trained checkpoint): a dynamic layer's bounds are
      multiplied per sample by the gate's factors; a static layer's are not.

    Parameters and buffers bear the published names: ``alpha_upper``, ``alpha_lower``, ``max_val``, ``min_val``,
    ``is_dynamic`` (each of shape ``(1,)``) and ``atten_c.{1,2,5}`` for the gate.

    Args:
        channels: C of the ``(N, C, H, W)`` inputs.
        bits: 2 to 8; 32 passes the input through in every stage.
        percentile: bounds are calibrated to this percentile and its opposite.
        calibrate: set the bounds from the first training batch, if they are still the initial ones. None means
            for 2 bits only, as published.
        tie: see :func:`fake_quantize_bounds`.
        per_sample: see :func:`dynamic_gate`.

    Shape:
        ``(N, C, H, W)`` to the same.

    Raises:
        TypeError, ValueError: an option is not as stated, or see the functions named.

    Source: Zhong et al., arXiv 2203.03844.
    """

    max_val: Tensor
    min_val: Tensor
    is_dynamic: Tensor

    def __init__(
        self,
        channels: int,
        bits: int = 2,
        *,
        percentile: float = 99.0,
        calibrate: bool | None = None,
        tie: str = "half",
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        name = "BoundedActivation"
        self.channels = as_int(name, channels=channels)
        if self.channels < 1:
            raise ValueError(f"{name}: channels must be at least 1, got {channels}")
        self.bits = check_bits(name, bits)
        self.percentile = check_percentile(name, percentile)
        self.calibrate = self.bits == 2 if calibrate is None else bool(calibrate)
        self.tie, self.per_sample = tie, bool(per_sample)
        self.alpha_upper = nn.Parameter(torch.full((1,), START))
        self.alpha_lower = nn.Parameter(torch.full((1,), -START))
        for buffer in ("max_val", "min_val", "is_dynamic"):
            self.register_buffer(buffer, torch.zeros(1))
        hidden, norm = nn.Conv2d(self.channels, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN)
        output = nn.Conv2d(HIDDEN, 2, 1, bias=False)
        self.atten_c = nn.Sequential(OrderedDict([("1", hidden), ("2", norm), ("5", output)]))
        self.stage = "dynamic"
        self.pending = False  # whether the next training batch calibrates the bounds
        self.logits: Tensor | None = None
        self._dynamic = False  # is_dynamic on the host, so that no call waits for a GPU

    @property
    def dynamic(self) -> bool:
        """Whether the gate scales the bounds per sample."""
        return self._dynamic

    @dynamic.setter
    def dynamic(self, value: bool) -> None:
        self._dynamic = bool(value)
        self.is_dynamic.fill_(float(value))

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """``relu`` quantises ``relu(input)``, in the same pass."""
        if self.bits == 32 or self.stage in ("float", "record"):
            output = torch.relu(input) if relu else input
            if self.stage == "record":
                self._record(output)
            return output
        lower, upper = self.bounds(input, relu)
        return fake_quantize_bounds(input, lower, upper, self.bits, tie=self.tie, relu=relu)

    def bounds(self, input: Tensor, relu: bool = False) -> tuple[Tensor, Tensor]:
        """Lower and upper bound for this input, ``(1,)`` or ``(N, 1, 1, 1)``; calibrates and runs the gate as due."""
        if self.training and self.pending:
            self._calibrate(torch.relu(input) if relu else input)
        self.logits = None
        if not self._dynamic or not (self.training or self.stage == "dynamic"):
            return self.alpha_lower, self.alpha_upper
        hidden, norm, output = self.atten_c
        assert isinstance(hidden, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert isinstance(output, nn.Conv2d)
        source = torch.relu(input) if relu else input
        scale, self.logits = dynamic_gate(source, hidden.weight, norm, output.weight, per_sample=self.per_sample)
        if self.stage == "static":
            return self.alpha_lower, self.alpha_upper
        scale = scale.view(-1, 2, 1, 1, 1)
        return scale[:, 1] * self.alpha_lower, scale[:, 0] * self.alpha_upper

    @torch.no_grad()
    def _record(self, input: Tensor) -> None:
        least, greatest = input.aminmax()
        self.min_val.copy_(least), self.max_val.copy_(greatest)

    @torch.no_grad()
    def _calibrate(self, input: Tensor) -> None:
        self.pending = False
        lower, upper = percentile_bounds(input, self.percentile)
        self.alpha_lower.copy_(lower), self.alpha_upper.copy_(upper)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for buffer in ("max_val", "min_val"):  # published checkpoints store them as scalars once recorded
            key = prefix + buffer
            if key in state_dict and state_dict[key].dim() == 0:
                state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._dynamic = bool(self.is_dynamic.item())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logits": None}  # part of a graph, which cannot be copied or pickled

    def extra_repr(self) -> str:
        return f"{self.channels}, bits={self.bits}, percentile={self.percentile}, dynamic={self.dynamic}"
