"""Trains a small EDSR for twice the resolution, then students of 4 and 2 bits, by DDTB and by a plain quantiser.

    python -m tersor.models.train_sr --output demo_sr

Writes into the output folder a picture (``sr.png``), the figures (``results.json``), the trained networks
(``edsr_*.safetensors``; ``*_packed.safetensors`` are converted ones) and the states that ``--resume`` goes on from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import tersor
from tersor.models._command import PHOTOGRAPHS, between, folder, make_output, run_command, training_bar

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from tersor.models._sr_measure import Quality
    from tersor.models._sr_train import Config, Progress
    from tersor.models.edsr import EDSR

TITLES = {"full": "full precision", "ddtb": "DDTB", "symmetric": "symmetric"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_sr", PHOTOGRAPHS, _parse, run, arguments)


def run(options: argparse.Namespace) -> None:
    """All trainings, the comparison, the conversion, the checkpoints, the table and the picture."""
    from rich.console import Console

    from tersor.models import _sr_measure

    console, output = Console(), options.output
    configs = _configs(options)
    if not options.resume:
        for config in configs:
            config.state_file(output).unlink(missing_ok=True)
    _say_what_runs(console, options)
    results: list[Result] = []
    for config in configs:
        teacher = results[0].model if results else None
        results.append(_train(console, config, output, teacher, options.resume))
        _save(output, results[-1])
    written = [_checkpoint(output, config) for config in configs]
    converted = {}
    with console.status("converting the students"):
        for result in results:
            if result.config.method == "ddtb" and result.config.seed == 0:
                path = output / f"edsr_ddtb_{result.config.bits}bit_packed.safetensors"
                converted[result.config.bits] = _sr_measure.convert(result.model, path)
                written.append(path)
    bicubic = _sr_measure.quality(_sr_measure.enlarge_bicubic())
    size = written[0].stat().st_size
    _print_table(console, bicubic, results)
    _print_converted(console, converted, results, size)
    _write_results(output / "results.json", options, bicubic, results, converted, size)
    _draw(output / "sr.png", bicubic, results)
    for path in (*written, output / "results.json", output / "sr.png"):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: the network, what it went through, its pictures of the test regions and how good they are."""

    config: Config
    model: EDSR
    progress: Progress
    pictures: list[Tensor]
    quality: Quality

    @property
    def title(self) -> str:
        return _title(self.config.method, self.config.bits)


