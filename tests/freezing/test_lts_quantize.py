"""Quantising and freezing: bit by bit like the reference over whole trainings, blocks, resumption, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantizers import SIZES, parameter, values
from straight_through import unit
from subject import Subject
from torch import Tensor

import tersor
from tersor import _backends
from tersor.freezing import FreezeSchedule, LtsState, LtsWeight, lts_quantize, lts_state, mask_size, unpack_mask
from tersor.models.eager_freezing import EagerLtsWeight

SCHEDULE = FreezeSchedule(batches_per_epoch=2, epochs=5, warmup_epochs=1, momentum=0.8)
PATTERN = 0x92  # of each eight elements, those that are frozen


def pattern(weight: Tensor) -> Tensor:
    return (PATTERN >> torch.arange(weight.numel(), device=weight.device) % 8 & 1).bool().view(weight.shape)


def state_of(weight: Any) -> LtsState:
    state = lts_state(weight.detach())
    state.frozen.copy_(torch.zeros_like(state.frozen) + PATTERN)
    return state


def _function(weight: Any, lower: Tensor, upper: Tensor) -> Tensor:
    strided = isinstance(weight, Tensor) and weight.is_floating_point() and weight.layout == torch.strided
    state = state_of(weight if strided else torch.zeros(1, 1, 1, 1))
    return lts_quantize(weight, state, lower, upper, 3, SCHEDULE)


def _exact(weight: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Frozen elements have the saved value 0 here, no gradient of their own, and keep moving the bounds."""
    return unit(torch.where(pattern(weight), 0, weight), lower, upper, 3, signed=True)


