"""SuperViT's step in a block of DeiT-S at 224 pixels: residual sum, choice of tokens and layer norm.

With 197 tokens, ``ceil(rate * 197)`` besides the class token are kept. All implementations take the scores, the stream,
the attention branch and the norm's parameters, and give the kept tokens and the normalised ones; both have gradients.
"""

import math

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor
from tersor.models.eager_tokens import prune

CUDA = settings.device() == "cuda"
TOKENS, DIM, EPS = 197, 384, 1e-6
# (batch, tokens, channels, kept besides the class token)
SIZES = {
    f"n{TOKENS}_keep{percent}_b{batch}": (batch, TOKENS, DIM, math.ceil(percent * TOKENS / 100))
    for batch in (64, 1)
    for percent in (70, 50)
}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    """Scores in float32 for every dtype, as attention gives them."""
    batch, length, dim, _ = size
    scores = torch.rand(batch, length - 1, generator=generator).to(device)
    shapes = [(batch, length, dim), (batch, length, dim), (dim,), (dim,)]
    return scores, *(torch.randn(s, generator=generator).to(device, dtype) for s in shapes)


def traffic(size, element_bytes, direction):
    """Forward: of stream and branch only kept tokens are read, sums and normalised tokens written, scores read and the
    index written. Backward: two incoming gradients, the kept sums and the index read, two gradients written whole.
    A layer norm takes about 8 operations an element, its gradient 12."""
    batch, length, dim, count = size
    row, kept, index = dim * element_bytes, 1 + count, batch * (1 + count) * 8
    forward = batch * 4 * kept * row + batch * (length - 1) * 4 + index
    if direction == "forward":
        return forward, batch * 9 * kept * dim
    return forward + batch * (3 * kept + 2 * length) * row + index, batch * 21 * kept * dim


def ours(size):
    return lambda *inputs: tersor.prune_tokens(*inputs, size[3], eps=EPS)[:2]


def eager(size):
    def function(scores, input, branch, weight, bias):
        tokens = prune(scores, input + branch, size[3])
        return tokens, F.layer_norm(tokens, weight.shape, weight, bias, EPS)

    return function


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: sum, argsort, cat, gather, layer norm"),
    Implementation("compiled", compiled, sizes=[LARGEST], note="torch.compile of that, default mode"),
    Implementation("reference", ours, ours=True, backend="reference", sizes=[LARGEST], note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="prune_tokens",
    sizes=SIZES,
    small=(2, 10, 24, 5),
    dtypes=[torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(fixed=1, names=["output tokens", "output normalized"]),
    implementations=IMPLEMENTATIONS,
    operators=["prune_tokens_forward", "prune_tokens_backward"],
    targets=[
        Target("prune_tokens/*_b64/*/*", "eager", 1.75),  # at 70 % the published way moves 2.07 times the bytes
        Target("prune_tokens/*_b1/*/*", "eager", 1),
        Target(f"prune_tokens/{LARGEST}/*/*", "compiled", 1),
    ],
)

bench_prune_tokens = benchmark(SUITE)
