"""A step of stochastic gradient descent that passes over frozen weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor._operator import Operator, operator
from tersor.freezing.mask import unpack_mask
from tersor.quantization._quantizer import exact_dtype


def _reference(
    parameter: Tensor,
    gradient: Tensor,
    momentum_buffer: Tensor | None,
    frozen: Tensor,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
) -> None:
    dtype = exact_dtype(parameter.dtype)
    free, old = ~unpack_mask(frozen, parameter.shape), parameter.to(dtype)
    step = (-gradient if maximize else gradient).to(dtype)
    if weight_decay != 0:
        step = step + weight_decay * old
    if momentum_buffer is not None:
        buffer = step if first else momentum * momentum_buffer.to(dtype) + (1 - dampening) * step
        buffer = torch.where(free, buffer, 0 if first else momentum_buffer.to(dtype))
        momentum_buffer.copy_(buffer)
        step = step + momentum * buffer if nesterov else buffer
    parameter.copy_(torch.where(free, old - lr * step, old))


def _fake(*_: Any) -> None:
    return None


def step_one_by_one(op: Any, tensors: int) -> Any:
    """A batching rule for an operator that changes its first ``tensors`` arguments in place; all have to be mapped."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[None, None]:
        if any(isinstance(a, Tensor) and d is None for a, d in zip(args[:tensors], in_dims[:tensors], strict=True)):
            raise ValueError(f"{op().name}: under vmap all tensors must be mapped, since every call changes them")
        for i in range(info.batch_size):
            each = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            own = [t.contiguous() if isinstance(t, Tensor) else t for t in each]
            op().overload(*own)
            for whole, part in zip(each[:tensors], own[:tensors], strict=True):
                if isinstance(part, Tensor) and part.data_ptr() != whole.data_ptr():
                    whole.copy_(part)
        return None, None

    return vmap


frozen_sgd_step: Operator
# With g the gradient (negated for maximize) plus weight_decay * parameter, buffer = momentum * buffer +
# (1 - dampening) g (g itself in the first step), and parameter -= lr * (buffer, or g + momentum * buffer for nesterov,
# or without a buffer g), as torch.optim.SGD does it. Where frozen, nothing changes, but a first step sets the buffer
# to 0.
frozen_sgd_step = operator(
    "frozen_sgd_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!)? momentum_buffer, Tensor frozen, float lr,"
    " float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, bool first) -> ()",
    reference=_reference,
    fake=_fake,
    vmap=step_one_by_one(lambda: frozen_sgd_step, 3),
)
