"""Dilated attention in the two dilated stages of DilateFormer-T, against the published way and the peers.

All implementations take q, k and v as views of one fused (B, H, W, 3, heads, head_dim) tensor, which is what a
projection gives, and return (B, H, W, heads, head_dim); the gradient is the fused tensor's.
"""

import attention_peers as peers
import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager import dilated_attention_unfold

K, DILATION = peers.KERNEL_SIZE, peers.DILATION
CUDA = settings.device() == "cuda"
STAGES = {"stage1": (56, 56, 3, 24), "stage2": (28, 28, 6, 24)}
BATCHES = [("stage1", 128)] if CUDA else [("stage1", 4), ("stage1", 16), ("stage2", 16)]
SIZES = {f"{stage}_b{batch}": (batch, *STAGES[stage]) for stage, batch in BATCHES[: 1 if settings.QUICK else None]}
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32, torch.bfloat16]
SMALLEST = [next(iter(SIZES))]  # for what takes seconds a call, or 10 s to compile


def make_inputs(size, dtype, device, generator):
    batch, height, width, heads, head_dim = size
    return (torch.randn(batch, height, width, 3, heads, head_dim, generator=generator).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Forward: q, k, v read, the output and its log-sum-exp (float32 per head) written; per tap two dot products'
    worth of head_dim multiply-adds. Backward: q, k, v, the output, its gradient and the log-sum-exp read, three
    gradients written; per tap five such products, since the weights are computed again."""
    batch, height, width, heads, head_dim = size
    rows = batch * height * width * heads
    tensor, logsumexp = rows * head_dim * element_bytes, rows * 4
    product = 2 * K**2 * rows * head_dim
    if direction == "forward":
        return 4 * tensor + logsumexp, 2 * product
    return (4 + 8) * tensor + 2 * logsumexp, (2 + 5) * product


def unpacked(size):
    return lambda qkv: tersor.dilated_attention(*qkv.unbind(3), K, DILATION)


def packed(size):
    return lambda qkv: tersor.dilated_attention_qkvpacked(qkv, K, DILATION)


def eager(size):
    return lambda qkv: dilated_attention_unfold(*qkv.unbind(3), K, DILATION, size[-1] ** -0.5)


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


def compiled_with_graph(size):
    function = compiled(size)

    def attention(qkv):
        with torch.enable_grad():
            return function(qkv.detach().requires_grad_()).detach()

    return attention


IMPLEMENTATIONS = [
    Implementation("tersor", unpacked, ours=True, note="the default backend"),
    Implementation("tersor_packed", packed, ours=True, note="one fused gradient instead of three to be stacked"),
    Implementation("eager", eager, note="the published way: unfold, two batched products"),
    Implementation("compiled", compiled, note="torch.compile of the eager way, default mode"),
    Implementation(
        "compiled_with_graph",
        compiled_with_graph,
        directions=["forward"],
        stands_in_for="compiled",
        note="the forward pass of the training graph: torch cannot compile the inference one here",
    ),
    Implementation("reference", unpacked, ours=True, backend="reference", sizes=SMALLEST, note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS += [
        Implementation("native", unpacked, ours=True, backend="native", note="CUDA C++"),
        Implementation("triton", unpacked, ours=True, backend="triton", note="Triton"),
        Implementation("flex_attention", peers.flex_corrected, note="compiled; log-sum-exp corrected, exact"),
        Implementation("natten", peers.natten_padded, unavailable=peers.no_natten, note="zero-padded, exact"),
        Implementation(
            "natten_raw",
            peers.natten_raw,
            unavailable=peers.no_natten,
            crop=peers.interior,
            note="a different function at the border; compared in the interior only",
        ),
    ]
else:
    IMPLEMENTATIONS += [
        Implementation(
            "flex_attention",
            peers.flex_padded,
            directions=["forward"],
            sizes=SMALLEST,
            note="compiled; padded keys, exact; has no backward pass on the CPU",
        ),
    ]

STAGE1 = "dilated_attention/stage1_*/*/"
TARGETS = [
    Target(STAGE1 + "forward", "eager", 8 if CUDA else 20),
    Target(STAGE1 + "forward", "copy", 0.6 if CUDA else 0.5),
    Target(STAGE1 + "forward_backward", "eager", 8 if CUDA else 15),
    Target(STAGE1 + "forward_backward", "copy", 0.5),
]
if not CUDA:
    TARGETS += [
        Target(STAGE1 + "forward", "compiled*", 10),
        Target(STAGE1 + "forward_backward", "compiled*", 8),
    ]

SUITE = Suite(
    operator="dilated_attention",
    sizes=SIZES,
    small=(2, 21, 20, 3, 24),
    dtypes=DTYPES[: 1 if settings.QUICK else None],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=unpacked,
    implementations=IMPLEMENTATIONS,
    operators=["dilated_attention_forward", "dilated_attention_backward"],
    targets=TARGETS,
)

bench_dilated_attention = benchmark(SUITE)
