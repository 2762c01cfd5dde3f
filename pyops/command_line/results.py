"""What ``tersor compress`` finds out about the dense and the compressed model, and its report."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor import compress
from tersor.command_line.images import Listing
from tersor.command_line.shared import about, write_page
from tersor.command_line.state import write_safetensors
from tersor.command_line.timing import model_medians
from tersor.command_line.training import Progress, Task, accuracy, predict

BATCHES = (1, 64)
LEFT_OUT = ("run", "parser", "command", "interrupted", "resume", "output")  # of the options in the report


@dataclasses.dataclass
class Found:
    """Everything that is found out; filled in step by step."""

    options: argparse.Namespace
    source: compress.ModelSource
    task: Task
    listing: Listing
    dense: Progress | None = None  # None: the weights are a checkpoint's
    compressed: Progress | None = None
    dense_accuracy: float = math.nan
    trained_accuracy: float = math.nan  # of the compressed model before it is converted
    packed_accuracy: float = math.nan  # of what the file holds
    trained: Tensor | None = None  # logits
    differ: int = 0  # test images to which the trained and the packed model give different classes
    gap: float = math.nan  # between their logits, at most
    bytes: tuple[int, int] = (0, 0)  # of the files: dense, compressed
    seconds: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)  # for a batch of so many
    layers: compress.Report | None = None

    def test_dense(self, model: nn.Module) -> None:
        logits = predict(model, self.task.test, self.task.reading, self.options.device)
        self.dense_accuracy = accuracy(logits, self.task.test.labels)

    def test_trained(self, model: nn.Module) -> None:
        """On the CPU, where the packed one will run."""
        self.trained = predict(model.cpu(), self.task.test, self.task.reading)
        self.trained_accuracy = accuracy(self.trained, self.task.test.labels)

    def measure(self, dense: nn.Module, packed: nn.Module, output: Path) -> None:
        """Tests the model that was loaded again, and measures it against the dense one."""
        assert self.trained is not None
        logits = predict(packed, self.task.test, self.task.reading)
        self.packed_accuracy = accuracy(logits, self.task.test.labels)
        self.differ = int((logits.argmax(1) != self.trained.argmax(1)).sum())
        self.gap = (logits - self.trained).abs().max().item()
        path = output / "dense.safetensors"
        write_safetensors(path, {name: value.clone() for name, value in dense.state_dict().items()}, {})
        self.bytes = path.stat().st_size, (output / "model.safetensors").stat().st_size
        reading = self.task.reading
        for batch in BATCHES:
            input = torch.zeros(batch, reading.channels, reading.size, reading.size)
            index = torch.arange(batch) % len(self.task.test)
            input.copy_(reading.normalized(self.task.test.take(index.tolist())))
            found = model_medians({"dense": dense, "packed": packed}, input)
            self.seconds[batch] = found["dense"], found["packed"]
        self.layers = compress.report(packed, input[:1])

    def table(self) -> tuple[list[list[str]], str]:
        """Rows, of which the first is the header, and what is below."""
        rows = [["", "dense", "compressed", "ratio"]]
        both = self.dense_accuracy, self.packed_accuracy
        rows.append(["test images told right (%)", *(f"{value:.2f}" for value in both), ""])
        rows.append(_row("file (MB)", self.bytes, 1e-6))
        for batch, seconds in self.seconds.items():
            rows.append(_row(f"time for {batch} image{'s' * (batch > 1)} (ms)", seconds, 1e3))
        threads = f"{self.options.threads} thread{'s' * (self.options.threads > 1)}"
        return rows, f"Times: medians of interleaved rounds on the CPU, {threads}. Dense: float32 in plain torch."

    def notes(self) -> list[str]:
        """In whole sentences."""
        count = len(self.task.test)
        trained = f"The trained model tells {self.trained_accuracy:.2f} % right before it is packed"
        return [
            f"{trained}; {self.differ} of {count} test images get another class from the file (logits differ by up to "
            f"{self.gap:.1e})."
        ]

    def write(self, output: Path) -> list[Path]:
        """Report and, with matplotlib, pictures; returns their paths."""
        pictures: list[Path] = []
        if importlib.util.find_spec("matplotlib") is not None:
            from tersor.command_line import plots

            pictures = plots.draw(self, output)
        return [self._write_json(output / "report.json"), self._write_page(output / "report.md", pictures), *pictures]

    def _write_page(self, path: Path, pictures: Sequence[Path]) -> Path:
        assert self.layers is not None
        rows, caption = self.table()
        data = f"{len(self.listing.train)} training and {len(self.listing.test)} test images"
        lines = ["", caption, "", *self.notes(), ""]
        lines += [f"Data: {len(self.task.classes)} classes, {data}. {self.listing.split}.", ""]
        lines += ["## Layers", "", *self.layers.to_markdown().splitlines(), ""]
        lines += [f"![{picture.stem}]({picture.name})" for picture in pictures]
        return write_page(path, f"{self.source}, compressed", rows, lines)

    def _write_json(self, path: Path) -> Path:
        assert self.layers is not None
        options = {key: value for key, value in vars(self.options).items() if key not in LEFT_OUT}
        contents: dict[str, Any] = {"about": about(), "options": options, "model": self.source.to_dict()}
        contents["data"] = {"classes": list(self.task.classes), "split": self.listing.split}
        contents["data"] |= {name: len(getattr(self.listing, name)) for name in ("train", "test")}
        for name in ("dense_accuracy", "trained_accuracy", "packed_accuracy", "differ", "gap"):
            contents[name] = getattr(self, name)
        contents["bytes"] = dict(zip(("dense", "compressed"), self.bytes, strict=True))
        contents["seconds"] = {
            str(batch): dict(zip(("dense", "compressed"), pair, strict=True)) for batch, pair in self.seconds.items()
        }
        contents["layers"] = [dataclasses.asdict(row) for row in self.layers.rows]
        contents["trainings"] = {
            name: dataclasses.asdict(progress)
            for name, progress in (("dense", self.dense), ("compressed", self.compressed))
            if progress is not None
        }
        path.write_text(json.dumps(contents, indent=1, default=str) + "\n")
        return path


def _row(name: str, values: Sequence[float], factor: float) -> list[str]:
    before, after = values
    return [name, f"{before * factor:.3g}", f"{after * factor:.3g}", f"{before / after:.2f}x"]
