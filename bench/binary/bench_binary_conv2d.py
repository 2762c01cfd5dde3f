"""Binary convolutions of ResNet-18 in training, ReCU's and ReSTE's, against the published layers."""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

from tersor.binary import recu_conv2d, reste_conv2d
from tersor.models import eager_binary

CUDA = settings.device() == "cuda"
TAU, O = 0.9, 2.3
LAYERS = {"c64": (64, 56), "c256": (256, 14)}
SIZES = {f"{r}_{n}_b16": (r, 16, c, side) for r in ("recu", "reste") for n, (c, side) in LAYERS.items()}
if settings.QUICK:
    SIZES = {f"{r}_c16_b2": (r, 2, 16, 6) for r in ("recu", "reste")}


def make_inputs(size, dtype, device, generator):
    _, batch, channels, side = size
    input = torch.randn(batch, channels, side, side, generator=generator)
    weight = torch.randn(channels, channels, 3, 3, generator=generator) * 0.1
    alpha = torch.rand(channels, 1, 1, generator=generator)  # ReSTE has none
    return tuple(t.to(device, dtype) for t in (input, weight, alpha)[: 3 if size[0] == "recu" else 2])


def ours(size):
    if size[0] == "recu":
        return lambda x, w, alpha: recu_conv2d(x, w, alpha, TAU, padding=1)
    return lambda x, w: reste_conv2d(x, w, O, O, padding=1)


def eager(size):
    def recu(x, w, alpha):
        signs = eager_binary.binarize_activation(x), eager_binary.recu_weight(w, TAU)
        return torch.nn.functional.conv2d(*signs, padding=1) * alpha

    def reste(x, w):
        weight = eager_binary.reste_sign(w, O) * w.abs().mean([0, 1, 2, 3], keepdim=True)
        return torch.nn.functional.conv2d(eager_binary.reste_sign(x, O), weight, padding=1)

    return recu if size[0] == "recu" else reste


def compiled(size):
    return torch.compile(eager(size), dynamic=False)


def tolerance(dtype, name):
    """Gradients are sums of thousands of products, which torch's convolutions round in float32."""
    return 1e-4 if dtype == torch.float32 else 0.05


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published layer"),
    Implementation("compiled", compiled, note="torch.compile of eager"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="binary_conv2d",
    sizes=SIZES,
    small=("recu", 2, 8, 5),
    make_inputs=make_inputs,
    reference=ours,
    implementations=IMPLEMENTATIONS,
    operators=["binary_conv2d_forward", "binary_conv2d_backward"],
    tolerance=tolerance,
    targets=[]
    if CUDA
    else [
        Target("binary_conv2d/*/float32/forward_backward", "eager", 1.25),
        Target("binary_conv2d/*/float32/forward_backward", "eager", 8, memory=True),
    ],
)

bench_binary_conv2d = benchmark(SUITE)
