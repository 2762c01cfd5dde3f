"""CF-ViT's coarse-to-fine step in DeiT-S, on coarse grids of 7 x 7 and 9 x 9, against the published way.

All implementations take the scores, the coarse sequence, all fine patches without position, the reused features, the
table of positions and the class token; the gradients are those of the last five.
"""

import dataclasses
import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor
from tersor.models.eager_tokens import fine_sequence, resplit

CUDA = settings.device() == "cuda"
DIM, ALPHA = 384, 0.5
SIZES = {"deit_small_7x7_b64": (64, 7, DIM), "deit_small_7x7_b1": (1, 7, DIM), "deit_small_9x9_b64": (64, 9, DIM)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    """Scores in float32 for every dtype, as attention gives them."""
    batch, side, dim = size
    count = side**2
    scores = torch.rand(batch, count, generator=generator).to(device)
    shapes = [(batch, 1 + count, dim), (batch, 4 * count, dim), (batch, count, dim), (1, 1 + 4 * count, dim)]
    return scores, *(torch.randn(s, generator=generator).to(device, dtype) for s in (*shapes, (1, 1, dim)))


def traffic(size, element_bytes, direction):
    """Forward: of the fine patches, the reused and the coarse tokens only those are read that go into the sequence,
    which is written; the table of positions once for the batch, scores and ranking. Backward: the incoming gradient and
    the ranking read, five gradients written whole. Two additions a channel of a fine token, and four backward."""
    batch, side, dim = size
    count = side**2
    chosen = math.ceil(ALPHA * count)
    row, table = dim * element_bytes, (2 + 4 * count) * dim * element_bytes
    sequence, ranking = 1 + 4 * chosen + count - chosen, batch * count * 8
    forward = batch * (4 * chosen + chosen + count - chosen + sequence) * row + table + batch * count * 4 + ranking
    if direction == "forward":
        return forward, 2 * batch * 4 * chosen * dim
    backward = batch * (sequence + 1 + count + 4 * count + count) * row + table + ranking
    return forward + backward, 6 * batch * 4 * chosen * dim


def ours(size):
    return lambda *inputs: tersor.resplit_tokens(*inputs, alpha=ALPHA)[0]


def eager(size):
    def function(scores, coarse, fine_patches, reuse, position, cls):
        return resplit(scores, coarse, fine_sequence(fine_patches, reuse, position, cls), ALPHA)

    return function


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: argsort, upsample, sums, two gathers and a cat"),
    Implementation("compiled", compiled, note="torch.compile of that, default mode"),
    Implementation("reference", ours, ours=True, backend="reference", sizes=[LARGEST], note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

TARGETS = [Target("resplit_tokens/*/*/*", "eager", 4)]
if CUDA:
    TARGETS.append(Target("resplit_tokens/*/*/*", "copy", 0.8))

SUITE = Suite(
    operator="resplit_tokens",
    sizes=SIZES,
    small=(2, 3, 24),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(fixed=1),
    implementations=IMPLEMENTATIONS,
    operators=["resplit_tokens_forward", "resplit_tokens_backward"],
    targets=TARGETS,
)

bench_resplit_tokens = benchmark(SUITE)

if not settings.QUICK:
    HALF = dataclasses.replace(
        SUITE,
        sizes={name: size for name, size in SIZES.items() if size[0] > 1},
        dtypes=[torch.float16, torch.bfloat16] if CUDA else [torch.bfloat16],
        targets=[],
    )
    bench_resplit_tokens_half = benchmark(HALF)
