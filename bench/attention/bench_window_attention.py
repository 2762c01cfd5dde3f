"""Shifted-window attention in Swin-T's first stage, PSLT's third and Uformer-T, against the published way and SDPA.

All implementations take q, k and v as views of one fused (B, H, W, 3, heads, head_dim) tensor, which is what a
projection gives, and the table of the relative position bias; the gradients are the fused tensor's and the table's.
"""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager_attention import window_attention_partition, window_attention_sdpa

CUDA = settings.device() == "cuda"
# (batch, height, width, heads, head_dim, window, shift)
if CUDA:
    SIZES = {
        "swin_tiny_stage1_b64": (64, 56, 56, 3, 32, 7, 3),
        "pslt_stage3_b64": (64, 14, 14, 4, 24, 7, -3),
        "uformer_tiny_b8": (8, 256, 256, 1, 16, 8, 4),
    }
else:
    SIZES = {
        "swin_tiny_stage1_b8": (8, 56, 56, 3, 32, 7, 3),
        "swin_tiny_stage1_b1": (1, 56, 56, 3, 32, 7, 0),
        "pslt_stage3_b32": (32, 14, 14, 4, 24, 7, -3),
        "pslt_stage3_b1": (1, 14, 14, 4, 24, 7, 3),
        "uformer_tiny_b1": (1, 256, 256, 1, 16, 8, 4),
        "uformer_tiny_64_b4": (4, 64, 64, 2, 32, 8, 0),
    }
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = [name for name in SIZES if "_b1" not in name][:1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32, torch.bfloat16]


def make_inputs(size, dtype, device, generator):
    batch, height, width, heads, head_dim, window, _ = size
    qkv = torch.randn(batch, height, width, 3, heads, head_dim, generator=generator)
    table = torch.randn((2 * window - 1) ** 2, heads, generator=generator)
    return qkv.to(device, dtype), table.to(device, dtype)


def traffic(size, element_bytes, direction):
    """Forward: q, k, v read, the output and its log-sum-exp (float32 per head) written; per pair of tokens of a window
    two dot products' worth of head_dim multiply-adds. Backward: q, k, v, the output's gradient and the log-sum-exp
    read, three gradients written; five such products, since the weights are computed again."""
    batch, height, width, heads, head_dim, window, _ = size
    rows = batch * height * width * heads
    tensor, logsumexp = rows * head_dim * element_bytes, rows * 4
    product = 2 * window**2 * rows * head_dim
    if direction == "forward":
        return 4 * tensor + logsumexp, 2 * product
    return (4 + 7) * tensor + 2 * logsumexp, (2 + 5) * product


def options(size):
    *_, window, shift = size
    return (window, window), (shift, shift)


def packed(size):
    return lambda qkv, table: tersor.window_attention_qkvpacked(qkv, *options(size), table)


def unpacked(size):
    return lambda qkv, table: tersor.window_attention(*qkv.unbind(3), *options(size), table)


def eager(size):
    return lambda qkv, table: window_attention_partition(*qkv.unbind(3), *options(size), table)


def sdpa(size):
    return lambda qkv, table: window_attention_sdpa(*qkv.unbind(3), *options(size), table)


def compiled(size):
    return torch.compile(eager(size), dynamic=False, fullgraph=True)


def compiled_sdpa(size):
    return torch.compile(sdpa(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True, note="the default backend"),
    Implementation("tersor_unpacked", unpacked, ours=True, sizes=LARGEST, note="three gradients, to be stacked"),
    Implementation("eager", eager, note="the published way: roll, partition, two batched products, and back"),
    Implementation("compiled", compiled, note="torch.compile of the eager way, default mode"),
    Implementation("sdpa", sdpa, note="roll, partition, scaled_dot_product_attention with a float mask, and back"),
    Implementation("compiled_sdpa", compiled_sdpa, note="torch.compile of that"),
    Implementation("reference", packed, ours=True, backend="reference", sizes=LARGEST, note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", packed, ours=True, backend="triton", note="Triton"))

TARGETS = [
    Target("window_attention/*/*/*", "eager", 2 if CUDA else 4),
    Target("window_attention/*/*/*", "sdpa", 1.5 if CUDA else 2),
    Target("window_attention/*/*/*", "compiled*", 1.5 if CUDA else 2),
]
if CUDA:
    TARGETS.append(Target("window_attention/*/*/*", "copy", 0.6))

SUITE = Suite(
    operator="window_attention",
    sizes=SIZES,
    small=(2, 14, 21, 2, 24, 7, 3),
    dtypes=DTYPES[: 1 if settings.QUICK else None],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=packed,
    implementations=IMPLEMENTATIONS,
    operators=["window_attention_forward", "window_attention_backward"],
    targets=TARGETS,
)

bench_window_attention = benchmark(SUITE)
