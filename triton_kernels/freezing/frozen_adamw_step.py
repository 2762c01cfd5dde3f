"""A step of AdamW on GPUs: one pass over the octets in which something is free."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.freezing._octets import cases, check, in_place, launch, load_bytes, octets, unpack
from tersor.triton_kernels.quantization._fake_quantize import Case


@triton.jit(do_not_specialize=["size"])
def _kernel(
    parameter, gradient, exp_avg, exp_avg_sq, frozen,
    beta1, new_share1, beta2, new_share2, eps, decay, rate, root, size,
    MAXIMIZE: tl.constexpr, VECTOR: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """In the order of the reference, each operation rounded."""
    start, offsets, present = octets(size, VECTOR, OCTETS)
    bytes = load_bytes(frozen, start, size, OCTETS)
    still = unpack(bytes)
    wanted = present & (bytes != 255)[:, None]
    old = tl.load(parameter + start + offsets, mask=wanted, other=0.0)
    g = tl.load(gradient + start + offsets, mask=wanted, other=0.0).to(tl.float32)
    old_first = tl.load(exp_avg + start + offsets, mask=wanted, other=0.0)
    old_second = tl.load(exp_avg_sq + start + offsets, mask=wanted, other=0.0)
    if MAXIMIZE:
        g = -g
    first = beta1 * old_first.to(tl.float32) + new_share1 * g
    second = beta2 * old_second.to(tl.float32) + new_share2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.cast(root, tl.float32)) + eps
    new = old.to(tl.float32) * decay - tl.div_rn(rate * first, denominator)
    tl.store(exp_avg + start + offsets, tl.where(still, old_first, first.to(old_first.dtype)), mask=wanted)
    tl.store(exp_avg_sq + start + offsets, tl.where(still, old_second, second.to(old_second.dtype)), mask=wanted)
    tl.store(parameter + start + offsets, tl.where(still, old, new.to(old.dtype)), mask=wanted)


def frozen_adamw_step(
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
    """The operator ``tersor::frozen_adamw_step`` for float16, bfloat16 and float32."""
    check("frozen_adamw_step", parameter, frozen, gradient=gradient, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    shares = beta1, 1 - beta1, beta2, 1 - beta2
    numbers = *shares, eps, 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    with in_place(parameter, exp_avg, exp_avg_sq) as (own, *moments):
        tensors = own, gradient.contiguous(), *moments, frozen.contiguous()
        launch(_kernel, parameter.numel(), *tensors, *numbers, MAXIMIZE=maximize)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    numbers = ("beta1", "new_share1", "beta2", "new_share2", "eps", "decay", "rate", "root")
    data = ["parameter", "gradient", "exp_avg", "exp_avg_sq"]
    yield from cases(_kernel, {"": {"MAXIMIZE": False}}, dict.fromkeys(numbers, "fp32"), data)
