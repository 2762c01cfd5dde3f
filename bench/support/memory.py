"""Memory that a call needs beyond its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def peak_on_cuda(call: Callable[[], Any]) -> int:
    """Peak of the allocator during one call above what was allocated before; outputs count."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kept_for_backward(forward: Callable[[], Any], inputs: tuple[Tensor, ...]) -> int:
    """Bytes of the tensors that the graph keeps, each storage once, the inputs' and parameters' own left out."""
    storages: dict[int, int] = {}
    given = {x.untyped_storage().data_ptr() for x in inputs}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if not (base.is_leaf and base.requires_grad):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()  # alive until the sum is taken, so that no address is used twice
    total = sum(size for address, size in storages.items() if address not in given)
    del graph
    return total
