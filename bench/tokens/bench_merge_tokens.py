"""Token Merging's step in a block of DeiT-S at 224 pixels: match by the keys, then merge stream and sizes.

Of 197 tokens 16 or 98, the most there can be, are merged. All implementations take the keys as a view of the fused
projection, the tokens' sizes and the stream, and give the merged stream and sizes; the gradient is the stream's.
"""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor
from tersor.models.eager_tokens import merge

CUDA = settings.device() == "cuda"
TOKENS, DIM, HEADS = 197, 384, 6
# (batch, tokens, channels, heads, merged)
SIZES = {f"n{TOKENS}_r{count}_b{batch}": (batch, TOKENS, DIM, HEADS, count) for batch in (64, 1) for count in (16, 98)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    """Sizes in float32 for every dtype, of tokens that have been merged before."""
    batch, length, dim, heads, _ = size
    qkv = torch.randn(batch, length, 3, heads, dim // heads, generator=generator).to(device, dtype)
    sizes = torch.randint(1, 4, (batch, length), generator=generator).to(device, torch.float32)
    return qkv[:, :, 1], sizes, torch.randn(batch, length, dim, generator=generator).to(device, dtype)


def traffic(size, element_bytes, direction):
    """Forward: keys, stream and sizes read, merged ones and the index written. Backward: the incoming gradient, index
    and sizes read, a whole gradient written. Keys are added over the heads and multiplied in pairs of a and b."""
    batch, length, dim, heads, count = size
    row, left, index = dim * element_bytes, length - count, batch * length * 8
    sizes = batch * (length + left) * 4
    forward = batch * (2 * length + left) * row + sizes + index
    work = batch * (length * dim + 2 * (length // 2) ** 2 * dim // heads + 2 * length * dim)
    if direction == "forward":
        return forward, work
    return forward + batch * (left + length) * row + sizes + index, work + batch * length * dim


def ours(size):
    def function(keys, sizes, input):
        index, length = tersor.match_tokens(keys, size[4])
        return tersor.merge_tokens(input, index, length, sizes)

    return function


def eager(size):
    def function(keys, sizes, input):
        tokens, total = merge(keys, sizes[..., None].to(input.dtype), input, size[4])
        return tokens, total[..., 0]

    return function


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: cosines, argsort, gathers, scatter_reduce, cat, division"),
    Implementation("compiled", compiled, sizes=[LARGEST], note="torch.compile of that, default mode"),
    Implementation("reference", ours, ours=True, backend="reference", sizes=[LARGEST], note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="merge_tokens",
    sizes=SIZES,
    small=(2, 11, 24, 2, 3),
    dtypes=[torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(fixed=2, names=["output tokens", "output sizes"]),
    implementations=IMPLEMENTATIONS,
    operators=["match_tokens", "merge_tokens_forward", "merge_tokens_backward"],
    targets=[
        Target("merge_tokens/*/*/*", "eager", 3),
        Target(f"merge_tokens/{LARGEST}/*/*", "compiled", 1),
    ],
)

bench_merge_tokens = benchmark(SUITE)
