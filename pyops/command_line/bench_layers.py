"""The layers that ``tersor bench`` times: their kinds, how they are compressed, and the check before the clock."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tersor import compress
from tersor.command_line.timing import medians
from tersor.compress import Binarize, FakeQuantize, NMSparse, Recipe, Rule

# By magnitude ("srste"), so that no training is needed; what is timed is the same for all methods.
WAYS: dict[str, tuple[Any, ...]] = {
    "8 bits": (FakeQuantize(8),),
    "4 bits": (FakeQuantize(4),),
    "2 bits": (FakeQuantize(2),),
    "2:4": (NMSparse(2, 4, "srste"),),
    "1:4": (NMSparse(1, 4, "srste"),),
    "4 bits, 2:4": (FakeQuantize(4), NMSparse(2, 4, "srste")),
    "1 bit": (Binarize("ste"),),
}
TOLERANCE = 1e-4  # of the largest output: both sum float32 products of the same values, in another order


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of layer.

    Attributes:
        kind: ``"conv"`` or ``"linear"``.
        sizes: what torch's layer is called with: channels, kernel, stride, padding, dilation, groups; or features.
        shape: of one sample of the input.
        count: how often a model has it.
    """

    kind: str
    sizes: tuple[Any, ...]
    shape: tuple[int, ...]
    count: int = dataclasses.field(default=1, compare=False)

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(*self.sizes) if self.kind == "conv" else nn.Linear(*self.sizes)).eval()

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.shape)

    def __str__(self) -> str:
        if self.kind == "linear":
            rows = f" {torch.Size(self.shape[:-1]).numel()} rows" if self.shape[1:] else ""
            return f"linear {self.sizes[0]}>{self.sizes[1]}{rows}"
        inputs, outputs, kernel, stride, *_, groups = self.sizes
        window = f"conv {kernel[0]}x{kernel[1]}" + (f"/{stride[0]}" if stride[0] > 1 else "")
        grouped = f" groups {groups}" if groups > 1 else ""
        return f"{window} {inputs}>{outputs}{grouped} {self.shape[1]}x{self.shape[2]}"


@dataclasses.dataclass
class Result:
    """Of one kind of layer and batch size; keys are "float32" and those of :data:`WAYS`.

    Attributes:
        seconds: median of a call.
        bytes: of weight and bias as stored.
        refused: why a layer cannot be compressed so.
        failed: what came out wrong.
    """

    case: Case
    batch: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Of what JSON can hold."""
        return {"layer": str(self.case), "count": self.case.count, **dataclasses.asdict(self)}


@torch.no_grad()
def model_cases(model: nn.Module, input: Tensor) -> list[Case]:
    """The kinds of layers that run in a model's forward pass, in order, with how often."""
    found: dict[Case, int] = {}

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        shape = tuple(inputs[0].shape[1:])
        if isinstance(module, nn.Linear):
            case = Case("linear", (module.in_features, module.out_features), shape)
        elif isinstance(module.padding, str):
            return  # which pads by what the input needs
        else:
            sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            case = Case("conv", (*sizes, module.dilation, module.groups), shape)
        found[case] = found.get(case, 0) + 1

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        model.eval()(input)
    finally:
        for hook in hooks:
            hook.remove()
    return [dataclasses.replace(case, count=count) for case, count in found.items()]


def measure(case: Case, batch: int, rounds: int) -> Result:
    """Compresses the layer in every way, checks what comes out, and times those that are right."""
    result, dense, input = Result(case, batch), case.build(), case.input(batch)
    calls: dict[str, Callable[[], Any]] = {"float32": _call(dense, input)}
    result.bytes["float32"] = sum(parameter.nbytes for parameter in dense.parameters())
    for way, transforms in WAYS.items():
        try:
            prepared = _prepared(dense, transforms, input)
        except ValueError as error:
            result.refused[way] = str(error)
            continue
        packed = compress.convert_(copy.deepcopy(prepared))
        if wrong := difference(prepared, packed, input):
            result.failed[way] = wrong
            continue
        result.bytes[way] = compress.report(packed).total.bytes
        calls[way] = _call(packed, input)
    result.seconds = medians(calls, rounds)
    return result


def _prepared(dense: nn.Module, transforms: tuple[Any, ...], input: Tensor) -> nn.Module:
    recipe = Recipe(Rule(*transforms), skip_first=False, skip_last=False)
    model = compress.prepare_(copy.deepcopy(dense), recipe).eval()
    compress.calibrate_(model, input)
    compress.step(model)
    return model


@torch.no_grad()
def difference(prepared: nn.Module, packed: nn.Module, input: Tensor) -> str:
    """How the packed layer's output differs from that of the layer it was made of; empty if it does not."""
    expected, output = prepared(input), packed(input)
    if output.shape != expected.shape or not output.isfinite().all():
        return f"{tuple(output.shape)} instead of {tuple(expected.shape)}, or not finite"
    most, size = (output - expected).abs().max().item(), expected.abs().max().item()
    return "" if most <= TOLERANCE * size else f"differs by {most:.2g} where outputs are up to {size:.2g}"


def _call(model: nn.Module, input: Tensor) -> Callable[[], Any]:
    return lambda: model(input)
