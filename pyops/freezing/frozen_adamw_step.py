"""A step of AdamW that passes over frozen weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor._operator import Operator, operator
from tersor.freezing.frozen_sgd_step import _fake, step_one_by_one
from tersor.freezing.mask import unpack_mask
from tersor.quantization._quantizer import exact_dtype


def _reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    frozen: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    step: int,
) -> None:
    dtype = exact_dtype(parameter.dtype)
    free, old = ~unpack_mask(frozen, parameter.shape), parameter.to(dtype)
    g = (-gradient if maximize else gradient).to(dtype)
    first = beta1 * exp_avg.to(dtype) + (1 - beta1) * g
    second = beta2 * exp_avg_sq.to(dtype) + (1 - beta2) * g * g
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
    new = old * (1 - lr * weight_decay) - lr / (1 - beta1**step) * first / denominator
    exp_avg.copy_(torch.where(free, first, exp_avg))
    exp_avg_sq.copy_(torch.where(free, second, exp_avg_sq))
    parameter.copy_(torch.where(free, new, old))


frozen_adamw_step: Operator
# In step t, with g the gradient (negated for maximize): m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
# parameter = (1 - lr weight_decay) parameter - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps), as
# torch.optim.AdamW does it. Where frozen, nothing changes.
frozen_adamw_step = operator(
    "frozen_adamw_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor frozen,"
    " float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, int step) -> ()",
    reference=_reference,
    fake=_fake,
    vmap=step_one_by_one(lambda: frozen_adamw_step, 4),
)
