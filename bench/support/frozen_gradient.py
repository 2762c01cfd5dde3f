"""The suite of a layer's weight gradient, dense and with parts of the weight frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import settings
import torch
from frozen_masks import frozen_mask, percent
from suite import Implementation, Prepared, Suite, Target
from torch import Tensor

from tersor.freezing import freeze_plan, pack_mask

# Of the weight, in per cent. "none": the mask has no bit set; at "element" 0 there is no mask.
SHARES = {"none": [0], "tile": [25, 50, 75, 90], "channel": [25, 50, 75, 90], "element": [0, 50, 90], "layer": [100]}
QUICK = {"none": [0], "tile": [50], "channel": [50], "element": [50], "layer": [100]}
LEVELS = ("tiles", "rows", "columns")
BARS = {"none_0": 1.03, "element_*": 1.03, "tile_50": 0.6, "tile_75": 0.35}  # time relative to dense, at most

Layer = Callable[..., Tensor]  # of input and weight; tersor's takes the mask and the plan too
Shapes = tuple[Sequence[int], Sequence[int]]  # the input's and the weight's


def suite(operator: str, layer: Layer, frozen_layer: Layer, shapes: Shapes, small: Shapes) -> Suite:
    """``layer`` is torch's. Only the weight requires a gradient; the graph exists before anything is timed."""
    sizes = {
        f"{granularity}_{percent(shapes[1], granularity, share)}": (granularity, share, *shapes)
        for granularity, shares in (QUICK if settings.QUICK else SHARES).items()
        for share in shares
    }
    return Suite(
        operator=operator,
        sizes=sizes,
        small=("tile", 50, *small),
        directions=["weight_gradient"],
        make_inputs=inputs_of(layer),
        reference=lambda size: lambda input, weight, mask: layer(input, torch.where(mask, 0, weight)),
        prepare=prepare,
        implementations=implementations(layer, frozen_layer),
        operators=[f"{operator}_backward", "zero_frozen"],
        targets=[Target(f"{operator}/{size}/float32/weight_gradient", "dense", 1 / bar) for size, bar in BARS.items()],
    )


def implementations(layer: Layer, frozen_layer: Layer) -> list[Implementation]:
    def ours(level: str | None = None) -> Any:
        def make(size):
            unmasked = size[:2] == ("element", 0)

            def planned(input, weight, mask):
                packed = pack_mask(mask)
                plan = freeze_plan(packed, weight.shape, level=level)
                return frozen_layer(input, weight, frozen=None if unmasked else packed, plan=plan)

            return planned

        return make

    def plan_only(size):
        def planned(input, weight, mask):
            plan = freeze_plan(pack_mask(mask), weight.shape, level="tiles")
            return frozen_layer(input, weight, frozen=None, plan=plan)

        return planned

    def dense(size):
        return lambda input, weight, mask: layer(input, weight)

    def masked(size):
        return lambda input, weight, mask: layer(input, weight * (~mask).to(weight.dtype))

    tiles, plan_note = ["tile_50", "tile_75"], "no mask, as LtsLinear and LtsConv2d, whose quantiser puts the zeros in"
    masked_note = "the published way: the dense gradient times a float mask"
    return [
        Implementation("tersor", ours(), ours=True, note="mask and plan, the level as freeze_plan chooses it"),
        Implementation("plan_only", plan_only, ours=True, sizes=tiles, note=plan_note),
        *(
            Implementation(level, ours(level), ours=True, sizes=["none_0"], note="this level forced")
            for level in LEVELS
        ),
        Implementation("dense", dense, compared=False, note="torch's, of all weights"),
        Implementation("masked", masked, sizes=["tile_50", "element_50"], note=masked_note),
    ]


def inputs_of(layer: Layer) -> Callable[..., tuple[Tensor, ...]]:
    def make_inputs(size, dtype, device, generator):
        granularity, share, input_shape, weight_shape = size
        input = torch.randn(*input_shape, generator=generator)
        weight = torch.randn(*weight_shape, generator=generator)
        mask = frozen_mask(weight_shape, granularity, share, generator)
        output_shape = layer(input.to("meta"), weight.to("meta")).shape
        incoming = torch.randn(output_shape, generator=generator)
        return input.to(device, dtype), weight.to(device, dtype), mask.to(device), incoming.to(device, dtype)

    return make_inputs


def prepare(build: Layer, inputs: tuple[Tensor, ...], dtype: torch.dtype, direction: str) -> Prepared:
    input, weight, mask, incoming = inputs
    weight = weight.detach().requires_grad_()
    output = build(input, weight, mask)

    def gradient():
        return torch.autograd.grad(output, weight, incoming, retain_graph=True, allow_unused=True)[0]

    def results():
        found = gradient()  # None where the whole layer is frozen
        return {"gradient": torch.zeros_like(weight) if found is None else found}

    # A clone is an activation like any other; what is one of the inputs would not be counted as kept.
    return Prepared(gradient, results, lambda: build(input.clone(), weight, mask))
