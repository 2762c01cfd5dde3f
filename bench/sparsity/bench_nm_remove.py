"""The removal of the lowest scores of every group (LBC), as it stands at the start of every training iteration.

The weights are a 3x3 convolution of ResNet-50 and fc1 of DeiT-small. The first call removes one score of every group;
those that follow find as many zeros as they are to leave, as in nearly all steps of a run. `tersor` gives the mask of
the weight besides, which the published way computes anew in the forward pass.
"""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite

from tersor.freezing import unpack_mask
from tersor.models.eager_sparsity import nm_remove_chain
from tersor.sparsity import nm_combinations, nm_remove_

CUDA = settings.device() == "cuda"
WEIGHTS = {"conv512": 512 * 512 * 3 * 3, "fc1": 1536 * 384}
PATTERNS = {"2of4": (2, 4), "4of8": (4, 8), "1of16": (1, 16)}
SIZES = {f"{w}_{p}": (elements, *pattern) for w, elements in WEIGHTS.items() for p, pattern in PATTERNS.items()}
if settings.QUICK:
    SIZES = {"tiny_4of8": (64 * 48, 4, 8)}


def removed(size):
    """Two thirds of the combinations."""
    return math.comb(size[2], size[1]) * 2 // 3


def make_inputs(size, dtype, device, generator):
    """Scores without ties, all but one of those that are to go zero already."""
    elements, n, m = size
    rank = torch.rand(elements // m, math.comb(m, n), generator=generator).argsort(1)
    return (torch.where(rank < removed(size) - 1, 0, rank + 1).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Scores read and written, one bit per weight written; one comparison per score."""
    elements, n, m = size
    scores = elements // m * math.comb(m, n)
    return 2 * scores * element_bytes + elements // 8, scores


def ours(size):
    def remove(scores):
        mask = nm_remove_(scores, removed(size), *size[1:])
        return lambda: unpack_mask(mask, (len(scores), size[2])).to(scores.dtype)

    return remove


def eager(size):
    def remove(scores):
        nm_remove_chain(scores, removed(size))
        return lambda: ((scores != 0).to(scores) @ nm_combinations(*size[1:]).to(scores) != 0).to(scores)

    return remove


def prepare(remove, inputs, dtype, direction):
    """What ``remove`` returns gives the mask, for the comparison; it is not timed."""
    scores = inputs[0].clone()

    def results():
        fresh = inputs[0].clone()
        mask = remove(fresh)()
        return {"output": fresh, "output mask": mask}

    return Prepared(lambda: remove(scores), results)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: torch.topk and a scatter"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="nm_remove",
    sizes=SIZES,
    small=(96, 4, 8),
    directions=["removal"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["nm_remove"],
)

bench_nm_remove = benchmark(SUITE)
