"""What the tests of the super-resolution networks share: sizes, written formulas, a layer as a converter makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tersor
from tersor.models._super_resolution import SuperResolution, attention_transfer, load_full_precision
from tersor.models.edsr import MeanShift

GATE_KEYS = [f"atten_c.2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
ACTIVATION_KEYS = ["alpha_upper", "alpha_lower", "max_val", "min_val", "is_dynamic"]
ACTIVATION_KEYS += ["atten_c.1.weight", *GATE_KEYS, "atten_c.5.weight"]
NORM_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def images(batch: int = 2, height: int = 6, width: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).to(dtype)


def size(build: Callable[..., nn.Module], **options: Any) -> tuple[int, int]:
    """Keys and parameters."""
    with torch.device("meta"):
        model = build(**options)
    return len(model.state_dict()), sum(p.numel() for p in model.parameters())


def macs(build: Callable[..., nn.Module], pixels: int = 48, **options: Any) -> tuple[float, float]:
    """Giga multiply-adds of one image in quantised and in other convolutions, without gates and mean shifts."""
    with torch.device("meta"):
        model = build(**options).eval()
        image = torch.empty(1, 3, pixels, pixels)
    counts = {True: 0, False: 0}

    def count(module: nn.Conv2d, _: Any, output: Tensor) -> None:
        if not isinstance(module, MeanShift):
            counts[isinstance(module, tersor.QuantizedConv2d)] += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
        if isinstance(module, (tersor.BoundedActivation, tersor.QuantizedConv2d)):
            module.stage = "float"  # the count needs no values, and meta tensors have none
    model(image)
    return round(counts[True] / 1e9, 3), round(counts[False] / 1e9, 3)


def prepared(model: SuperResolution, dynamic: tuple[str, ...] = ()) -> SuperResolution:
    """In float64 and eval mode, with bounds calibrated on other images, and random numbers in all norms."""
    model.double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.4)
    schedule = tersor.BoundsSchedule(model, dynamic_epoch=2)
    schedule.start_epoch(2)
    for activation in schedule.activations:
        activation.pending = True
    with torch.no_grad():
        model(images(3, 8, 5))
    for name in dynamic:
        model.get_submodule(name).dynamic = True
    return model.eval()


class Formulas:
    """Layers as the published networks compute them, by the names in a model's state dict, in eval mode."""

    def __init__(self, model: nn.Module, bits: int, mode: str) -> None:
        self.state, self.bits, self.mode = model.state_dict(keep_vars=True), bits, mode

    def act(self, name: str, x: Tensor) -> Tensor:
        lower, upper = self.state[f"{name}.alpha_lower"], self.state[f"{name}.alpha_upper"]
        if self.state[f"{name}.is_dynamic"].item():
            norm = nn.BatchNorm2d(32).to(x).eval()
            norm.load_state_dict({key: self.state[f"{name}.atten_c.2.{key}"] for key in NORM_KEYS})
            weights = (self.state[f"{name}.atten_c.{i}.weight"] for i in (1, 5))
            scale, _ = tersor.dynamic_gate(x, next(weights), norm, next(weights))
            upper, lower = scale[:, 0].view(-1, 1, 1, 1) * upper, scale[:, 1].view(-1, 1, 1, 1) * lower
        return tersor.fake_quantize_bounds(x, lower, upper, self.bits)

    def conv(self, name: str, x: Tensor, quantized: bool = False) -> Tensor:
        weight = self.state[f"{name}.weight"]
        if quantized:
            weight = tersor.weight_fake_quantize(weight, self.bits, self.mode)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (self.state[f"{name}.{key}"].view(-1, 1, 1) for key in NORM_KEYS[:4])
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def prelu(self, name: str, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.state[f"{name}.weight"] * x)


def compare(model: nn.Module, formula: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Both outputs and every parameter's gradient, in float64."""
    input = images()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours, theirs = model(input), formula(input)
    grads = [
        torch.autograd.grad(sr.sin().sum() + feature.sum(), list(parameters.values()), allow_unused=True)
        for sr, feature in (ours, theirs)
    ]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for name, a, b in zip(parameters, *grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class Converted(nn.Module):
    """A layer as a converter leaves it: takes the unquantised input."""

    quantizes_input = True

    def __init__(self, activation: nn.Module, layer: nn.Module, relu: bool) -> None:
        super().__init__()
        self.activation, self.layer, self.relu, self.calls = activation, layer, relu, 0

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        assert relu == self.relu
        self.calls += 1
        return self.layer(self.activation(input, relu=relu))


def check_conversion(model: SuperResolution) -> None:
    """Every pair replaced, one by one as a converter does it: the same result, each layer called once."""
    before = model(images())
    pairs, converted = list(model.quantized_pairs()), []
    for activation, layer, relu in pairs:
        first, second = model.get_submodule(activation), model.get_submodule(layer)
        assert isinstance(first, tersor.BoundedActivation)
        assert isinstance(second, tersor.QuantizedConv2d)
        assert second.in_channels == first.channels
        converted.append(Converted(first, second, relu))
        model.set_submodule(layer, converted[-1])
    after = model(images())
    assert [layer.calls for layer in converted] == [1] * len(pairs)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not list(model.quantized_pairs()), "what is converted is no pair any more"


def check_teacher_and_student(build: Callable[..., SuperResolution], bits: int = 2) -> None:
    """A teacher's weights in the student: the same output while nothing is quantised, another one when it is."""
    teacher, student = build(quantized=False).double().eval(), build(bits=bits).double().eval()
    bounds = {name: p.clone() for name, p in student.named_parameters() if "alpha" in name or "atten_c" in name}
    load_full_precision(student, teacher.state_dict())
    assert all(torch.equal(p, bounds[n]) for n, p in student.named_parameters() if n in bounds)
    schedule = tersor.BoundsSchedule(student)
    schedule.start_epoch(1)
    for a, b in zip(teacher(images()), student(images()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    schedule.record()
    assert (schedule.intensity == 0).all()
    schedule.start_epoch(2)
    assert not torch.equal(teacher(images())[0], student.eval()(images())[0])


def check_schedule(model: SuperResolution, untouched: tuple[str, ...] = ()) -> None:
    """The whole schedule with all three losses: which parameters get a gradient, and that steps lower the loss.

    ``untouched`` are beginnings of names that get none beside the frozen ones and those of the gates.
    """
    input, target = images(2, 6, 6, torch.float32), images(2, 6 * model.scale, 6 * model.scale, torch.float32)
    schedule = tersor.BoundsSchedule(model, dynamic_ratio=0.5, dynamic_epoch=3)
    schedule.start_epoch(1)
    with torch.no_grad():
        for batch in (input, input.flip(0) / 2):
            teacher = torch.randn_like(model(batch)[1])
            schedule.record()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for epoch in (2, 3):
        schedule.start_epoch(epoch)
        for _ in range(4):
            sr, feature = model(input)
            loss = F.l1_loss(sr, target) + 1000 * attention_transfer(feature, teacher) + schedule.regularization()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        gated = {name for name, m in model.named_modules() if isinstance(m, tersor.BoundedActivation) and m.dynamic}
        assert gated, "half of the activations"
        for name, parameter in model.named_parameters():
            owner, _, gate = name.partition(".atten_c.")
            learns = parameter.requires_grad and not name.startswith(untouched)
            assert (parameter.grad is not None) == (learns and (not gate or (gate == "5.weight" and owner in gated)))
            assert parameter.isfinite().all(), name
    assert losses[-1] < losses[0]