def _inputs(size: Any, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    bounds = [parameter(size, "", value, 0, dtype, device) for value in (-1.25, 1.5)]
    return values(size, dtype, device), *bounds


def _raw(name: str, size: Any, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    weight, lower, upper = _inputs(size, dtype, device)
    if name.endswith("_backward"):
        return torch.ones_like(weight), weight, torch.zeros_like(weight), lower, upper, state_of(weight).frozen
    return weight, lower, upper, *state_of(weight), 3, True, "linear", 0.1, 0.8, 2, 10, 1, 1, 1.0


SUBJECTS = [
    Subject(
        function=_function,
        exact=_exact,
        inputs=_inputs,
        options=(),
        operators=("lts_quantize_forward", "lts_quantize_backward"),
        raw=_raw,
        sizes=SIZES,
        quantizer=True,
        changes=True,
        name="lts_quantize",
    )
]


def train(backend: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, **options: Any) -> list[list[Tensor]]:
    """Ten steps with weights that wander; per step the output, the gradients and the whole state."""
    generator = torch.Generator().manual_seed(seed)
    bits, saved, frozen_step = options.pop("bits"), options.pop("saved"), options.pop("frozen_step")
    schedule = FreezeSchedule(2, 5, 1, rate=0.3, momentum=0.8, tile=(8, 3), quantile=0.6, **options)
    base = torch.randn(shape, generator=generator)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    state, results = None, []
    with tersor.use_backend(backend):
        for _ in range(10):
            weight = (base + 0.05 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
            state = state or lts_state(weight, saved=saved, frozen_step=frozen_step)
            lower, upper = (torch.tensor(v, dtype=exact, requires_grad=True) for v in (-1.2, 1.1))
            output = lts_quantize(weight, state, lower, upper, bits, schedule)
            incoming = torch.randn(shape, generator=generator).to(dtype)
            gradients = torch.autograd.grad(output, (weight, lower, upper), incoming)
            results.append([output.detach(), *gradients, *(t.clone() for t in state if t is not None)])
    return results


@given(
    shape=st.sampled_from([(5,), (1, 1), (3, 0), (20, 7, 3, 3), (64, 100), (9, 130, 1, 2), (2, 20011)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    granularity=st.sampled_from(["element", "tile", "channel", "layer"]),
    growth=st.sampled_from(["fixing", "linear", "sine"]),
    bits=st.sampled_from([2, 3, 8]),
    saved=st.booleans(),
    frozen_step=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_whole_trainings_equal_the_reference_bit_by_bit(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, **options: Any
) -> None:
    if _backends.running("lts_quantize_forward", "cpu") != "native":
        pytest.skip("no C++ kernels")
    pairs = zip(
        train("native", shape, dtype, seed, **options), train("reference", shape, dtype, seed, **options), strict=True
    )
    for given_step, expected_step in pairs:
        for i, (given_tensor, expected) in enumerate(zip(given_step, expected_step, strict=True)):
            if i in (2, 3):  # sums
                torch.testing.assert_close(given_tensor, expected, rtol=1e-5, atol=1e-3)
            else:
                assert torch.equal(given_tensor, expected), i
        frozen, counters = given_step[6], given_step[7]
        mask = unpack_mask(frozen, shape)
        assert counters[1] == mask.sum(), "the count is that of the bits"
        if frozen.numel():
            assert (int(frozen[-1]) >> ((mask.numel() - 1) % 8 + 1)) == 0, "bits after the last element stay 0"


@pytest.mark.parametrize("growth", ["fixing", "linear", "sine"])
def test_evolves_as_the_eager_way(growth: str, run: tuple[str, str]) -> None:
    schedule = FreezeSchedule(3, 6, 1, growth, 0.3, 0.9)
    base = torch.randn(20, 7, 3, 3, device=run[0])
    eager, ours = EagerLtsWeight(base, 2, schedule).to(run[0]), LtsWeight(base, 2, schedule, frozen_step=True)
    for module in (eager, ours):
        with torch.no_grad():
            module.lower.fill_(-1.5)
            module.upper.fill_(1.4)
    for _ in range(18):
        weight, incoming = base + 0.1 * torch.randn_like(base), torch.randn_like(base)
        results = []
        for module in (eager, ours):
            own = weight.clone().requires_grad_()
            output = module(own)
            results.append((output, *torch.autograd.grad(output, (own, module.lower, module.upper), incoming)))
        for e, o in zip(*results, strict=True):
            torch.testing.assert_close(o, e, rtol=1e-5, atol=1e-4)
        assert ours.frozen_step is not None
        assert torch.equal(eager.frozen, ours.frozen_step.float())
        assert torch.equal(eager.distance, ours.distance)
    assert 0.3 < int(ours.counters[1]) / base.numel() < 1


def test_a_frozen_block_is_frozen_as_a_whole() -> None:
    weight = torch.randn(16, 12)
    schedule = FreezeSchedule(1, 20, momentum=0.5, granularity="tile", tile=(4, 5), quantile=0.5)
    state = lts_state(weight)
    for _ in range(14):
        lts_quantize(weight, state, torch.tensor(-2.0), torch.tensor(2.0), 2, schedule)
    mask = unpack_mask(state.frozen, weight.shape)
    shares = {mask[r : r + 4, c : c + 5].float().mean().item() for r in range(0, 16, 4) for c in range(0, 12, 5)}
    assert shares <= {0.0, 1.0}
    assert mask.any()


def test_two_forward_passes_before_one_backward_pass() -> None:
    """As with gradient accumulation: the second call changes the state that the first one's gradient depends on."""
    torch.manual_seed(0)
    weight, lower, upper = torch.randn(30, 9), torch.tensor(-1.0), torch.tensor(1.0)
    saved = torch.randn(30, 9)
    expected, given_gradients = [], []
    for together in (False, True):
        state = state_of(weight)
        state.saved.copy_(saved)  # type: ignore[union-attr]
        inputs = [[t.clone().requires_grad_() for t in (weight + i, lower, upper)] for i in (0, 0.3)]
        if together:
            outputs = [lts_quantize(w, state, l, u, 2, SCHEDULE) for w, l, u in inputs]
            given_gradients = [torch.autograd.grad(o.sum(), i) for o, i in zip(outputs, inputs, strict=True)]
        else:
            for w, l, u in inputs:
                expected.append(torch.autograd.grad(lts_quantize(w, state, l, u, 2, SCHEDULE).sum(), (w, l, u)))
    for e, g in zip(expected, given_gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(e, g, strict=True))


def test_evaluation_changes_only_the_saved_weight() -> None:
    weight = torch.randn(10, 9)
    state = state_of(weight)
    before = [t.clone() for t in state if t is not None]
    lts_quantize(weight, state, torch.tensor(-1.0), torch.tensor(1.0), 4)
    for name, old, new in zip(("distance", "code", "frozen", "counters"), before, state, strict=False):
        assert torch.equal(old, new), name  # type: ignore[arg-type]
    assert torch.equal(state.saved, torch.where(pattern(weight), 0, weight))  # type: ignore[arg-type]
    assert lts_quantize(weight, state, torch.tensor(0.0), torch.tensor(0.0), 32) is weight


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lower": torch.tensor(1.0)}, ValueError, "lower must be less than upper"),
        ({"upper": torch.tensor(float("nan"))}, ValueError, "upper must be finite"),
        ({"lower": torch.zeros(10, 1)}, ValueError, r"lower must have one element, got shape \(10, 1\)"),
        ({"bits": 9}, ValueError, "bits must be 2 to 8, or 32"),
        ({"bits": 2.0}, TypeError, "bits must be an int"),
        ({"state": None}, TypeError, "state must be an LtsState, got NoneType"),
        ({"state": lts_state(torch.zeros(9, 10))}, ValueError, r"state.distance must have the shape of weight"),
        ({"state": lts_state(torch.zeros(10, 10))}, ValueError, r"frozen must have shape \(12,\)"),
        (
            {"state": lts_state(torch.zeros(10, 9).double())},
            TypeError,
            r"state.distance must be a torch.float32 tensor",
        ),
        ({"weight": torch.zeros(())}, ValueError, "at least one dimension"),
        ({"weight": torch.zeros(10, 9, dtype=torch.int32)}, TypeError, "must be float16"),
        ({"schedule": "linear"}, TypeError, "schedule must be a FreezeSchedule or None, got str"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    weight = torch.randn(10, 9)
    arguments = {"weight": weight, "state": lts_state(weight), "lower": torch.tensor(-1.0), "upper": torch.tensor(1.0)}
    with pytest.raises(error, match=message):
        lts_quantize(**(arguments | {"bits": 2} | change))


def test_direct_calls_with_wrong_state_do_not_reach_memory() -> None:
    weight, lower, upper = torch.randn(10, 9), torch.tensor(-1.0), torch.tensor(1.0)
    good = [*lts_state(weight)]
    constants = 3, True, "linear", 0.1, 0.8, 2, 10, 1, 1, 1.0
    for i, bad in enumerate(
        [torch.zeros(9), torch.zeros(90, dtype=torch.uint8)[::2], torch.zeros(3, dtype=torch.uint8)]
    ):
        state = [bad if i == j else t for j, t in enumerate(good)]
        with pytest.raises(RuntimeError, match=r"must be a contiguous|shape|size"):
            torch.ops.tersor.lts_quantize_forward(weight, lower, upper, *state, *constants)


def test_memory_of_the_state() -> None:
    weight = torch.zeros(64, 64)
    state = lts_state(weight, saved=False)
    assert sum(t.numel() * t.element_size() for t in state if t is not None) == 4096 * 5 + mask_size(weight.shape) + 16
