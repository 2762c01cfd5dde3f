"""Checks an installation: operators of every family, forward and backward, and packed models, against the reference.

``tersor selftest`` runs it. Small sizes, seconds, nothing but torch needed.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import tersor
from tersor import _backends
from tersor._operator import REGISTRY

TOLERANCE = 1e-4  # of the largest value; sums in another order stay far below, a wrong kernel far above


class Check(NamedTuple):
    """``run`` on the backends of a device is compared with ``expected`` (None: ``run``) on the CPU's reference."""

    operator: str  # registered; its folder is its family
    run: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]  # of the tensors that ``run`` takes and gives gradients for
    expected: Callable[..., Tensor] | None = None


def checks(device: str) -> list[Check]:
    """One at least of every family."""
    lower, upper = (torch.tensor([bound], device=device) for bound in (-1.0, 1.5))
    frozen = tersor.freezing.pack_mask(torch.arange(12, device=device).view(12, 1).expand(12, 16) < 8)
    ranks = torch.linspace(1, 2, 9, device=device).expand(2, 9)
    tokens, image = (2, 10, 8), (2, 8, 7, 6)

    def prune(input: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return tersor.prune_tokens(ranks.to(input.device), input, branch, weight, bias, count=5)[1]

    def quantize(input: Tensor) -> Tensor:
        return tersor.fake_quantize_bounds(input, lower.to(input.device), upper.to(input.device), bits=4)

    def freeze(input: Tensor, weight: Tensor) -> Tensor:
        return tersor.frozen_linear(input, weight, frozen=frozen.to(input.device))

    def windows(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return tersor.window_attention(query, key, value, 4, (2, 2), bias)

    return [
        Check(
            "dilated_attention_forward",
            lambda query, key, value: tersor.dilated_attention(query, key, value, 3, (1, 2)),
            [(2, 7, 6, 2, 8)] * 3,
        ),
        Check("window_attention_forward", windows, [*[(2, 8, 8, 2, 8)] * 3, (49, 2)]),
        Check("leff_forward", tersor.leff, [(2, 5, 6, 8), (16, 8), (16,), (16, 1, 3, 3), (16,), (8, 16), (8,)]),
        Check("fake_quantize_bounds_forward", quantize, [image]),
        Check("frozen_linear_backward", freeze, [(5, 16), (12, 16)]),
        Check(
            "nm_sparsify_forward", lambda weight, scores: tersor.nm_sparsify(weight, scores, 2, 4), [(12, 16), (48, 6)]
        ),
        Check(
            "binary_conv2d_forward",
            lambda input, weight: tersor.binary_conv2d(input, weight, padding=1),
            [image, (16, 8, 3, 3)],
        ),
        Check("prune_tokens_forward", prune, [tokens, tokens, (8,), (8,)]),
        *_packed(device),
    ]


def _packed(device: str) -> list[Check]:
    """Models, trained and packed. Each must have the same weights whenever it is made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        activation = tersor.BoundedActivation(8, bits=4)
        activation.alpha_lower.data.fill_(-1.0)
        activation.alpha_upper.data.fill_(1.5)
        sparse = nn.Sequential(tersor.NMLinear(32, 48, n=2, m=4), nn.ReLU(), tersor.NMLinear(48, 8, n=1, m=4))
        binary = nn.Sequential(tersor.ReCUConv2d(8, 16, 3), nn.Hardtanh(), tersor.BinaryConv2d(16, 8, 3))
        quantized = nn.Sequential(tersor.QuantizedConv2d(8, 8, 3, bits=4, activation=activation))
    tersor.NMSchedule(sparse, final_epoch=1).finish()
    found = []
    for operator, model, convert, shape in (
        ("nm_matmul", sparse, tersor.sparsity.convert_, (5, 32)),
        ("binary_packed_conv2d", binary, tersor.binary.convert_, (2, 8, 7, 6)),
        ("quantized_conv2d", quantized, tersor.quantization.convert_, (2, 8, 7, 6)),
    ):
        trained = model.eval().requires_grad_(False)
        found.append(Check(operator, convert(copy.deepcopy(trained)).to(device), [shape], trained))
    return found


def error(check: Check, device: str) -> float:
    """The largest difference from the reference in the output and in every gradient, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in check.shapes]
    given = _results(check.run, [t.to(device) for t in tensors], check.expected is None)
    with tersor.use_backend("reference"):
        wanted = _results(check.expected or check.run, tensors, check.expected is None)
    return max(
        ((g.cpu() - w).abs().max() / w.abs().max().clamp(min=1)).item() for g, w in zip(given, wanted, strict=True)
    )


def _results(function: Callable[..., Tensor], tensors: list[Tensor], gradients: bool) -> list[Tensor]:
    tensors = [t.clone().requires_grad_(gradients) for t in tensors]
    output = function(*tensors)
    if not gradients:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, tensors, weights)]


def run() -> bool:
    """Prints versions, how tersor was built and one line per check and device; whether all passed."""
    versions = f"tersor {tersor.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(
        f"{versions}, {platform.platform()}", f"from {Path(tersor.__file__).parent}", *_backends.facts(), "", sep="\n"
    )
    failed = 0
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for check in checks(device):
            family = REGISTRY[check.operator].place.partition("/")[0]
            try:
                found = error(check, device)
                right, said = found <= TOLERANCE, f"differs by {found:.1e} from the reference"
            except Exception as problem:  # whatever it is, the other checks go on
                right, said = False, f"{type(problem).__name__}: {problem}"
            failed += not right
            runs = _backends.running(check.operator, device)
            print(f"{'ok' if right else 'FAILED':6}  {device}  {family:12}  {check.operator:28}  {runs:9}  {said}")
    print("", "all checks passed" if not failed else f"{failed} checks failed", sep="\n")
    return not failed
