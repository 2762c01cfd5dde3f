"""LeFF in Uformer-T's and PSLT's levels, against the published way, that compiled, and one without rearranging.

All take and return ``(B, H, W, C)``; the gradients are those of the input and of all parameters.
"""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.models.eager_leff import leff_channels_last, leff_rearrange

CUDA = settings.device() == "cuda"
BATCH = 32 if CUDA else 1
# (B, H, W, C, E): Uformer-T on 128 x 128 from the outermost level to the bottleneck, each also as the decoder has it,
# twice as wide; Uformer-B's bottleneck on 256 x 256; MLPlight in PSLT's two stages.
LEVELS = {
    "uformer_t_128": (128, 128, 16, 64),
    "uformer_t_128_decoder": (128, 128, 32, 128),
    "uformer_t_64": (64, 64, 32, 128),
    "uformer_t_32": (32, 32, 64, 256),
    "uformer_t_16": (16, 16, 128, 512),
    "uformer_b_16": (16, 16, 512, 2048),
    "pslt_14": (14, 14, 96, 96),
    "pslt_7": (7, 7, 192, 192),
}
LEVELS = dict(list(LEVELS.items())[: 1 if settings.QUICK else None])
SIZES = {f"{name}_b{BATCH}": (BATCH, *size) for name, size in LEVELS.items()}
if not CUDA and not settings.QUICK:
    SIZES |= {"pslt_14_b32": (32, 14, 14, 96, 96), "uformer_t_256_b1": (1, 256, 256, 16, 64)}
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32, torch.bfloat16]


def make_inputs(size, dtype, device, generator):
    batch, height, width, channels, hidden = size
    shapes = [
        (batch, height, width, channels), (hidden, channels), (hidden,), (hidden, 1, 3, 3), (hidden,),
        (channels, hidden), (channels,),
    ]  # fmt: skip
    scales = [1, channels**-0.5, 0.1, 0.3, 0.1, hidden**-0.5, 0.1]
    tensors = zip(shapes, scales, strict=True)
    return tuple((torch.randn(s, generator=generator) * scale).to(device, dtype) for s, scale in tensors)


def traffic(size, element_bytes, direction):
    """Forward: input read and output written; per token two products and nine multiply-adds a hidden channel.
    Backward: input and incoming gradient read, the input's gradient written; five products, since the first is
    computed again, and three times the taps. The weights are counted once each way."""
    batch, height, width, channels, hidden = size
    tokens = batch * height * width
    weights = (2 * channels * hidden + 11 * hidden + channels) * element_bytes
    tensor, product, taps = tokens * channels * element_bytes, 2 * tokens * channels * hidden, 18 * tokens * hidden
    if direction == "forward":
        return 2 * tensor + weights, 2 * product + taps
    return 5 * tensor + 3 * weights, 7 * product + 4 * taps


def ours(size):
    return tersor.leff


def eager(size):
    return leff_rearrange


def channels_last(size):
    return leff_channels_last


def compiled(size):
    return torch.compile(leff_rearrange, dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: tokens and channels-first maps in turn"),
    Implementation("compiled", compiled, note="torch.compile of the eager way, default mode"),
    Implementation("channels_last", channels_last, note="eager without rearranging"),
    Implementation("reference", ours, ours=True, backend="reference", sizes=[next(iter(SIZES))], note="plain torch"),
]
if CUDA:
    IMPLEMENTATIONS += [Implementation("triton", ours, ours=True, backend="triton", note="Triton")]

OUTER = "leff/uformer_t_128*/float32/"
TARGETS = [
    Target(OUTER + "forward", "eager", 3 if CUDA else 8),
    Target(OUTER + "forward_backward", "eager", 2 if CUDA else 4),
    Target("leff/*/*/forward", "eager", 1),
    Target("leff/*/*/forward_backward", "eager", 1),
]

SUITE = Suite(
    operator="leff",
    sizes=SIZES,
    small=(2, 9, 10, 6, 40),
    dtypes=DTYPES[: 1 if settings.QUICK else None],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    implementations=IMPLEMENTATIONS,
    operators=["leff_forward", "leff_backward"],
    targets=TARGETS,
)

bench_leff = benchmark(SUITE)
