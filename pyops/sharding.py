"""How operators work on the pieces of a ``DTensor``: ``tersor.sharding.register()`` tells torch.

| operators | pieces |
| --- | --- |
| ``fake_quantize_*`` | along any dimension; a parameter along that dimension is cut with it, the gradient of any other is a sum over the pieces |
| ``nm_sparsify``, ``srste_sparsify`` | along the first dimension of the weight, where each process has as many rows and these fill whole bytes of the mask; else the weight is put together |
| ``lts_quantize``, ``nm_remove_`` | none: they change their arguments, and what torch had put together first would be lost; call them on ``to_local()``, as :func:`tersor.compress.step` does |
| ``weight_fake_quantize``, ``percentile_bounds``, ``recu_weight`` | none: they take a percentile or a mean over the whole tensor |
| all others | none: attention, tokens and packed kernels work on whole samples; give them local tensors |

Without a rule torch raises ``NotImplementedError``. Models that ``fully_shard`` cuts need no rules, since their layers see
whole parameters.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tersor._operator import REGISTRY
from tersor.quantization._quantizer import QUANTIZERS, Quantizer

Choice = tuple[list[Any], list[Any]]  # placements of the outputs, and of the arguments


def register() -> None:
    """Registers the rules, with torch's experimental ``register_sharding``; once per process, again does nothing.

    ::

        tersor.sharding.register()
        weight = distribute_tensor(weight, mesh, [Shard(0)])
        output = tersor.fake_quantize_lsq(weight, scale, bits=4, signed=True)  # sharded, too

    Raises:
        ImportError: this torch is built without ``torch.distributed``.
    """
    if _registered:
        return
    from torch.distributed.tensor.experimental import register_sharding

    for quantizer in QUANTIZERS.values():
        register_sharding(quantizer.forward.overload)(_of_quantizer(quantizer, backward=False))
        register_sharding(quantizer.backward.overload)(_of_quantizer(quantizer, backward=True))
    for name, outputs in ROWS.items():
        register_sharding(REGISTRY[name].overload)(_by_rows(outputs))
    _registered.append(True)


_registered: list[bool] = []
ROWS = {  # operators by the weight's rows, and how many tensors they return
    "nm_sparsify_forward": 2,
    "nm_sparsify_backward": 2,
    "srste_sparsify_forward": 2,
    "srste_sparsify_backward": 1,
}


def _of_quantizer(quantizer: Quantizer, backward: bool) -> Callable[..., list[Choice]]:
    data = len(quantizer.rule.inputs)
    parameters = len(quantizer.rule.parameters)
    names = [word.split()[-1] for word in quantizer.rule.constants.split(",")]

    def choices(*args: Any) -> list[Choice]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        first, constants = data + backward, args[data + backward + parameters :]
        rest: list[Any] = [None] * len(constants)
        results = data + parameters if backward else 1
        whole: Choice = [Replicate()] * results, [Replicate()] * (first + parameters) + rest
        if ("grad_factor", None) in zip(names, constants, strict=True):
            return [whole]  # the kernel would find it by the size of a piece
        found = [whole]
        for dim in range(len(args[0].shape)):
            cut = [len(p.shape) > dim and p.shape[dim] > 1 for p in args[first : first + parameters]]
            given = [Shard(dim) if each else Replicate() for each in cut]
            sums = [Shard(dim) if each else Partial() for each in cut]
            outputs: list[Any] = [*[Shard(dim)] * data, *sums] if backward else [Shard(dim)]
            found.append((outputs, [*[Shard(dim)] * first, *given, *rest]))
        return found

    return choices


def _by_rows(outputs: int) -> Callable[..., list[Choice]]:
    def choices(*args: Any) -> list[Choice]:
        from torch.distributed.tensor import Replicate, Shard

        def place(placement: Any) -> Choice:
            return [placement] * outputs, [placement if hasattr(each, "placements") else None for each in args]

        shape, processes = args[0].shape, args[0].mesh.size()
        even = shape[0] % processes == 0 and (shape.numel() // processes) % 8 == 0
        return [place(Replicate()), place(Shard(0))] if even else [place(Replicate())]

    return choices
