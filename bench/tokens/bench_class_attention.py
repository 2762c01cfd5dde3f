"""Self-attention of DeiT-S that also gives the class token's attention, against the whole matrix and against SDPA.

The sequences are CF-ViT's coarse and fine ones (50, 125) and the plain model's (197). All implementations take the
fused projection ``(B, n, 3, heads, head_dim)``, whose gradient is taken; the scores have none.
"""

import dataclasses

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor
from tersor.models.eager_tokens import attend, class_scores

CUDA = settings.device() == "cuda"
# (batch, tokens, heads, head_dim)
SIZES = {f"n{length}_b{batch}": (batch, length, 6, 64) for length in (197, 125, 50) for batch in (64, 1)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    batch, length, heads, head_dim = size
    return (torch.randn(batch, length, 3, heads, head_dim, generator=generator).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Forward: the projection read, the output with its log-sum-exp (float32 per head) and the scores written; per pair
    of tokens two dot products of head_dim multiply-adds. Backward: projection, output, its gradient and the log-sum-exp
    read, three gradients written; five such products, since the weights are computed again."""
    batch, length, heads, head_dim = size
    rows = batch * length * heads
    tensor, logsumexp, product = rows * head_dim * element_bytes, rows * 4, 2 * length * rows * head_dim
    forward = 4 * tensor + logsumexp + batch * (length - 1) * 4
    if direction == "forward":
        return forward, 2 * product
    return forward + 8 * tensor + logsumexp, 7 * product


def compared(outputs):
    """The scores, which add up to less than one, are as large as the output where they are equal."""
    output, scores = outputs
    return output, scores * scores.shape[1]


def ours(size):
    return tersor.class_attention_qkvpacked


def eager(size):
    def function(qkv):
        output, weights = attend(qkv)
        return output, class_scores(weights).detach()

    return function


def sdpa(size):
    def function(qkv):
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        row = query[:, :, :1].detach() @ key.detach().transpose(-2, -1) * size[3] ** -0.5
        return output, class_scores(row.softmax(-1))

    return function


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: the whole matrix, two batched products, the heads' mean"),
    Implementation("sdpa", sdpa, note="scaled_dot_product_attention, and the class token's row a second time"),
    Implementation("compiled", compiled, sizes=[LARGEST], note="torch.compile of the eager way, default mode"),
]

SUITE = Suite(
    operator="class_attention",
    sizes=SIZES,
    small=(2, 10, 2, 24),
    dtypes=[torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32],
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(names=["output", "output scores"], compared=compared),
    implementations=IMPLEMENTATIONS,
    operators=["class_scores"] if CUDA else ["class_scores", "window_attention_forward"],
    targets=[
        Target("class_attention/*_b64/*/forward", "eager", 1.5),
        Target("class_attention/*/*/*", "eager", 1),
        Target("class_attention/*/*/*", "sdpa", 1),
    ],
)

bench_class_attention = benchmark(SUITE)
bench_class_attention_backward = benchmark(
    dataclasses.replace(SUITE, sizes={LARGEST: SIZES[LARGEST]}, directions=["forward_backward"], targets=[])
)
