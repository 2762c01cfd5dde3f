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
QUICK_SHARES = {"none": [0], "tile": [50], "channel": [50], "element": [50], "layer": [100]}
LEVELS = ("tiles", "rows", "columns")


def suite(
    operator: str,
    layer: Callable[[Tensor, Tensor], Tensor],
    frozen_layer: Callable[..., Tensor],
    shapes: tuple[Sequence[int], Sequence[int]],
    small: tuple[Sequence[int], Sequence[int]],
) -> Suite:
    """``layer`` is torch's, of an input and a weight; ``frozen_layer`` takes ``frozen`` and ``plan`` too. ``shapes`` are
    the input's and the weight's. Only the weight requires a gradient; the graph exists before anything is timed."""

    def make_inputs(size, dtype, device, generator):
        granularity, share, input_shape, weight_shape = size
        input = torch.randn(*input_shape, generator=generator)
        weight = torch.randn(*weight_shape, generator=generator)
        mask = frozen_mask(weight_shape, granularity, share, generator)
        output = layer(input.to("meta"), weight.to("meta"))
        incoming = torch.randn(output.shape, generator=generator)
        return input.to(device, dtype), weight.to(device, dtype), mask.to(device), incoming.to(device, dtype)

    def prepare(build: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: Any, direction: str) -> Prepared:
        input, weight, mask, incoming = inputs
        weight = weight.detach().requires_grad_()
        output = build(input, weight, mask)

        def gradient():
            return torch.autograd.grad(output, weight, incoming, retain_graph=True, allow_unused=True)[0]

        def results():
            found = gradient()  # None where the whole layer is frozen
            return {"gradient": torch.zeros_like(weight) if found is None else found}

        # A clone is an activation like any other; what is one of the inputs would not be counted.
        return Prepared(gradient, results, lambda: build(input.clone(), weight, mask))

    def ours(level: str | None = None, masked: bool = True):
        def make(size):
            known = masked and size[:2] != ("element", 0)

            def planned(input, weight, mask):
                packed = pack_mask(mask)
                plan = freeze_plan(packed, weight.shape, level=level)
                return frozen_layer(input, weight, frozen=packed if known else None, plan=plan)

            return planned

        return make

    def reference(size):
        return lambda input, weight, mask: layer(input, torch.where(mask, 0, weight))

    def published(size):
        return lambda input, weight, mask: layer(input, weight * (~mask).to(weight.dtype))

    def name(granularity: str, share: int) -> str:
        return f"{granularity}_{percent(shapes[1], granularity, share)}"

    chosen = QUICK_SHARES if settings.QUICK else SHARES
    sizes = {name(g, share): (g, share, *shapes) for g, shares in chosen.items() for share in shares}
    implementations = [
        Implementation("tersor", ours(), ours=True, note="the level that freeze_plan chooses"),
        Implementation(
            "plan_only",
            ours(masked=False),
            ours=True,
            sizes=["tile_50", "tile_75", "channel_50"],
            note="without the mask, as LtsLinear and LtsConv2d do it, whose quantiser puts the zeros in",
        ),
        *(
            Implementation(level, ours(level), ours=True, sizes=["none_0"], note=f"level {level!r} by force")
            for level in LEVELS
        ),
        Implementation("dense", lambda size: lambda x, w, _: layer(x, w), compared=False, note="torch's, of all weights"),
        Implementation(
            "masked",
            published,
            sizes=["none_0", "tile_50", "channel_50", "element_50"],
            note="the published way: the dense gradient times a float mask",
        ),
    ]
    bars = {"none_0": 1.03, "element_*": 1.03, "tile_50": 0.6, "tile_75": 0.35}  # time relative to dense, at most
    return Suite(
        operator=operator,
        sizes=sizes,
        small=("tile", 50, *small),
        directions=["weight_gradient"],
        make_inputs=make_inputs,
        reference=reference,
        prepare=prepare,
        implementations=implementations,
        operators=[f"{operator}_backward", "zero_frozen"],
        targets=[Target(f"{operator}/{size}/float32/weight_gradient", "dense", 1 / bar) for size, bar in bars.items()],
    )
