"""The suite of an optimiser's step, dense and with parts of the parameter frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import settings
import torch
from frozen_masks import frozen_mask, touched
from suite import Implementation, Prepared, Suite, Target
from torch import Tensor, nn

from tersor.freezing import pack_mask

LAYERS = {"conv256": (256, 256, 3, 3), "16MB": (2048, 2048)}
MASKS = [("none", 0), ("channel", 50), ("channel", 90), ("element", 50)]
SMALL = ("channel", 50, (6, 5, 3, 3))
STEPS = 3  # compared after so many: the first one makes the state

Optimizer = Callable[..., Any]
Step = Callable[[], Any]


def sizes() -> dict[str, Any]:
    """Layers times masks; in a quick run one layer and two masks."""
    layers = list(LAYERS.items())[: 1 if settings.QUICK else None]
    masks = MASKS[: 2 if settings.QUICK else None]
    return {f"{layer}_{kind}_{share}": (kind, share, shape) for layer, shape in layers for kind, share in masks}


def suite(operator: str, dense: Optimizer, frozen: Optimizer, tensors: int, flops: int) -> Suite:
    """``dense`` and ``frozen`` make torch's and tersor's optimiser.

    Per element that is not frozen, ``tensors`` elements are read or written and ``flops`` operations computed.
    """

    def traffic(size, element_bytes, direction):
        granularity, share, shape = size
        elements = math.prod(shape)
        free = round(elements * touched(granularity, share))
        return free * tensors * element_bytes + elements // 8, free * flops

    return Suite(
        operator=operator,
        sizes=sizes(),
        small=SMALL,
        directions=["step"],
        make_inputs=make_inputs,
        reference=restored(dense),
        traffic=traffic,
        prepare=prepare,
        implementations=implementations(dense, frozen),
        operators=[operator],
        targets=[Target(f"{operator}/*_none_0/float32/step", "fused", 1 / 1.03)],
    )


def implementations(dense: Optimizer, frozen: Optimizer) -> list[Implementation]:
    def ours(size):
        return lambda parameter, mask: frozen([parameter], masks=[(parameter, pack_mask(mask))]).step

    def fused(size):
        return lambda parameter, mask: dense([parameter], fused=True).step

    # Whatever the mask, the eager way does the same work, and of 16 MB it takes the longest of all.
    patient = [name for name in sizes() if not name.startswith("16MB") or name == "16MB_channel_50"]
    note = "torch's optimiser, then torch.where puts the frozen elements back"
    return [
        Implementation("tersor", ours, ours=True, note="the optimiser's whole step() for this one parameter"),
        Implementation("fused", fused, compared=False, note="torch's fused optimiser, which moves all elements"),
        Implementation("eager", restored(dense), sizes=patient, note=note),
    ]


def restored(dense: Optimizer) -> Callable[[Any], Callable[..., Step]]:
    def build(parameter, mask):
        optimizer = dense([parameter])

        def step():
            with torch.no_grad():
                before = parameter.clone()
                optimizer.step()
                parameter.copy_(torch.where(mask, before, parameter))

        return step

    return lambda size: build


def make_inputs(size, dtype, device, generator):
    granularity, share, shape = size
    parameter, gradient = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(2))
    return parameter, gradient, frozen_mask(shape, granularity, share, generator).to(device)


def prepare(build: Callable[..., Step], inputs: tuple[Tensor, ...], dtype: torch.dtype, direction: str) -> Prepared:
    value, gradient, mask = inputs

    def start() -> tuple[Tensor, Step]:
        parameter = nn.Parameter(value.clone())
        parameter.grad = gradient
        return parameter, build(parameter, mask)

    def results():
        parameter, step = start()
        for _ in range(STEPS):
            step()
        return {"output": parameter.detach()}

    return Prepared(start()[1], results)
