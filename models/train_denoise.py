"""Trains a small Uformer to take Gaussian noise off photographs, and compares it with non-local means.

    python -m tersor.models.train_denoise --output demo_denoise

The noise has a standard deviation of 25 of 255. The first steps are also taken with the published eager blocks, to see
that the losses are the same and what a step takes. Writes a picture (``denoise.png``), a table (``results.md``), all
figures (``results.json``), the trained networks (``uformer_*.safetensors``) and the states that ``--resume`` goes on
from. Needs the extra ``tersor[demo]``.
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
from tersor.models._command import (
    PHOTOGRAPHS,
    about,
    between,
    folder,
    make_output,
    run_command,
    training_bar,
    write_page,
)

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from tersor.models._denoise_train import Config, Progress
    from tersor.models._photos import Quality
    from tersor.models.uformer import Uformer

CAPTION = (
    "PSNR and SSIM: of all three channels of the 8-bit pictures, mean of the photographs' test regions; noise with a "
    "standard deviation of 25 of 255, the same for all. Non-local means: scikit-image's, given the noise's standard "
    "deviation, with the strength that is best on the training regions."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the process's exit status."""
    return run_command("train_denoise", PHOTOGRAPHS, _parse, run, arguments)


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run: the network, what it went through, its pictures of the test regions and how good they are."""

    config: Config
    model: Uformer
    progress: Progress
    pictures: list[Tensor]
    quality: Quality


@dataclasses.dataclass(frozen=True)
class Rival:
    """What there is without training: pictures, how good they are, and how non-local means was tuned."""

    noisy: list[Tensor]
    noisy_quality: Quality
    means: list[Tensor]
    means_quality: Quality
    tuned: dict[float, float]

    @property
    def strength(self) -> float:
        return max(self.tuned, key=self.tuned.__getitem__)


def run(options: argparse.Namespace) -> None:
    """All trainings, the comparisons, the checkpoints, the table and the picture."""
    from rich.console import Console

    from tersor.models import _denoise_measure
    from tersor.models._denoise_train import Config

    console, output = Console(), options.output
    shared = ("channels", "epochs", "iterations", "batch_size", "patch", "threads")
    configs = [Config(seed, **{name: getattr(options, name) for name in shared}) for seed in range(options.seeds)]
    if not options.resume:
        for config in configs:
            config.state_file(output).unlink(missing_ok=True)
    _say_what_runs(console, options)
    with console.status("non-local means: the best strength, and the test regions"):
        rival = _rival()
    results = [_train(console, config, output, options.resume) for config in configs]
    written = [_save(output, result) for result in results]
    compared = None
    if options.compare:
        with console.status("the first steps, by tersor's blocks and by the published ones"):
            compared = _denoise_measure.compare(configs[0])
    rows = _rows(rival, results)
    _print_table(console, rows)
    below = _remarks(rival, results, compared)
    for line in below:
        console.print(line, highlight=False)
    _write_results(output / "results.json", options, rival, results, compared)
    page = [line for remark in (CAPTION, *below) for line in ("", remark)]
    write_page(output / "results.md", "Denoising photographs", rows, [*page, "", "![pictures](denoise.png)"])
    _draw(output / "denoise.png", rival, results)
    for path in (*written, *(output / name for name in ("results.json", "results.md", "denoise.png"))):
        console.print(f"  wrote {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tersor.models.train_denoise", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--epochs", type=between(1, 10_000), default=24, help="of every run (default 24)")
    add("--iterations", type=between(1, 1_000_000), default=100, help="steps per epoch (default 100)")
    add("--batch-size", type=between(1, 4096), default=2, help="patches per step (default 2)")
    add("--patch", type=_patch, default=64, help="pixels, squared: 64, 128 or 192 (default 64)")
    add("--channels", type=between(1, 512), default=8, help="of the first level (default 8)")
    add("--seeds", type=between(1, 100), default=2, help="runs (default 2)")
    # One by default: the number changes the last bits, and on a busy machine two wait for each other.
    add("--threads", type=between(1, 4096), default=1, help="CPU threads (default 1)")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take the first steps with the published eager blocks, too (default)",
    )
    add("--output", type=folder, default=Path("demo_denoise"), help="folder of all files (default demo_denoise)")
    add("--resume", action="store_true", help="go on from the states in the output folder")
    options = parser.parse_args(arguments)
    make_output(parser, options.output)
    return options


def _patch(text: str) -> int:
    if text not in ("64", "128", "192"):  # whole windows at all levels, and inside of every training region
        raise argparse.ArgumentTypeError(f"must be 64, 128 or 192, got {text!r}")
    return int(text)


def _say_what_runs(console: Console, options: argparse.Namespace) -> None:
    from tersor.models._photos import MARGIN, photographs

    console.print(f"torch {torch.__version__}, cpu, threads: {options.threads}", highlight=False)
    data = photographs(1)
    counts = [sum(region.high[0].numel() for region in regions) / 1e6 for regions in (data.train, data.test)]
    console.print(
        f"{len(data.train)} photographs: the lowest quarter of each to test ({counts[1]:.2f} M pixels), the rest but "
        f"{MARGIN} rows to train ({counts[0]:.2f} M)",
        highlight=False,
    )
    for choice in tersor.backends():
        if choice.operator.startswith(("window_attention", "leff")) and choice.device == "cpu":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.refused.items())
            note = f" ({reasons})" if reasons else ""
            console.print(f"{choice.operator} on cpu runs [bold]{choice.runs}[/]{note}", highlight=False)


def _rival() -> Rival:
    from tersor.models import _denoise_measure as measure

    noisy, tuned = measure.unprocessed(), measure.tune_means()
    means = measure.denoise_by_means(max(tuned, key=tuned.__getitem__))
    return Rival(noisy, measure.quality(noisy), means, measure.quality(means), tuned)


def _train(console: Console, config: Config, output: Path, resume: bool) -> Result:
    """One run under a progress bar."""
    from tersor.models import _denoise_measure
    from tersor.models._denoise_train import train

    with training_bar(console, f"Uformer seed {config.seed}", config.epochs, config.iterations) as show:

        def report(progress: Progress, step: int) -> None:
            show(len(progress.loss), step + 1, f"loss {progress.loss[-1]:.4f}" if progress.loss else "")

        model, progress = train(config, output, resume, report)
        pictures = _denoise_measure.denoise(model)
        quality = _denoise_measure.quality(pictures)
        show(config.epochs, 0, f"PSNR {quality.mean_psnr:.2f} dB")
    return Result(config, model, progress, pictures, quality)


def _save(output: Path, result: Result) -> Path:
    from tersor.models._denoise_measure import denoise
    from tersor.models._denoise_train import load_model, save_model

    path = result.config.model_file(output)
    save_model(path, result.config, result.model)
    again = denoise(load_model(path))
    if not all(torch.equal(a, b) for a, b in zip(again, result.pictures, strict=True)):
        raise RuntimeError(f"the network reloaded from {path} gives other pictures")
    return path


def _means(results: list[Result]) -> tuple[float, float]:
    qualities = [result.quality for result in results]
    return statistics.fmean(q.mean_psnr for q in qualities), statistics.fmean(q.mean_ssim for q in qualities)


def _rows(rival: Rival, results: list[Result]) -> list[list[str]]:
    """The table: a header, then a row each for the noisy regions, non-local means and the network."""
    rows = [["", "PSNR (dB)", "SSIM", "PSNR of each seed (dB)"]]
    for title, quality in (("noisy", rival.noisy_quality), ("non-local means", rival.means_quality)):
        rows.append([title, f"{quality.mean_psnr:.2f}", f"{quality.mean_ssim:.4f}", ""])
    psnr, ssim = _means(results)
    each = " ".join(f"{result.quality.mean_psnr:.2f}" for result in results)
    rows.append(["Uformer", f"{psnr:.2f}", f"{ssim:.4f}", each])
    return rows


def _print_table(console: Console, rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(title="Gaussian noise on photographs: the test regions", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right" if name else "left")
    for row in rows[1:]:
        table.add_row(*row)
    table.caption, table.caption_justify = CAPTION, "left"
    console.print(table)


def _remarks(rival: Rival, results: list[Result], compared: dict[str, Any] | None) -> list[str]:
    gains = [result.quality.mean_psnr - rival.means_quality.mean_psnr for result in results]
    tuned = ", ".join(f"{strength:g}: {psnr:.2f}" for strength, psnr in rival.tuned.items())
    count = sum(parameter.numel() for parameter in results[0].model.parameters())
    lines = [
        f"Against non-local means, seed by seed: {', '.join(f'{gain:+.2f} dB' for gain in gains)}. "
        f"{count / 1e6:.2f} M parameters, {results[0].config.steps} steps. "
        "Every reloaded network gives the same pictures.",
        f"PSNR (dB) of non-local means on the training regions by its strength, h in standard deviations: {tuned}.",
    ]
    if compared:
        ours, theirs = compared["median step seconds"].values()
        lines.append(
            f"The first {compared['steps']} steps with the published eager blocks: {1e3 * theirs:.3g} ms a step, "
            f"tersor {1e3 * ours:.3g} ms: {theirs / ours:.2f}x; relative difference of the losses at the first step "
            f"{compared['first loss difference']:.1e}, at most {compared['largest loss difference']:.1e}."
        )
    return lines


def _write_results(
    path: Path, options: argparse.Namespace, rival: Rival, results: list[Result], compared: dict[str, Any] | None
) -> None:
    psnr, ssim = _means(results)
    contents: dict[str, Any] = {
        "about": about(),
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "resume")},
        "backends": {choice.operator: choice.runs for choice in tersor.backends() if choice.device == "cpu"},
        "noisy": rival.noisy_quality.as_dict(),
        "non-local means": {
            "strength": rival.strength,
            "psnr on the training regions": rival.tuned,
            **rival.means_quality.as_dict(),
        },
        "Uformer": {
            "psnr": psnr,
            "ssim": ssim,
            "parameters": sum(parameter.numel() for parameter in results[0].model.parameters()),
            "seeds": {result.config.seed: _figures(result) for result in results},
        },
        "comparison": compared,
    }
    path.write_text(json.dumps(contents, indent=1) + "\n")


def _figures(result: Result) -> dict[str, Any]:
    seconds = result.progress.step_seconds
    return {
        **result.quality.as_dict(),
        "loss": result.progress.loss,
        "median step seconds": result.progress.median_step if seconds else None,
        "seconds of all steps": sum(seconds),
    }


def _draw(path: Path, rival: Rival, results: list[Result]) -> None:
    from tersor.models import _denoise_plot
    from tersor.models._photos import photographs

    first = results[0]
    columns = {"noisy": rival.noisy, "non-local means": rival.means, "Uformer": first.pictures}
    qualities = {"noisy": rival.noisy_quality, "non-local means": rival.means_quality, "Uformer": first.quality}
    curves = {f"seed {result.config.seed}": result.progress.loss for result in results}
    gain = first.quality.mean_psnr - rival.means_quality.mean_psnr
    summary = (
        f"Parts of {len(photographs(1).test)} photographs that were kept out of training, noise of 25 of 255. "
        f"Mean PSNR {first.quality.mean_psnr:.2f} dB, {gain:+.2f} dB against non-local means"
    )
    _denoise_plot.draw(path, summary, columns, photographs(1).test, qualities, curves)


if __name__ == "__main__":
    sys.exit(main())
