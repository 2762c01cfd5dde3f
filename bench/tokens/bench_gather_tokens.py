"""Tokens by index in DeiT-S: the 138 best of 197 with the class token, and CF-ViT's 25 of 50."""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor
from tersor.models.eager_tokens import select

CUDA = settings.device() == "cuda"
# (batch, tokens, channels, chosen)
SIZES = {"n197_m139_b64": (64, 197, 384, 139), "n197_m139_b1": (1, 197, 384, 139), "n50_m25_b64": (64, 50, 384, 25)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    batch, length, dim, chosen = size
    index = torch.rand(batch, length, generator=generator).argsort(1)[:, :chosen].contiguous()
    return index.to(device), torch.randn(batch, length, dim, generator=generator).to(device, dtype)


def traffic(size, element_bytes, direction):
    """Chosen tokens read and written; backward the incoming gradient read and a whole one written. The index both
    times. Nothing is computed: one operation per element stands for the copy."""
    batch, length, dim, chosen = size
    row, index = dim * element_bytes, batch * chosen * 8
    forward = batch * 2 * chosen * row + index
    if direction == "forward":
        return forward, batch * chosen * dim
    return forward + batch * (chosen + length) * row + index, 2 * batch * chosen * dim


def ours(size):
    return lambda index, input: tersor.gather_tokens(input, index)


def eager(size):
    return lambda index, input: select(input, index)


def torch_gather(size):
    return lambda index, input: torch.gather(input, 1, index[..., None].expand(-1, -1, input.shape[2]))


def advanced(size):
    return lambda index, input: input[torch.arange(input.shape[0], device=input.device)[:, None], index]


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: rows of the flattened batch"),
    Implementation("gather", torch_gather, note="torch.gather with the index expanded to all channels"),
    Implementation("advanced", advanced, note="input[image, index]"),
    Implementation("compiled", compiled, sizes=[LARGEST], note="torch.compile of the eager way, default mode"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="gather_tokens",
    sizes=SIZES,
    small=(2, 10, 24, 5),
    dtypes=[torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(fixed=1),
    implementations=IMPLEMENTATIONS,
    operators=["gather_tokens_forward", "gather_tokens_backward"],
    targets=[Target("gather_tokens/*/*/*", "eager", 1), Target("gather_tokens/*/*/*", "gather", 1)],
)

bench_gather_tokens = benchmark(SUITE)