def _title(method: str, bits: int) -> str:
    return TITLES[method] if method == "full" else f"{TITLES[method]} {bits}-bit"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_sr", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    # Below 6 epochs the published schedule has no dynamic bounds.
    add("--epochs", type=between(6, 10_000), default=10, help="of each student, at least 6 (default 10)")
    add("--teacher-epochs", type=between(1, 10_000), default=40, help="in full precision (default 40)")
    add("--iterations", type=between(1, 1_000_000), default=200, help="steps per epoch (default 200)")
    add("--batch-size", type=between(1, 4096), default=8, help="patches per step (default 8)")
    add("--patch", type=between(8, 96), default=16, help="low-resolution pixels, squared (default 16)")
    add("--blocks", type=between(1, 64), default=2, help="residual blocks (default 2)")
    add("--channels", type=between(1, 512), default=32, help="of every block (default 32)")
    add("--bits", type=between(2, 8), nargs="+", default=[4, 2], help="of the students (default 4 2)")
    add("--seeds", type=between(1, 100), default=3, help="runs at the lowest of the bits (default 3); one elsewhere")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other, 5 times slower.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add("--output", type=folder, default=Path("demo_sr"), help="folder of all files (default demo_sr)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    options.bits = sorted(set(options.bits), reverse=True)
    make_output(parser, options.output)
    return options


def _configs(options: argparse.Namespace) -> list[Config]:
    """The teacher, then the students: at the lowest bits with all seeds, above with the first one."""
    from tersor.models._sr_train import Config

    shared = ("blocks", "channels", "iterations", "batch_size", "patch", "threads")
    common = {name: getattr(options, name) for name in shared}
    configs = [Config("full", epochs=options.teacher_epochs, **common)]
    for bits in options.bits:
        for seed in range(options.seeds if bits == options.bits[-1] else 1):
            configs += [Config(m, bits, seed, epochs=options.epochs, **common) for m in ("ddtb", "symmetric")]
    return configs


def _say_what_runs(console: Console, options: argparse.Namespace) -> None:
    from tersor.models._photos import MARGIN, photographs
    from tersor.models._sr_train import SCALE

    console.print(f"torch {torch.__version__}, cpu, threads: {options.threads}", highlight=False)
    data = photographs(SCALE)
    counts = [sum(region.high[0].numel() for region in regions) / 1e6 for regions in (data.train, data.test)]
    console.print(
        f"{len(data.train)} photographs: the lowest quarter of each to test ({counts[1]:.2f} M pixels), the rest but "
        f"{MARGIN} rows to train ({counts[0]:.2f} M)",
        highlight=False,
    )
    for choice in tersor.backends():
        if choice.operator.startswith("fake_quantize_bounds") and choice.device == "cpu":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
            note = f" ({reasons})" if reasons else ""
            console.print(f"{choice.operator} on cpu runs [bold]{choice.runs}[/]{note}", highlight=False)


def _train(console: Console, config: Config, output: Path, teacher: nn.Module | None, resume: bool) -> Result:
    """One run under a progress bar."""
    from tersor.models import _sr_measure
    from tersor.models._sr_train import train

    title = _title(config.method, config.bits) + ("" if config.method == "full" else f" seed {config.seed}")
    with training_bar(console, title, config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            note = f"L1 loss {progress.pixel_loss[-1]:.2f}" if progress.pixel_loss else ""
            show(progress.epoch, step + 1, note)

        model, progress = train(config, output, teacher, resume, report)
        pictures = _sr_measure.enlarge(model)
        quality = _sr_measure.quality(pictures)
        show(config.epochs, 0, f"PSNR {quality.mean_psnr:.2f} dB")
    return Result(config, model, progress, pictures, quality)


def _checkpoint(output: Path, config: Config) -> Path:
    return output / f"edsr_{config.name}.safetensors"


def _save(output: Path, result: Result) -> None:
    from tersor.models._sr_measure import enlarge
    from tersor.models._sr_train import load_model, save_model

    path = _checkpoint(output, result.config)
    save_model(path, result.config, result.model)
    again = enlarge(load_model(path))
    if not all(torch.equal(a, b) for a, b in zip(again, result.pictures, strict=True)):
        raise RuntimeError(f"the network reloaded from {path} gives other pictures")


def _groups(results: list[Result]) -> dict[str, list[Result]]:
    """The runs by method and bits, one per seed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.title, []).append(result)
    return groups


def _print_table(console: Console, bicubic: Quality, results: list[Result]) -> None:
    from rich.table import Table

    table = Table(title="Twice the resolution: the test regions of 7 photographs", title_justify="left")
    for name in ("", "PSNR (dB)", "SSIM", "PSNR of each seed (dB)", "step, median"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("bicubic", f"{bicubic.mean_psnr:.3f}", f"{bicubic.mean_ssim:.4f}", "", "")
    for title, runs in _groups(results).items():
        each = "  ".join(f"{run.quality.mean_psnr:.3f}" for run in runs)
        step = statistics.median(run.progress.median_step for run in runs)
        psnr, ssim = _means(runs)
        table.add_row(title, f"{psnr:.3f}", f"{ssim:.4f}", each if len(runs) > 1 else "", f"{1e3 * step:.3g} ms")
    table.caption = (
        "PSNR and SSIM: on the luma Y, 2 pixels cut off each side, mean of the photographs. Every student begins with "
        "the weights of the one in full precision; both methods see the same patches in the same order, with the same "
        "loss and rates. Symmetric: weights up to their largest magnitude, activations up to a learned range."
    )
    table.caption_justify = "left"
    console.print(table)


def _means(runs: list[Result]) -> tuple[float, float]:
    qualities = [run.quality for run in runs]
    return statistics.fmean(q.mean_psnr for q in qualities), statistics.fmean(q.mean_ssim for q in qualities)


def _print_converted(console: Console, converted: dict[int, Any], results: list[Result], size: int) -> None:
    for bits, figures in converted.items():
        trained = next(r for r in results if r.config.method == "ddtb" and r.config.bits == bits)
        console.print(
            f"DDTB {bits}-bit, seed 0, packed: {figures['bytes'] / 1e3:.0f} kB on disk (full precision "
            f"{size / 1e3:.0f} kB), of that the quantised weights {figures['weight bytes'] / 1e3:.1f} kB (in float32 "
            f"{figures['weight bytes in float32'] / 1e3:.1f} kB); PSNR {figures['psnr']:.3f} dB (before "
            f"{trained.quality.mean_psnr:.3f}), largest difference {figures['largest difference']:.3g} of 255",
            highlight=False,
        )


def _write_results(
    path: Path,
    options: argparse.Namespace,
    bicubic: Quality,
    results: list[Result],
    converted: dict[int, Any],
    size: int,
) -> None:
    contents: dict[str, Any] = {
        "torch": torch.__version__,
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "resume")},
        "backends": {choice.operator: choice.runs for choice in tersor.backends() if choice.device == "cpu"},
        "bicubic": bicubic.as_dict(),
    }
    for title, runs in _groups(results).items():
        psnr, ssim = _means(runs)
        contents[title] = {
            "psnr": psnr,
            "ssim": ssim,
            "bytes": size if runs[0].config.method == "full" else None,
            "seeds": {run.config.seed: _figures(run) for run in runs},
        }
    for bits, figures in converted.items():
        contents[f"{_title('ddtb', bits)} packed"] = figures
    path.write_text(json.dumps(contents, indent=1) + "\n")


def _figures(result: Result) -> dict[str, Any]:
    return {
        **result.quality.as_dict(),
        "loss": result.progress.loss,
        "pixel loss": result.progress.pixel_loss,
        "median step seconds": result.progress.median_step if result.progress.step_seconds else None,
    }


def _draw(path: Path, bicubic: Quality, results: list[Result]) -> None:
    from tersor.models import _sr_measure, _sr_plot
    from tersor.models._photos import photographs
    from tersor.models._sr_train import SCALE

    groups = _groups(results)
    first = {title: runs[0] for title, runs in groups.items()}
    lowest = min(run.config.bits for run in results)
    columns = {"bicubic": _sr_measure.enlarge_bicubic()}
    for title, run in first.items():
        if run.config.method != "symmetric" or run.config.bits == lowest:
            columns[title] = run.pictures
    dots = [("bicubic", "bicubic", [bicubic.mean_psnr])]
    dots += [(t, runs[0].config.method, [run.quality.mean_psnr for run in runs]) for t, runs in groups.items()]
    curves = [(t, run.config.method, run.progress.pixel_loss) for t, run in first.items() if run.config.bits != 32]
    ours, plain = (_means(groups[_title(method, lowest)])[0] for method in ("ddtb", "symmetric"))
    full = results[0].quality.mean_psnr
    gains = [f"{psnr - bicubic.mean_psnr:.2f} dB" for psnr in (full, ours, plain)]
    summary = (
        f"Parts of {len(photographs(SCALE).test)} photographs that were kept out of training. Gain on bicubic: "
        f"{gains[0]}; with {lowest} bits DDTB keeps {gains[1]}, the symmetric quantiser {gains[2]}"
    )
    _sr_plot.draw(path, summary, columns, photographs(SCALE).test, dots, curves)


if __name__ == "__main__":
    sys.exit(main())
