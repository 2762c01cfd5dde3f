"""Time and memory of both ways to compute dilated attention, alone and inside the digit model."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tersor import dilated_attention_qkvpacked
from tersor.models._digits import Config, build, digits, enlarge
from tersor.models.eager import dilated_attention_unfold

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tersor": dilated_attention_qkvpacked,
    "eager": lambda qkv: dilated_attention_unfold(qkv[..., 0, :, :], qkv[..., 1, :, :], qkv[..., 2, :, :]),
}
KERNEL_SHAPE = (4, 56, 56, 3, 24)  # DilateFormer-T, stage 1, batch 4: (B, H, W, heads, head_dim)
REPEATS = 10


def measure_kernels(device: str, shape: tuple[int, ...] = KERNEL_SHAPE, repeats: int = REPEATS) -> dict[str, Any]:
    """Median seconds of dilated attention, forward and forward + backward, and the peak memory of the latter.

    The two ways take turns, so that a disturbance of the machine meets both. Each starts from the
    ``(B, H, W, 3, heads, head_dim)`` projection, as in the model.

    Returns:
        For each way ``{"forward": s, "forward + backward": s, "peak bytes": n, "error": e}``; the error is the largest
        difference of the output from the eager way in float64, relative to its largest value.
    """
    generator = torch.Generator().manual_seed(0)
    batch, height, width, heads, head_dim = shape
    packed = torch.randn(batch, height, width, 3, heads, head_dim, generator=generator).to(device).requires_grad_()
    gradient = torch.randn(shape, generator=generator).to(device)
    exact = FUNCTIONS["eager"](packed.detach().double())
    runs = {name: _kernel_runs(function, packed, gradient) for name, function in FUNCTIONS.items()}
    results: dict[str, Any] = {name: {} for name in runs}
    for kind in ("forward", "forward + backward"):
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 2):  # the first two warm up
            for name, functions in runs.items():
                seconds = _seconds(functions[kind], device)
                if repeat >= 2:
                    times[name].append(seconds)
        for name, measured in times.items():
            results[name][kind] = statistics.median(measured)
    for name, functions in runs.items():
        output = functions["forward"]()
        results[name]["error"] = ((output - exact).abs().max() / exact.abs().max()).item()
        results[name]["peak bytes"] = peak_memory(functions["forward + backward"], device)
    return results


def step_memory(config: Config) -> int | None:
    """Peak memory of one forward and backward pass of the digit model on one batch, see :func:`peak_memory`."""
    data, model = digits(config.device), build(config.attention, config.device).train()
    images, labels = enlarge(data.train_images[: config.batch_size]), data.train_labels[: config.batch_size]

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    run()
    return peak_memory(run, config.device)


def peak_memory(function: Callable[[], Any], device: str) -> int | None:
    """The most bytes of tensors that ``function`` has live at once, above what was live before.

    On the CPU this adds up the allocations and releases that torch's profiler records, so libraries' own scratch
    memory is not in it; on a GPU it is torch's allocator's own figure. None where neither is known.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    try:
        events = profile.profiler.kineto_results.events()
    except AttributeError:  # not a public name
        return None
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def _kernel_runs(
    function: Callable[[Tensor], Tensor], packed: Tensor, gradient: Tensor
) -> dict[str, Callable[[], Any]]:
    @torch.no_grad()
    def forward() -> Tensor:
        return function(packed)

    def both() -> None:
        packed.grad = None
        function(packed).backward(gradient)

    return {"forward": forward, "forward + backward": both}


def _seconds(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Torch's profiler announces itself on the process's stderr, below Python; this keeps it out of the demo."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
