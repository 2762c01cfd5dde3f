"""Parameters that ``torch.distributed.fsdp.fully_shard`` has cut up: read and written as a whole.

Everything here is the identity for a model that is not sharded, and a collective for one that is: all processes have to
come by.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked so, since importing that takes a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def assign_(parameter: Any, value: Tensor) -> None:
    """Copies a whole tensor into a parameter, of which each process may hold a piece; the same on all processes."""
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        value = value.to(parameter.device, parameter.dtype).expand(parameter.shape).contiguous()
        copies = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = copies.redistribute(mesh, parameter.placements)
    parameter.copy_(value)


def rows_of(parameter: Any) -> Tensor | None:
    """The rows of a sharded tensor that this process holds, as a view; None where it holds no whole rows."""
    if any(placement.is_shard() and placement.dim != 0 for placement in parameter.placements):
        return None
    return parameter.detach().to_local()


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # not imported: none was
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def reshard_(model: nn.Module) -> None:
    """Gives up whole parameters that a forward pass without a backward pass has left, whose changes would be lost."""
    for module in fully_sharded(model):
        module.reshard()


@contextlib.contextmanager
def gathered(model: nn.Module, layer: Any) -> Iterator[None]:
    """The layer's parameters are whole within."""
    owners = [module for module in fully_sharded(model) if any(each is layer for each in module.modules())]
    if not owners:
        yield
        return
    owners[-1].unshard()  # the innermost, since a module comes after those around it
    try:
        yield
    finally:
        owners[-1].reshard()
