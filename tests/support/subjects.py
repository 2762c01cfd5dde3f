"""What test_conformance.py shares with other tests that walk the registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from subject import Subject, load_test_module

import tersor  # noqa: F401  (fills the registry)
from tersor._backends import running
from tersor._operator import REGISTRY

PLACES = sorted({op.place for op in REGISTRY.values()})
SUBJECTS: list[Subject] = [subject for place in PLACES for subject in load_test_module(place).SUBJECTS]
DEFAULT = running(SUBJECTS[0].operators[0], "cpu")


def has_graphs(subject: Subject, run: tuple[str, str]) -> bool:
    """A graph calls the dispatcher, whichever kernel lies below: on the CPU graphs are made with the backend that runs
    by default, and of one subject with all; test_export has all of all."""
    return run[0] != "cpu" or run[1] == DEFAULT or subject is SUBJECTS[0]


def gradients(
    function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Output and gradients for a fixed, uneven incoming gradient; the output only, where none is wanted.

    The incoming gradient is rounded to ``dtype`` (by default the output's), whatever is computed with it.
    """
    output = function(*tensors)
    if not output.requires_grad:
        return [output]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    weights = weights.to(dtype or output.dtype).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, weights)]


def clones(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)


def parameter_sums(subject: Subject, tensors: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each of a quantiser's parameters its gradient, summed in float64, and the error allowed to a float32 sum.

    What each element gives comes from torch, by giving each element a parameter of its own.
    """
    data = subject.widened(tensors[: subject.data])
    wide = [p.detach().to(data[0].dtype) for p in tensors[subject.data :]]
    own = [(p.reshape(()) if p.numel() == 1 else p).expand_as(data[0]).clone().requires_grad_() for p in wide]
    given = gradients(subject.exact, (*data, *own), tensors[0].dtype)[1 + subject.data :]
    results = []
    for parameter, each in zip(wide, given, strict=True):
        total, size = (
            c.double().sum().reshape(parameter.shape)
            if parameter.numel() == 1
            else c.double().sum_to_size(parameter.shape)
            for c in (each, each.abs())
        )
        results.append((total, 1e-6 * size + 1e-6))
    return results


def check_quantizer(subject: Subject, tensors: tuple[torch.Tensor, ...]) -> None:
    """Output bit by bit, the inputs' gradients to a rounding, the parameters' to that of a float32 sum."""
    dtype = tensors[0].dtype
    exact = gradients(subject.exact, subject.widened(tensors), dtype)
    given = gradients(subject, clones(tensors))
    assert torch.equal(given[0], exact[0].to(given[0].dtype)), f"{dtype} {tuple(tensors[0].shape)}"
    rounding = 2e-6 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps
    for e, g in zip(exact[1 : 1 + subject.data], given[1:], strict=False):
        torch.testing.assert_close(g, e.to(dtype), rtol=rounding, atol=rounding)
    if subject.differentiable:
        check_parameter_sums(subject, tensors, given[1 + subject.data :])


def check_parameter_sums(subject: Subject, tensors: tuple[torch.Tensor, ...], given: list[torch.Tensor]) -> None:
    """The gradients ``given`` for a quantiser's parameters."""
    sums = parameter_sums(subject, tensors)
    for (exact, allowed), own, parameter in zip(sums, given, tensors[subject.data :], strict=True):
        assert own.dtype == parameter.dtype
        assert ((own.double() - exact).abs() <= allowed).all(), f"{own} instead of {exact}, {allowed} allowed"
