"""A training step of DDTB's EDSR x2 (forward, L1 loss, backward, Adam) with each way to quantise.

4 bits, static bounds. The activations that the graph keeps are in the table too.
"""

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target

from tersor.models.eager_quantization import make_eager_
from tersor.models.edsr import EDSR

CUDA = settings.device() == "cuda"
BATCH = 16 if CUDA else 1 if settings.QUICK else 4
BLOCKS = 2 if settings.QUICK else 16
SIZE = {f"b{BATCH}": (BATCH, BLOCKS, 48)}


def make_inputs(size, dtype, device, generator):
    batch, _, pixels = size
    low = torch.rand(batch, 3, pixels, pixels, generator=generator) * 255
    high = torch.rand(batch, 3, 2 * pixels, 2 * pixels, generator=generator) * 255
    return low.to(device, dtype), high.to(device, dtype)


def network(size):
    torch.manual_seed(settings.SEED)
    return EDSR(2, blocks=size[1], channels=64, bits=4)


def plain(size):
    return lambda: network(size)


def eager(size):
    return lambda: make_eager_(network(size))


def full_precision(size):
    return lambda: EDSR(2, blocks=size[1], channels=64, quantized=False)


def prepare(build, inputs, dtype, direction):
    low, high = (x.float() for x in inputs)  # in float64 other levels would be right
    model = build().to(low).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.0)  # every step does the same work

    def loss():
        return F.l1_loss(model(low)[0], high)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def results():
        with torch.no_grad():
            return {"output": model(low)[0]}

    return Prepared(step, results, loss)


IMPLEMENTATIONS = [
    Implementation("tersor", plain, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published chains and sorting on the host"),
    Implementation("full_precision", full_precision, compared=False, note="the same network without quantisers"),
]

SUITE = Suite(
    operator="edsr",
    sizes=SIZE,
    small=(1, 1, 12),
    directions=["training_step"],
    make_inputs=make_inputs,
    reference=plain,
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["fake_quantize_bounds_forward", "fake_quantize_add_forward", "weight_fake_quantize_forward"],
    targets=[Target("edsr/*/float32/training_step", "eager", 2, memory=True)],
)

bench_edsr = benchmark(SUITE)
