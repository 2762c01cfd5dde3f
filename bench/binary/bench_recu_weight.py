"""ReCU's weights against the published chain, for 3x3 convolutions of ResNet-18."""

import math

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target

from tersor.binary import recu_weight, reste_sign
from tersor.models import eager_binary

CUDA = settings.device() == "cuda"
TAU, O = 0.9, 2.3
RULES = {
    "recu": (lambda w: recu_weight(w, TAU), lambda w: eager_binary.recu_weight(w, TAU)),
    "reste": (lambda w: reste_sign(w, O), lambda w: eager_binary.reste_sign(w, O)),
}
# Of 512 x 512 weights one lies so near the border of the clamp that float64 puts it on the other side.
SHAPES = {"64": (64, 64, 3, 3), "256": (256, 256, 3, 3), "512": (512, 256, 3, 3)}
SIZES = {f"{rule}_{name}": (rule, shape) for rule in RULES for name, shape in SHAPES.items()}
if settings.QUICK:
    SIZES = {f"{r}_16": (r, (16, 16, 3, 3)) for r in RULES}


def make_inputs(size, dtype, device, generator):
    return ((torch.randn(size[1], generator=generator) * 0.1).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Weight read, signs written; backwards weight and gradient read, one written."""
    elements = math.prod(size[1])
    return (2 if direction == "forward" else 5) * elements * element_bytes, 10 * elements


def ours(size):
    return RULES[size[0]][0]


def eager(size):
    return RULES[size[0]][1]


def compiled(size):
    return torch.compile(eager(size), dynamic=False)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way"),
    Implementation("compiled", compiled, note="torch.compile of eager, which breaks where a number goes to the host"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="recu_weight",
    sizes=SIZES,
    small=("recu", (6, 8, 3, 3)),
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    implementations=IMPLEMENTATIONS,
    operators=["recu_weight_forward", "recu_weight_backward"],
    targets=[] if CUDA else [Target("recu_weight/*/float32/forward_backward", "eager", 8)],
)

bench_recu_weight = benchmark(SUITE)
