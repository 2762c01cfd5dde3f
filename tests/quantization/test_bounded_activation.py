"""The activation quantiser, its gate and its schedule."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.quantization import (
    BoundedActivation,
    BoundsSchedule,
    QuantizedConv2d,
    dynamic_gate,
    fake_quantize_bounds,
    percentile_bounds,
)


class Net(nn.Module):
    def __init__(self, bits: int = 2, **options) -> None:
        super().__init__()
        self.first = BoundedActivation(4, bits, **options)
        self.conv = QuantizedConv2d(4, 4, 3, padding=1, bits=bits, mode="percentile")
        self.second = BoundedActivation(4, bits, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.conv(self.first(x)))


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 6, 6, generator=generator) * (1 + i) for i in range(count)]


def recorded(bits: int = 2, **options) -> tuple[Net, BoundsSchedule]:
    torch.manual_seed(0)
    net = Net(bits, **options)
    schedule = BoundsSchedule(net, dynamic_ratio=0.5)
    schedule.start_epoch(1)
    with torch.no_grad():
        for batch in batches(3):
            net(batch)
            schedule.record()
    return net, schedule


def train(net: Net, schedule: BoundsSchedule, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        (F.l1_loss(net(x), x) + schedule.regularization()).backward()
        optimizer.step()


def test_first_epoch_passes_through_and_records() -> None:
    net, schedule = recorded()
    x = batches(1)[0]
    assert torch.equal(net.first(x), x)
    assert torch.equal(net.conv(x), F.conv2d(x, net.conv.weight, net.conv.bias, padding=1))
    assert not net.training
    extremes = torch.tensor([[b.max().item(), b.min().item()] for b in batches(3)], dtype=torch.float64)
    torch.testing.assert_close(schedule.intensity[0], extremes.var(0, correction=0).sum(), rtol=1e-6, atol=0)


def test_the_most_varied_become_dynamic() -> None:
    net, schedule = recorded()
    schedule.start_epoch(2)
    best = int(schedule.intensity.argmax())
    assert [net.first.dynamic, net.second.dynamic] == [best == 0, best == 1]
    assert [net.first.is_dynamic.item(), net.second.is_dynamic.item()] == [best == 0, best == 1]


@pytest.mark.parametrize(("bits", "calibrate", "expected"), [(2, None, True), (4, None, False), (4, True, True)])
def test_calibration_at_the_first_training_batch(bits: int, calibrate: bool | None, expected: bool) -> None:
    net, schedule = recorded(bits, calibrate=calibrate)
    schedule.start_epoch(2)
    first, second = batches(2, seed=1)
    net(first)
    lower, upper = percentile_bounds(first)
    assert torch.equal(net.first.alpha_lower, lower if expected else torch.tensor([-10.0]))
    assert torch.equal(net.first.alpha_upper, upper if expected else torch.tensor([10.0]))
    before = net.first.alpha_upper.clone()
    net(second)
    assert torch.equal(net.first.alpha_upper, before), "once only"


def test_static_then_dynamic_bounds() -> None:
    net, schedule = recorded()
    schedule.start_epoch(2)
    net.first.dynamic, net.second.dynamic = True, False
    x = batches(1)[0]
    output = net.first(x)
    static = fake_quantize_bounds(x, net.first.alpha_lower, net.first.alpha_upper, 2)
    assert torch.equal(output, static), "the gate runs, the bounds stay"
    assert schedule.regularization().item() == pytest.approx(net.first.logits.square().mean().item())
    schedule.regularization().backward()
    assert net.first.atten_c[2].weight.grad.abs().sum() > 0
    assert net.first.atten_c[0].weight.grad is None
    schedule.start_epoch(6)
    assert not torch.equal(net.first(x), static)
    assert schedule.regularization().item() == 0


def test_evaluation_before_the_dynamic_stage_is_static() -> None:
    net, schedule = recorded()
    schedule.start_epoch(3)
    net.first.dynamic = True
    net(batches(1)[0])
    net.eval()
    x, statistics = batches(1)[0], net.first.atten_c[1].running_mean.clone()
    assert torch.equal(net.first(x), fake_quantize_bounds(x, net.first.alpha_lower, net.first.alpha_upper, 2))
    assert torch.equal(net.first.atten_c[1].running_mean, statistics)


@pytest.mark.parametrize("stop", [1, 2, 3, 5], ids=lambda n: f"after_{n}_steps")
def test_resumes_exactly(stop: int) -> None:
    """Killed in the middle of an epoch, in any stage, also before calibration has happened."""
    data = batches(6, seed=3)

    def stages(net: Net, schedule: BoundsSchedule, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
        for step in range(begin, end):
            if step in (0, 2, 4):
                schedule.start_epoch({0: 2, 2: 3, 4: 6}[step])
            train(net, schedule, optimizer, data[step : step + 1])

    net, schedule = recorded()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    stages(net, schedule, optimizer, 0, stop)
    file = io.BytesIO()
    torch.save([net.state_dict(), schedule.state_dict(), optimizer.state_dict()], file)
    stages(net, schedule, optimizer, stop, 6)

    resumed = Net()
    again = BoundsSchedule(resumed, dynamic_ratio=0.5)
    other = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    file.seek(0)
    for target, state in zip((resumed, again, other), torch.load(file, weights_only=True), strict=True):
        target.load_state_dict(state)
    stages(resumed, again, other, stop, 6)
    for (name, a), b in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resumes_before_calibration() -> None:
    net, schedule = recorded()
    schedule.start_epoch(2)
    resumed = Net()
    again = BoundsSchedule(resumed, dynamic_ratio=0.5)
    resumed.load_state_dict(net.state_dict())
    again.load_state_dict(schedule.state_dict())
    x = batches(1)[0]
    assert torch.equal(net(x), resumed(x))
    assert torch.equal(net.first.alpha_upper, resumed.first.alpha_upper)


def test_gate_depends_on_batch_mates_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(32).eval()
    weights = torch.randn(32, 4, 1, 1), torch.randn(2, 32, 1, 1)
    x = torch.randn(3, 4, 5, 5)
    for per_sample in (False, True):
        together = dynamic_gate(x, weights[0], norm, weights[1], per_sample=per_sample)[0]
        alone = torch.cat([dynamic_gate(s, weights[0], norm, weights[1], per_sample=per_sample)[0] for s in x.split(1)])
        assert torch.equal(together, alone) is per_sample


def test_gate_is_in_float32_under_autocast() -> None:
    norm, weights = nn.BatchNorm2d(32).eval(), (torch.randn(32, 4, 1, 1), torch.randn(2, 32, 1, 1))
    x = torch.randn(3, 4, 5, 5)
    expected = dynamic_gate(x, weights[0], norm, weights[1])
    with torch.autocast("cpu", torch.bfloat16):
        given = dynamic_gate(x, weights[0], norm, weights[1])
    for e, g in zip(expected, given, strict=True):
        assert torch.equal(e, g)


def test_bad_gates() -> None:
    norm, hidden, output = nn.BatchNorm2d(32), torch.randn(32, 4, 1, 1), torch.randn(2, 32, 1, 1)
    x = torch.randn(2, 4, 3, 3)
    for arguments, message in (
        ((x[0], hidden, norm, output), r"input must be \(N, C, H, W\), got shape \(4, 3, 3\)"),
        ((x[:, :3], hidden, norm, output), r"hidden_weight must be \(32, 3, 1, 1\), got shape \(32, 4, 1, 1\)"),
        ((x, hidden, norm, output[:1]), r"output_weight must be \(2, 32, 1, 1\), got shape \(1, 32, 1, 1\)"),
        ((torch.ones_like(x), hidden, norm, output), "the channels' means are to span a range: lower must be less"),
    ):
        with pytest.raises(ValueError, match=f"dynamic_gate.*{message}"):
            dynamic_gate(*arguments)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        BoundedActivation(0)
    with pytest.raises(ValueError, match="bits must be 2 to 8, or 32 for none, got 1"):
        BoundedActivation(4, 1)
    with pytest.raises(ValueError, match="model must hold a BoundedActivation, got Linear without one"):
        BoundsSchedule(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"dynamic_ratio must be from 0 to 1, got 1\.5"):
        BoundsSchedule(Net(), 1.5)
    schedule = BoundsSchedule(Net())
    with pytest.raises(RuntimeError, match="only in epoch 1, this is epoch 0"):
        schedule.record()
    state = copy.deepcopy(schedule.state_dict())
    state["pending"] = [True]
    with pytest.raises(ValueError, match="state must be of 2 activations, got 1"):
        schedule.load_state_dict(state)


def test_can_be_copied_after_a_training_step() -> None:
    activation = BoundedActivation(4)
    activation.dynamic = True
    x = torch.randn(2, 4, 3, 3)
    activation(x).sum().backward()
    assert activation.logits is not None
    twin = copy.deepcopy(activation)
    assert twin.logits is None
    assert torch.equal(twin.eval()(x), activation.eval()(x))


def test_half_precision_input_keeps_its_dtype() -> None:
    activation = BoundedActivation(4, 4)
    activation.dynamic = True
    x = torch.randn(2, 4, 3, 3).bfloat16()
    output = activation(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert activation.alpha_upper.grad.dtype == torch.float32


def test_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    activation = BoundedActivation(4, 4)
    activation.dynamic = True
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(activation)(x)
    compiled = torch.compile(activation, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
