"""One step on the free elements, as torch.optim.AdamW makes it."""

from __future__ import annotations

from typing import Any

import torch
from subject import Subject
from torch import Tensor

from tersor.freezing import pack_mask
from tersor.freezing.frozen_adamw_step import frozen_adamw_step

OPTIONS = 0.01, 0.9, 0.99, 1e-6, 0.1, False, 3
SIZES = [(2, 3, 4, 5), (4, 2, 3, 7), (3, 1, 1, 1), (2, 64, 30, 31)]


def mask_of(shape: Any, device: Any = "cpu") -> Tensor:
    """A mask with whole words of ones and of zeros in it."""
    index = torch.arange(torch.Size(shape).numel(), device=device)
    return ((index % 5 == 0) | (index // 64 % 3 == 2)).view(shape)


def _function(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    changed = [t.detach().clone(memory_format=torch.contiguous_format) for t in (parameter, exp_avg, exp_avg_sq)]
    frozen = pack_mask(mask_of(parameter.shape, parameter.device))
    mapped = torch.zeros_like(parameter.new_empty(frozen.shape), dtype=torch.uint8) + frozen
    with torch.no_grad():
        frozen_adamw_step.overload(changed[0], gradient.contiguous(), *changed[1:], mapped, *OPTIONS)
    return torch.cat(changed)


def _exact(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    lr, beta1, beta2, eps, decay, _, step = OPTIONS
    first = beta1 * exp_avg + (1 - beta1) * gradient
    second = beta2 * exp_avg_sq + (1 - beta2) * gradient**2
    denominator = (second / (1 - beta2**step)).sqrt() + eps
    moved = parameter - lr * decay * parameter - lr * (first / (1 - beta1**step)) / denominator
    frozen = mask_of(parameter.shape, parameter.device)
    pairs = ((parameter, moved), (exp_avg, first), (exp_avg_sq, second))
    return torch.cat([torch.where(frozen, old, new) for old, new in pairs])


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    tensors = [torch.randn(*size) for _ in range(3)]
    return tuple(t.to(dtype).to(device) for t in (*tensors, 0.1 + torch.rand(*size)))


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return *_inputs(size, dtype, device), pack_mask(mask_of(size, device)), *OPTIONS


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("frozen_adamw_step",),
        raw=_raw,
        sizes=SIZES,
        differentiable=False,
        inner=True,
        changes=True,
        name="frozen_adamw_step",
    )
]
