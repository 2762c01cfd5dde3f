"""Compact scores: every bit as of all scores, what is stored after an epoch, state dicts, resumption, refusals."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer

import tersor
from tersor.sparsity import NMConv2d, NMLinear, NMSchedule, NMScores, expand_, nm_mask, nm_remove_, nm_sparsify

PATTERNS = [(2, 4), (4, 8), (1, 16), (2, 8)]
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3),
}
EPOCHS, FINAL, STEPS = 7, 5, 6


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 16), (5, 7), (4, 12)]),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_bit_is_that_of_all_scores(
    pattern: tuple[int, int], share: float, dtype: torch.dtype, last: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    (n, m), count = pattern, math.comb(pattern[1], pattern[0])
    stored = max(1, round(share * count))
    weight, incoming = torch.randn(m, 5, 1, 3).to(dtype), torch.randn(m, 5, 1, 3).to(dtype)
    if last:
        weight = weight.to(memory_format=torch.channels_last)
    weight[0, 0, 0, 0] = math.inf
    numbers = torch.rand(15, count).argsort(1)[:, :stored].sort(1).values
    scores = (torch.randn(15, stored) * 2).round() / 2  # ties and zeros
    scores = scores.to(torch.float64 if dtype == torch.float64 else torch.float32)
    full = scores.new_zeros(15, count).scatter(1, numbers, scores)
    combinations = numbers.to(torch.uint8 if count <= 256 else torch.int16)
    assert torch.equal(nm_mask(scores, n, m, combinations), nm_mask(full, n, m))
    results = []
    for own, which in ((scores, combinations), (full, None)):
        leaves = weight.clone().requires_grad_(), own.clone().requires_grad_()
        output = nm_sparsify(*leaves, n, m, combinations=which)
        results.append((output, *torch.autograd.grad(output, leaves, incoming)))
    (output, grad_weight, grad_scores), (expected, *gradients) = results
    assert torch.equal(output, expected)
    assert torch.equal(grad_weight, gradients[0])
    torch.testing.assert_close(grad_scores, gradients[1].gather(1, numbers), rtol=0, atol=0, equal_nan=True)

    k = stored // 2
    marked = torch.where(scores == 0, -1000.0, scores)
    expected = marked.scatter(1, torch.sort(marked, dim=1, stable=True).indices[:, :k], 0.0)
    mask = nm_remove_(scores, k, n, m, combinations)
    assert torch.equal(scores, expected)
    assert torch.equal(mask, nm_mask(full.scatter(1, numbers, scores), n, m))


class Training:
    """A small network on its way through a schedule; the same weights and batches every time."""

    def __init__(self, pattern: tuple[int, int], optimizer: str, share: float | None, layers: str = "own") -> None:
        (n, m), self.pattern = pattern, pattern
        torch.manual_seed(0)
        if layers == "own":
            conv: nn.Module = NMConv2d(m, 8, 3, n=n, m=m, padding=1)
            linear: nn.Module = NMLinear(8 * 9, 16, n=n, m=m)
        else:
            conv, linear = nn.Conv2d(m, 8, 3, padding=1), nn.Linear(72, 16)
            for layer in (conv, linear):
                nn.utils.parametrize.register_parametrization(layer, "weight", NMScores(layer.weight, n, m))
        self.model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        compact = {} if share is None else {"compact": self.optimizer, "share": share}
        self.schedule = NMSchedule(self.model, FINAL, **compact)
        self.losses: list[Tensor] = []
        self.stored: list[int] = []
        self.returned = 0

    def step(self, epoch: int, number: int, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        generator = torch.Generator().manual_seed(100 * epoch + number)
        images = torch.randn(4, self.pattern[1], 3, 3, generator=generator)
        labels = torch.randint(16, (4,), generator=generator)
        self.schedule.step()
        loss = F.cross_entropy((forward or self.model)(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss)  # with its graph, as a training loop may keep it

    def epoch(self, epoch: int, forward: Callable[[Tensor], Tensor] | None = None) -> None:
        gone = [lowest(layer, k) for layer, k in zip(self.schedule.layers, self.schedule.removed, strict=True)]
        self.schedule.start_epoch(epoch)
        self.stored.append(self.schedule.layers[0].alpha.shape[1])
        for number in range(STEPS):
            self.step(epoch, number, forward)
            if self.schedule.compact is None:
                each = zip(self.schedule.layers, self.schedule.removed, gone, strict=True)
                self.returned += sum(int((mask & ~lowest(layer, k)).sum()) for layer, k, mask in each)

    def run(self, first: int = 0, forward: Callable[[Tensor], Tensor] | None = None) -> Training:
        for epoch in range(first, EPOCHS):
            self.epoch(epoch, forward)
        return self

    def equals(self, other: Training) -> bool:
        """All weights and scores, bit for bit."""
        ours, theirs = (expand_(copy.deepcopy(each.model)).state_dict() for each in (self, other))
        return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def lowest(layer: Any, k: int) -> Tensor:
    scores = layer.full_scores().clone()
    nm_remove_(scores, k, layer.n, layer.m)
    return scores == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_whole_schedule_bit_for_bit(pattern: tuple[int, int], optimizer: str) -> None:
    """What is stored changes nothing; and where nothing removed comes back, all is as published."""
    kept = Training(pattern, optimizer, 0.0).run()
    count = math.comb(pattern[1], pattern[0])
    assert set(kept.stored) == {count}
    for share in (0.5, 1.0):
        compact = Training(pattern, optimizer, share).run()
        assert compact.stored[0] == compact.stored[1] == count
        assert compact.stored[-1] == 1
        assert len(set(compact.stored)) >= 3
        assert compact.losses == kept.losses
        assert compact.equals(kept)
    published = Training(pattern, optimizer, None).run()
    if published.returned == 0:
        assert published.losses == kept.losses
        published.schedule.finish()
        kept.schedule.finish()
        assert published.equals(kept)
    assert published.returned == 0 or pattern[1] == 8  # so that most have been compared


def test_parametrizations_and_compiled_models() -> None:
    expected = Training((2, 4), "sgd", 0.0, "parametrizations").run()
    compact = Training((2, 4), "sgd", 0.5, "parametrizations").run()
    assert compact.stored[-1] == 1
    assert compact.equals(expected)
    compiled = Training((2, 4), "sgd", 0.5, "parametrizations")
    compiled.run(forward=torch.compile(compiled.model, backend="aot_eager", fullgraph=True))
    assert compiled.stored == compact.stored
    assert compiled.equals(expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved", [2, 4, 6])
def test_resumption_bit_for_bit(saved: int, optimizer: str) -> None:
    """From the state dicts, before an epoch and in the middle of one; into a model that is fresh or compact."""
    whole = Training((4, 8), optimizer, 0.5)
    for epoch in range(saved):
        whole.epoch(epoch)
    whole.schedule.start_epoch(saved)
    whole.step(saved, 0)
    model, state = copy.deepcopy(whole.model.state_dict()), copy.deepcopy(whole.optimizer.state_dict())
    assert ("0.combinations" in model) == (saved > 2)
    again = [Training((4, 8), optimizer, 0.5), Training((4, 8), optimizer, 0.5).run()]
    for each in again:
        for parameter in each.model.parameters():
            parameter.requires_grad_(True)
        each.model.load_state_dict(model)
        each.optimizer.load_state_dict(copy.deepcopy(state))  # which would share its tensors
    for each in (whole, *again):
        each.schedule.start_epoch(saved)
        for number in range(1, STEPS):
            each.step(saved, number)
        each.run(saved + 1)
    assert all(each.equals(whole) for each in again)


def test_published_keys_and_a_way_back() -> None:
    training = Training((4, 8), "adamw", 0.5)
    for epoch in range(4):
        training.epoch(epoch)
    layer: Any = training.model[0]
    assert layer.alpha.shape == (72, 16)
    exported = expand_(copy.deepcopy(training.model)).state_dict()
    assert {"0.weight", "0.bias", "0.alpha", "0.index_list"} == {key for key in exported if key.startswith("0.")}
    assert exported["0.alpha"].shape == (72, 70)
    assert torch.equal(exported["0.alpha"].gather(1, layer.combinations.long()), layer.alpha)
    assert (exported["0.alpha"].count_nonzero(1) <= 16).all()
    assert layer.alpha.shape == (72, 16), "the copy was expanded"

    mask = layer.sparse_weight() != 0
    first = training.optimizer.state[layer.alpha]["exp_avg"].clone()
    numbers = layer.combinations
    assert expand_(training.model, training.optimizer) is training.model
    assert layer.combinations is None
    assert torch.equal(layer.sparse_weight() != 0, mask)
    moments = training.optimizer.state[layer.alpha]["exp_avg"]
    assert torch.equal(moments.gather(1, numbers.long()), first)
    assert int(moments.count_nonzero()) == int(first.count_nonzero())
    training.step(4, 0)  # and goes on

    fresh = Training((4, 8), "adamw", 0.5).run()  # compact: a full checkpoint makes it full again
    fresh.model.load_state_dict(exported)
    assert torch.equal(fresh.model[0].alpha, exported["0.alpha"])  # type: ignore[arg-type]


def test_parameters_and_their_order_stay() -> None:
    training = Training((2, 4), "sgd", 1.0)
    before = list(training.model.parameters())
    training.run()
    assert all(a is b for a, b in itertools.zip_longest(before, training.model.parameters()))
    layer: Any = training.model[0]
    state = training.optimizer.state[layer.alpha]
    assert state["momentum_buffer"].shape == layer.alpha.shape == (72, 1)
    assert layer.combinations.dtype == torch.uint8
    training.schedule.finish()
    expected = layer.sparse_weight()
    packed: Any = tersor.sparsity.convert_(training.model)
    assert torch.equal(packed[0].dense_weight(), expected)


def test_damaged_numbers_are_refused() -> None:
    training = Training((2, 4), "sgd", 1.0).run()
    saved = training.model.state_dict()
    for numbers, message in (
        (torch.full((72, 1), 6, dtype=torch.uint8), "must ascend from 0 to at most 5"),
        (torch.zeros(72, 2, dtype=torch.uint8), "must ascend from 0 to at most 5"),
        (torch.zeros(71, 1, dtype=torch.uint8), r"must be torch.uint8 of shape \(72, 1 to 6\)"),
        (torch.zeros(72, 7, dtype=torch.uint8), r"must be torch.uint8 of shape \(72, 1 to 6\)"),
        (torch.zeros(72, 1, dtype=torch.int16), r"got torch.int16 \(72, 1\)"),
    ):
        with pytest.raises(RuntimeError, match=f"0.combinations {message}" if message[0] == "m" else message):
            Training((2, 4), "sgd", None).model.load_state_dict(saved | {"0.combinations": numbers})


def test_optimisers_that_are_refused() -> None:
    model = nn.Sequential(NMLinear(8, 8))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Sequential"):
        NMSchedule(model, 3, compact=model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share must be from 0 to 1, got 1\.5"):
        NMSchedule(model, 3, compact=SGD(model.parameters(), 0.1), share=1.5)
    with pytest.raises(ValueError, match="must train the scores of all layers, got one without NMLinear"):
        NMSchedule(model, 3, compact=SGD([model[0].weight], 0.1))  # type: ignore[list-item]
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match="compact must be None under DistributedDataParallel"):
        NMSchedule(wrapped, 3, compact=SGD(model.parameters(), 0.1))
    NMSchedule(wrapped, 3)
    sharded = nn.Sequential(NMLinear(8, 8))
    sharded[0].alpha.full_tensor = None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="scores must not be sharded"):
        NMSchedule(sharded, 3, compact=SGD(sharded.parameters(), 0.1))
    with pytest.raises(ValueError, match="the optimiser must keep the state of each parameter apart, got LBFGS"):
        NMSchedule(model, 3, compact=LBFGS(model.parameters()))
    optimizer = Adafactor(model.parameters())
    schedule = NMSchedule(model, 3, compact=optimizer)
    model(torch.randn(2, 8)).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"of the scores' shape \(16, 6\), got row_var \(16, 1\) of Adafactor"):
        schedule.start_epoch(2)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(8, 0)}, ValueError, r"scores must have shape \(8, 1 to 6\), got \(8, 0\)"),
        ({"scores": torch.zeros(8, 7)}, ValueError, r"scores must have shape \(8, 1 to 6\), got \(8, 7\)"),
        ({"combinations": torch.zeros(8, 2, dtype=torch.int64)}, TypeError, r"must be torch\.uint8, got torch\.int64"),
        ({"combinations": torch.zeros(8, 3, dtype=torch.uint8)}, ValueError, r"combinations must have the shape"),
        ({"combinations": [0]}, TypeError, "combinations must be a tensor, got list"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    numbers = torch.tensor([[0, 3]] * 8, dtype=torch.uint8)
    arguments = {"weight": torch.zeros(4, 8), "scores": torch.ones(8, 2), "n": 2, "m": 4, "combinations": numbers}
    arguments |= change
    with pytest.raises(error, match=message):
        nm_sparsify(**arguments)  # type: ignore[arg-type]


def test_numbers_of_no_combination_are_an_error_on_the_cpu(run: tuple[str, str]) -> None:
    backend, device = run[1], run[0]
    if device != "cpu" or backend == "triton":
        pytest.skip("a GPU kernel keeps nothing for them")
    weight, scores = torch.ones(1, 4), torch.ones(1, 2)
    wrong = torch.tensor([[0, 6]], dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        nm_sparsify(weight, scores, 2, 4, combinations=wrong)
    with pytest.raises(RuntimeError):
        nm_remove_(scores, 0, 2, 4, wrong)
    with pytest.raises(RuntimeError):
        nm_remove_(torch.ones(1, 2), 0, 4, 12, torch.tensor([[-1, 0]], dtype=torch.int16))
