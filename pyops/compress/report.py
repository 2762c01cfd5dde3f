"""What a model's compression amounts to, layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tersor.binary.layers import BinaryLayer
from tersor.binary.pack_signs import PackedSigns
from tersor.binary.packed_layers import PackedBinaryConv2d, PackedBinaryLinear, PackedWeightConv2d
from tersor.compress.layers import CompressedLayer
from tersor.compress.packed_layers import PackedCompressedConv2d, PackedCompressedLinear
from tersor.compress.prepare import NAME, Compression, compression_of
from tersor.compress.quantizers import FreezingWeight
from tersor.compress.sharded import gathered, reshard_
from tersor.sparsity.nm_pack import index_bits
from tersor.sparsity.packed_layers import PackedNMConv2d, PackedNMLinear

PACKED = (PackedCompressedConv2d, PackedCompressedLinear, PackedNMConv2d, PackedNMLinear)
PACKED_BINARY = (PackedBinaryConv2d, PackedBinaryLinear, PackedWeightConv2d)
HEADER = ("layer", "transform", "bits", "input bits", "sparsity", "frozen", "bytes", "in float32", "MACs")


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: its name.
        transform: what the recipe did; or in brackets why nothing.
        bits: of a weight.
        input_bits: of an input value.
        sparsity: share of the weights that are zero.
        frozen: share of the weights that no longer change.
        bytes: of weight and bias as they are stored once converted.
        float_bytes: of them in float32.
        macs: multiply-adds for one sample, dense; None where no example was given.
    """

    layer: str
    transform: str
    bits: int
    input_bits: int
    sparsity: float
    frozen: float
    bytes: int
    float_bytes: int
    macs: int | None = None

    def cells(self) -> list[str]:
        shares = [f"{100 * value:.0f} %" if value else "" for value in (self.sparsity, self.frozen)]
        numbers = [f"{self.bytes:,}", f"{self.float_bytes:,}", "" if self.macs is None else f"{self.macs:,}"]
        return [self.layer, self.transform, str(self.bits), str(self.input_bits), *shares, *numbers]


@dataclasses.dataclass(frozen=True)
class Report:
    """A table of a model's layers; ``str()`` of it is plain text, :meth:`to_markdown` a Markdown table.

    Attributes:
        rows: convolutions and linear layers, in the order of the model.
        step, steps: how far the training is.
        rest: bytes of everything else in the state dict, such as norms and embeddings.
    """

    rows: tuple[Row, ...]
    step: int
    steps: int
    rest: int = 0

    @property
    def total(self) -> Row:
        """All rows together; sparsity and frozen share among all weights."""
        count = sum(row.float_bytes for row in self.rows) or 1
        sparsity = sum(row.sparsity * row.float_bytes for row in self.rows) / count
        frozen = sum(row.frozen * row.float_bytes for row in self.rows) / count
        macs = [row.macs for row in self.rows if row.macs is not None]
        sizes = (sum(row.bytes for row in self.rows), sum(row.float_bytes for row in self.rows))
        return Row("all layers", "", 0, 0, sparsity, frozen, *sizes, sum(macs) if macs else None)

    def cells(self) -> list[list[str]]:
        """Header, rows and total as text."""
        total = self.total.cells()
        total[2] = total[3] = ""
        lines = [list(HEADER), *(row.cells() for row in self.rows), total]
        if self.rest:
            lines.append(["everything else", *[""] * 5, f"{self.rest:,}", f"{self.rest:,}", ""])
        return lines

    def to_markdown(self) -> str:
        header, *rows = self.cells()
        lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for line in cells:
            left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
            lines.append("  ".join([*left, *right]).rstrip())
        return "\n".join(lines)


def report(model: nn.Module, *example: Any, **more: Any) -> Report:
    """The compression of a prepared or converted model, layer by layer.

    Args:
        model: prepared, also in a distributed wrapper or sharded; then every process has to call this.
        example, more: an input as the model takes it, to count multiply-adds with; none leaves these out. The model
            runs on it once, in eval mode, without a gradient.

    Raises:
        TypeError, ValueError: the model is not prepared.
    """
    compression = compression_of("report", model)
    macs = _macs(model, *example, **more) if example or more else {}
    reshard_(model)
    around = next(name for name, module in model.named_modules() if module is compression).removesuffix(NAME)
    rows = []
    for name, module in model.named_modules():
        name = name.removeprefix(around)  # of a distributed wrapper
        with gathered(model, module) if isinstance(module, CompressedLayer) else contextlib.nullcontext():
            found = _row(name or compression.root, module, compression)
        if found is not None:
            rows.append(dataclasses.replace(found, macs=macs.get(id(module))) if macs else found)
    return Report(tuple(rows), compression.done, compression.steps, _rest(model, around, compression, rows))


