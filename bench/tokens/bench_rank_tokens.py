"""Stable ranking of the tokens of every image by their scores, against torch.argsort."""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor

CUDA = settings.device() == "cuda"
SIZES = {f"n{count}_b{batch}": (batch, count) for count in (196, 49) for batch in (64, 1)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])


def make_inputs(size, dtype, device, generator):
    """A hundred levels: with ties, whose order is part of the result."""
    levels = torch.randint(100, size, generator=generator) / 100
    return (levels.to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Scores read, int64 ranks written; two comparisons for every pair of tokens."""
    batch, count = size
    return batch * count * (element_bytes + 8), batch * count**2


def ours(size):
    return tersor.rank_tokens


def eager(size):
    return lambda scores: torch.argsort(scores, dim=1, descending=True, stable=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="torch.argsort with stable=True"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="rank_tokens",
    sizes=SIZES,
    small=(2, 10),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(names=["output index"]),
    implementations=IMPLEMENTATIONS,
    operators=["rank_tokens"],
    targets=[Target("rank_tokens/*/*/*", "eager", 1)],
)

bench_rank_tokens = benchmark(SUITE)
