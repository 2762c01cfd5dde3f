"""A step of stochastic gradient descent on GPUs: one pass over the octets in which something is free."""

# A jitted function annotates its constants only.
# mypy: disallow-incomplete-defs=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from tersor.triton_kernels.freezing._octets import cases, check, in_place, launch, load_bytes, octets, unpack
from tersor.triton_kernels.quantization._fake_quantize import Case


@triton.jit(do_not_specialize=["size"])
def _kernel(
    parameter, gradient, momentum_buffer, frozen, lr, momentum, new_share, weight_decay, size,
    DECAY: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, FIRST: tl.constexpr,
    VECTOR: tl.constexpr, OCTETS: tl.constexpr,
):  # fmt: skip
    """In the order of the reference, each operation rounded; the buffer may be None."""
    start, offsets, present = octets(size, VECTOR, OCTETS)
    bytes = load_bytes(frozen, start, size, OCTETS)
    still = unpack(bytes)
    wanted = present & (bytes != 255)[:, None]
    old = tl.load(parameter + start + offsets, mask=wanted, other=0.0)
    step = tl.load(gradient + start + offsets, mask=wanted, other=0.0).to(tl.float32)
    if MAXIMIZE:
        step = -step
    if DECAY:
        step += weight_decay * old.to(tl.float32)
    if momentum_buffer is not None:
        kind = momentum_buffer.dtype.element_ty
        if FIRST:
            buffer = step
            tl.store(momentum_buffer + start + offsets, tl.where(still, 0.0, step).to(kind), mask=present)
        else:
            before = tl.load(momentum_buffer + start + offsets, mask=wanted, other=0.0)
            buffer = momentum * before.to(tl.float32) + new_share * step
            tl.store(momentum_buffer + start + offsets, tl.where(still, before, buffer.to(kind)), mask=wanted)
        step = step + momentum * buffer if NESTEROV else buffer
    new = (old.to(tl.float32) - lr * step).to(old.dtype)
    tl.store(parameter + start + offsets, tl.where(still, old, new), mask=wanted)


def frozen_sgd_step(
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
    """The operator ``tersor::frozen_sgd_step`` for float16, bfloat16 and float32."""
    check("frozen_sgd_step", parameter, frozen, gradient=gradient, momentum_buffer=momentum_buffer)
    constants = {"DECAY": weight_decay != 0, "NESTEROV": nesterov, "MAXIMIZE": maximize, "FIRST": first}
    numbers = lr, momentum, 1 - dampening, weight_decay
    with in_place(parameter, momentum_buffer) as (own, buffer):
        tensors = own, gradient.contiguous(), buffer, frozen.contiguous()
        launch(_kernel, parameter.numel(), *tensors, *numbers, **constants)


def ahead_of_time_cases() -> Iterator[Case]:
    """What the ahead-of-time test compiles."""
    plain: dict[str, Any] = {"DECAY": True, "NESTEROV": False, "MAXIMIZE": False, "FIRST": False}
    variants = {
        "momentum": plain,
        "nesterov": plain | {"NESTEROV": True},
        "first": plain | {"FIRST": True},
        "no buffer": plain | {"momentum_buffer": None},
    }
    kinds = dict.fromkeys(("lr", "momentum", "new_share", "weight_decay"), "fp32")
    yield from cases(_kernel, variants, kinds, ["parameter", "gradient", "momentum_buffer"])