def _rest(model: nn.Module, around: str, compression: Compression, rows: list[Row]) -> int:
    """Bytes of what belongs to no row."""
    names = [row.layer for row in rows]
    if compression.root in names:  # the model is a layer itself
        return 0
    listed = tuple(f"{around}{name}." for name in (*names, NAME))
    return sum(tensor.nbytes for key, tensor in model.state_dict().items() if not key.startswith(listed))


@torch.no_grad()
def _row(name: str, module: Any, compression: Compression) -> Row | None:
    transforms = ", ".join(map(str, compression.applied.get(name, ())))
    if isinstance(module, CompressedLayer):
        return _compressed_row(name, module, transforms)
    if isinstance(module, BinaryLayer):
        weight: Any = module.weight
        bias = 0 if module.bias is None else module.bias.numel()
        size, scales = (weight.numel() + bias) * 4, 4 * weight.shape[0]
        return Row(name, transforms, 1, 1, 0.0, 0.0, weight.numel() // 8 + 2 * scales, size)
    if isinstance(module, PACKED_BINARY):
        count = torch.Size(module.shape).numel()
        return Row(name, transforms, 1, 1, 0.0, 0.0, _stored(module), 4 * count)
    if isinstance(module, PACKED):
        return _packed_row(name, module, transforms)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        reason = compression.skipped.get(name, "")
        stored = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        size = 4 * sum(parameter.numel() for parameter in module.parameters(recurse=False))
        bits = 8 * module.weight.element_size()
        return Row(name, f"({reason})" if reason else "", bits, bits, 0.0, 0.0, stored, size)
    return None


def _compressed_row(name: str, layer: Any, transforms: str) -> Row:
    weight, sparse, quantization = layer.weight, layer.sparsity, layer.quantization
    count, outputs = weight.numel(), weight.shape[0]
    bias = 0 if layer.bias is None else layer.bias.numel()
    bits = 8 * weight.element_size() if quantization is None else quantization.bits
    kept = count if sparse is None else count // sparse.m * sparse.n
    index = 0 if sparse is None else count // sparse.m * index_bits(sparse.n, sparse.m)
    scales = 0 if quantization is None else 4 * (outputs if quantization.method == "lsq" else 1)
    input_bits = 32 if quantization is None else quantization.bits_of_input
    frozen = 0.0
    if isinstance(layer.quantize_weight, FreezingWeight):
        frozen = int(layer.quantize_weight.counters[1]) / count
    zeros = 0.0 if sparse is None else 1 - int(layer.compressed_weight().count_nonzero()) / count
    stored = (kept * bits + index) // 8 + 4 * bias + scales
    return Row(name, transforms, bits, input_bits, zeros, frozen, stored, 4 * (count + bias))


def _packed_row(name: str, module: Any, transforms: str) -> Row:
    bias = 0 if module.bias is None else module.bias.numel()
    if isinstance(module, (PackedNMConv2d, PackedNMLinear)):
        groups = module.values.shape[0] * module.values.shape[1]
        bits = 8 * module.values.element_size()
        zeros = 1 - int(module.values.count_nonzero()) / (groups * module.m)
        return Row(name, transforms, bits, bits, zeros, 0.0, _stored(module), 4 * (groups * module.m + bias))
    count = torch.Size(module.shape).numel()
    zeros = 0.0
    if module.pattern is not None:
        zeros = 1 - int(module.dense_weight().count_nonzero()) / count
    bits = int(module.numbers[0])
    return Row(name, transforms, bits, module.input_bits or 32, zeros, 0.0, _stored(module), 4 * (count + bias))


def _stored(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


@torch.no_grad()
def _macs(model: nn.Module, *example: Any, **more: Any) -> dict[int, int]:
    """Of each layer, for one sample; by the shapes that go through it."""
    found: dict[int, int] = {}

    def count(module: Any, inputs: Any, output: Any) -> None:
        shape = tuple(module.shape) if hasattr(module, "shape") else _shape(module)
        if isinstance(output, PackedSigns):
            outputs = output.channels * output.words[0, 0, :, :, 0, 0].numel()
        elif isinstance(output, Tensor) and output.dim():
            outputs = output.numel() // max(output.shape[0], 1)
        else:
            return
        found[id(module)] = found.get(id(module), 0) + outputs * torch.Size(shape[1:]).numel()

    kinds = (CompressedLayer, BinaryLayer, *PACKED, *PACKED_BINARY, nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    try:
        with evaluating(model):
            model(*example, **more)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within; then each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _shape(module: Any) -> tuple[int, ...]:
    if isinstance(module, PackedNMLinear):
        return module.out_features, module.in_features
    if isinstance(module, PackedNMConv2d):
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size
    return tuple(module.weight.shape)
