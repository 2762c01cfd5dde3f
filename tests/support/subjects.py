"""What test_conformance.py shares with other tests that walk the registry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from subject import Subject, load_test_module

import tersor  # noqa: F401  (fills the registry)
from tersor._operator import REGISTRY

PLACES = sorted({op.place for op in REGISTRY.values()})
SUBJECTS: list[Subject] = [subject for place in PLACES for subject in load_test_module(place).SUBJECTS]


def gradients(function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Output and gradients for a fixed, uneven incoming gradient."""
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, tensors, weights)]


def clones(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)
