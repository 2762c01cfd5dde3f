"""One step on the free elements, with every combination of options that torch.optim.SGD knows."""

from __future__ import annotations

from typing import Any

import torch
from subject import Subject
from torch import Tensor

from tersor.freezing import pack_mask
from tersor.freezing.frozen_sgd_step import frozen_sgd_step

OPTIONS = 0.1, 0.9, 0.25, 0.01, True, True, False
SIZES = [(2, 3, 4, 5), (4, 2, 3, 7), (3, 1, 1, 1), (2, 64, 30, 31)]


def mask_of(shape: Any, device: Any = "cpu") -> Tensor:
    """A mask with whole words of ones and of zeros in it."""
    index = torch.arange(torch.Size(shape).numel(), device=device)
    return ((index % 7 < 2) | (index // 64 % 3 == 1)).view(shape)


def _function(parameter: Tensor, gradient: Tensor, buffer: Tensor) -> Tensor:
    parameter, buffer = (t.detach().clone(memory_format=torch.contiguous_format) for t in (parameter, buffer))
    frozen = pack_mask(mask_of(parameter.shape, parameter.device))
    mapped = torch.zeros_like(parameter.new_empty(frozen.shape), dtype=torch.uint8) + frozen
    with torch.no_grad():
        frozen_sgd_step.overload(parameter, gradient.contiguous(), buffer, mapped, *OPTIONS)
    return torch.cat([parameter, buffer])


def _exact(parameter: Tensor, gradient: Tensor, buffer: Tensor) -> Tensor:
    lr, momentum, dampening, decay, *_ = OPTIONS
    step = -gradient + decay * parameter
    new = momentum * buffer + (1 - dampening) * step
    frozen = mask_of(parameter.shape, parameter.device)
    moved = parameter - lr * (step + momentum * new)
    return torch.cat([torch.where(frozen, parameter, moved), torch.where(frozen, buffer, new)])


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(*size).to(dtype).to(device) for _ in range(3))


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return *_inputs(size, dtype, device), pack_mask(mask_of(size, device)), *OPTIONS


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("frozen_sgd_step",),
        raw=_raw,
        sizes=SIZES,
        differentiable=False,
        inner=True,
        changes=True,
        name="frozen_sgd_step",
    )
]
