"""The sign with an estimated gradient, and ReCU's scaled one, against the published chains.

The maps are inputs of ResNet-18's binary convolutions at 56 x 56 and 14 x 14.
"""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

from tersor.binary import approx_sign, binarize_activation, reste_sign, ste_sign
from tersor.models import eager_binary

CUDA = settings.device() == "cuda"
O = 2.3
RULES = {
    "ste": (ste_sign, eager_binary.ste_sign),
    "approx": (approx_sign, eager_binary.approx_sign),
    "reste": (lambda x: reste_sign(x, O), lambda x: eager_binary.reste_sign(x, O)),
    "recu": (binarize_activation, eager_binary.binarize_activation),
}
SHAPES = {"b1_14x14": (1, 256, 14, 14), "b16_14x14": (16, 256, 14, 14), "b16_56x56": (16, 64, 56, 56)}
SIZES = {f"{rule}_{shape}": (rule, sizes) for rule in RULES for shape, sizes in SHAPES.items()}
if settings.QUICK:
    SIZES = {f"{rule}_b2_6x6": (rule, (2, 8, 6, 6)) for rule in RULES}


def make_inputs(size, dtype, device, generator):
    """No element lies within float32's rounding of a border, where the slope jumps."""
    x = torch.randn(size[1], generator=generator)
    for border in (0.1, 1.0, 1.5):
        x = torch.where((x.abs() - border).abs() < 1e-4, border + 2e-4, x)
    return (x.to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Input read, signs written; backwards the gradient and, but for "ste" (one bit), the input read, one written.
    ReCU reads the input once more each way."""
    rule, shape = size
    elements = math.prod(shape)
    forward = elements * element_bytes * (3 if rule == "recu" else 2) + (elements // 8 if rule == "ste" else 0)
    if direction == "forward":
        return forward, elements
    backward = {"ste": 2, "recu": 5}.get(rule, 3) * elements * element_bytes + (elements // 8 if rule == "ste" else 0)
    return forward + backward, 4 * elements


def ours(size):
    return RULES[size[0]][0]


def eager(size):
    return RULES[size[0]][1]


def compiled(size):
    return torch.compile(eager(size), dynamic=False)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: masks, indexed writes, float temporaries"),
    Implementation("compiled", compiled, note="torch.compile of eager"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="binary_sign",
    sizes=SIZES,
    small=("recu", (2, 3, 5, 4)),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    implementations=IMPLEMENTATIONS,
    operators=["binary_sign_forward", "binary_sign_backward"],
    targets=[] if CUDA else [Target("binary_sign/*_b16_*/float32/forward_backward", "eager", 8)],
)

bench_binary_sign = benchmark(SUITE)
