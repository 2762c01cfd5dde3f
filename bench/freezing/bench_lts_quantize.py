"""A training step of a weight's quantiser that freezes what has settled (LTS, 4 bits): output, state and gradients.

The state is that of a run in its tenth step, past the warm-up, with three weights in ten frozen; while being timed it
moves on. What is compared is one step from a copy of it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import settings
import torch
from harness import benchmark
from quantizer_inputs import between_ties, tolerance
from suite import Implementation, Prepared, Results, Suite, Target
from torch import Tensor, nn

import tersor
from tersor.freezing import FreezeSchedule, LtsState, pack_mask, unpack_mask
from tersor.models.eager_freezing import EagerLtsWeight

BITS = 4
LEVELS = 2**BITS - 1
LOWER, UPPER = -1.2, 1.2
SCHEDULE = FreezeSchedule(batches_per_epoch=1, epochs=1, growth="fixing", rate=0.25)  # the same threshold in every step
STEP = 10


class Start(NamedTuple):
    """What every implementation starts from: floats in float32, ``frozen`` a bool mask."""

    weight: Tensor
    lower: Tensor
    upper: Tensor
    saved: Tensor
    distance: Tensor
    code: Tensor
    frozen: Tensor
    grad_output: Tensor


class Running(NamedTuple):
    """One implementation under way: its step, what that differentiates, and its state for comparison."""

    step: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    state: Callable[[], Results]


def make_inputs(size, dtype, device, generator):
    """Places between the ties, and distances that no rounding carries across the threshold of 1/4 level."""
    width = (UPPER - LOWER) / LEVELS
    weight, saved = (LOWER + between_ties(size, width, -2, LEVELS + 2, generator) for _ in range(2))
    bounds = torch.tensor(LOWER), torch.tensor(UPPER)
    distance = (torch.randint(0, 8, size, generator=generator) + 0.5) / (8 * LEVELS)
    frozen = torch.rand(size, generator=generator) < 0.3
    place = (torch.where(frozen, saved, weight) - LOWER) / (UPPER - LOWER)
    code = (place.clamp(0, 1) * LEVELS).round().to(torch.uint8)
    moved = torch.rand(size, generator=generator) < 0.05
    code = torch.where(moved, LEVELS - code, code)
    start = Start(weight, *bounds, saved, distance, code, frozen, torch.randn(size, generator=generator))
    return tuple(t.to(device) for t in start)


def traffic(size, element_bytes, direction):
    """Forward: weight, saved weight, distance, code and mask read; the last four, the output and the earlier mask
    written. Backward: incoming gradient, weight, saved weight and mask read, gradient written."""
    elements = math.prod(size)
    forward = 6 * element_bytes + 2 + 3 / 8
    backward = 4 * element_bytes + 1 / 8
    both = forward + (backward if direction == "forward_backward" else 0)
    return round(both * elements), elements * (15 if direction == "forward" else 25)


def leaves(weight, lower, upper):
    return tuple(t.detach().requires_grad_() for t in (weight, lower, upper))


def ours(saved):
    def begin(start):
        counters = torch.tensor([STEP, start.frozen.sum()], device=start.weight.device)
        kept = start.saved if saved else None
        weight = start.weight if saved else torch.where(start.frozen, start.saved, start.weight)
        state = LtsState(start.distance, start.code, pack_mask(start.frozen), counters, kept)
        free = leaves(weight, start.lower, start.upper)

        def step():
            return tersor.lts_quantize(free[0], state, *free[1:], BITS, SCHEDULE)

        def reached():
            return {"distance": state.distance, "frozen": unpack_mask(state.frozen, weight.shape)}

        return Running(step, free, reached)

    return lambda size: begin


def eager_module(start, kind=EagerLtsWeight):
    quantizer = kind(start.weight, BITS, SCHEDULE)
    quantizer.lower, quantizer.upper = nn.Parameter(start.lower), nn.Parameter(start.upper)
    quantizer.previous, quantizer.distance = start.code / LEVELS, start.distance
    quantizer.frozen, quantizer.saved, quantizer.step = start.frozen * 1.0, start.saved, STEP
    return quantizer


def eager_running(quantizer, call, start):
    free = start.weight.detach().requires_grad_(), quantizer.lower, quantizer.upper

    def reached():
        return {"distance": quantizer.distance, "frozen": quantizer.frozen != 0}

    return Running(lambda: call(free[0]), free, reached)


def eager(size):
    def begin(start):
        quantizer = eager_module(start)
        return eager_running(quantizer, quantizer, start)

    return begin


class OneStep(EagerLtsWeight):
    """With the step as a constant: torch.compile would compile every number of it anew, and give up after eight."""

    @property
    def step(self):
        return STEP

    @step.setter
    def step(self, value):
        pass


def compiled(size):
    def begin(start):
        quantizer = eager_module(start, OneStep)
        return eager_running(quantizer, torch.compile(quantizer, dynamic=False, fullgraph=True), start)

    return begin


def prepare(begin, inputs, dtype, direction):
    # In float64 other levels would be right.
    start = Start(*(t.float() if t.is_floating_point() else t for t in inputs))

    def copied():
        return begin(Start(*(t.clone() for t in start)))

    def run(running):
        if direction == "forward":
            with torch.no_grad():
                return running.step(), ()
        output = running.step()
        return output, torch.autograd.grad(output, running.leaves, start.grad_output)

    def results():
        running = copied()
        output, gradients = run(running)
        found = {"output": output.detach()} | {f"gradient {i}": g for i, g in enumerate(gradients)}
        return found | {name: state.double() for name, state in running.state().items()}

    timed = copied()
    forward = None if direction == "forward" else lambda: begin(start).step()
    return Prepared(lambda: run(timed), results, forward)


IMPLEMENTATIONS = [
    Implementation("tersor", ours(True), ours=True, note="the default backend, frozen weights' values kept apart"),
    Implementation(
        "without_saved", ours(False), ours=True, note="for FrozenSGD and FrozenAdamW, which leave frozen weights alone"
    ),
    Implementation("eager", eager, note="the published way: four float buffers, all replaced in every step"),
    Implementation("compiled", compiled, note="torch.compile of it, with the step as a constant"),
]

SUITE = Suite(
    operator="lts_quantize",
    sizes={"conv64": (64, 64, 3, 3)} | ({} if settings.QUICK else {"conv256": (256, 256, 3, 3)}),
    small=(6, 5, 3, 3),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours(True),
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["lts_quantize_forward", "lts_quantize_backward"],
    tolerance=tolerance,
    targets=[Target("lts_quantize/*/float32/*", "eager", 10)],
)

bench_lts_quantize = benchmark(SUITE)
