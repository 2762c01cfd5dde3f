"""A training step of a layer with learned N:M sparsity (LBC), removal included, against the dense layer's.

The shapes are those of ResNet-50 and DeiT-small with a batch of 32. The scores start with all but a third removed; the
removal finds as many zeros as it is to leave, as in nearly all steps of a run.
"""

import math

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target

from tersor.models.eager_sparsity import nm_remove_chain, nm_sparsify_chain
from tersor.sparsity import nm_remove_, nm_sparsify
from tersor.sparsity.nm_compact import expand_scores

LAYERS = {
    "conv256": ((32, 256, 14, 14), (256, 256, 3, 3)),
    "fc1": ((32 * 197, 384), (1536, 384)),
}
PATTERNS = {"2of4": (2, 4), "4of8": (4, 8)}
SIZES = {f"{layer}_{p}": (*shapes, *pattern) for layer, shapes in LAYERS.items() for p, pattern in PATTERNS.items()}
if settings.QUICK:
    SIZES = {"fc_2of4": ((64, 32), (48, 32), 2, 4)}


def make_inputs(size, dtype, device, generator):
    input_shape, weight_shape, n, m = size
    input, weight = (torch.randn(*shape, generator=generator) for shape in (input_shape, weight_shape))
    scores = torch.rand(weight.numel() // m, math.comb(m, n), generator=generator) + 0.5
    lowest = scores.argsort(1)[:, : removed(size)]
    scores = scores.scatter(1, lowest, 0.0)
    incoming = torch.randn(layer(input.to("meta"), weight.to("meta")).shape, generator=generator)
    return tuple(t.to(device, dtype) for t in (input, weight, scores, incoming))


def removed(size):
    return math.comb(size[3], size[2]) * 2 // 3


def layer(input, weight):
    return F.conv2d(input, weight, padding=1) if weight.dim() == 4 else F.linear(input, weight)


def ours(size):
    n, m = size[2:]

    def sparse(weight, scores):
        mask = nm_remove_(scores, removed(size), n, m)
        return nm_sparsify(weight, scores, n, m, mask)

    return sparse


def compact(size):
    """The scores that are left alone, as after the epoch in which the others were removed."""
    n, m = size[2:]

    def sparse(weight, scores):
        numbers = sparse.numbers
        mask = nm_remove_(scores, 0, n, m, numbers)
        return nm_sparsify(weight, scores, n, m, mask, numbers)

    def store(scores):
        left = scores != 0
        shape = len(scores), scores.shape[1] - removed(size)
        every = torch.arange(scores.shape[1], dtype=torch.uint8, device=scores.device)
        sparse.numbers = every.expand_as(left)[left].view(shape)
        return scores[left].view(shape)

    sparse.store = store
    sparse.expand = lambda scores: expand_scores(scores, sparse.numbers, n, m)
    return sparse


def eager(size):
    def sparse(weight, scores):
        nm_remove_chain(scores, removed(size))
        return nm_sparsify_chain(weight, scores, *size[2:])

    return sparse


def dense(size):
    return lambda weight, scores: weight


def prepare(sparsify, inputs, dtype, direction):
    input, weight, scores, incoming = inputs
    scores = getattr(sparsify, "store", lambda full: full)(scores)
    input, weight, scores = (t.detach().clone().requires_grad_() for t in (input, weight, scores))

    def step():
        output = layer(input, sparsify(weight, scores))
        return output, torch.autograd.grad(output, (input, weight, scores), incoming, allow_unused=True)

    def results():
        output, (*gradients, last) = step()
        gradients.append(getattr(sparsify, "expand", lambda own: own)(last))
        found = {"output": output.detach()}
        return found | {f"gradient {i}": g / math.sqrt(incoming.shape[0]) for i, g in enumerate(gradients)}

    return Prepared(step, results)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("compact", compact, note="tersor, where only the scores that are left are stored"),
    Implementation("eager", eager, note="the published way"),
    Implementation("dense", dense, compared=False, note="the same layer without sparsity"),
]

SUITE = Suite(
    operator="nm_sparsify",
    sizes=SIZES,
    small=((6, 8), (12, 8), 2, 4),
    directions=["training_step"],
    make_inputs=make_inputs,
    reference=ours,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["nm_sparsify_forward", "nm_sparsify_backward", "nm_remove"],
    targets=[
        Target("nm_sparsify/*_2of4/*", "dense", 1 / 1.15),
        Target("nm_sparsify/*_4of8/*", "dense", 1 / 1.3),
    ],
)

bench_nm_sparsify = benchmark(SUITE)
