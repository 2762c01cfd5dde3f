"""A training step of Uformer-T (forward, Charbonnier loss, backward, AdamW), and inference, with each kind of block.

Stochastic depth is off, so that every step does the same work and can be compared.
"""

import copy

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite

from tersor.models import uformer_tiny
from tersor.models.eager_uformer import EagerLeWinBlock
from tersor.models.uformer import LeWinBlock, charbonnier_loss

CUDA = settings.device() == "cuda"
BATCH, PIXELS = (16, 128) if CUDA else (1, 128) if settings.QUICK else (2, 128)


def make_inputs(size, dtype, device, generator):
    batch, pixels = size
    return tuple(torch.rand(batch, 3, pixels, pixels, generator=generator).to(device, dtype) for _ in range(2))


def model(block):
    return lambda size: lambda: uformer_tiny(size[1], drop_path=0.0, block=block)


def prepare(build, inputs, dtype, direction):
    noisy, clean = inputs
    torch.manual_seed(settings.SEED)
    network = build().to(noisy).train()
    if direction == "forward":
        network.eval()

        def call():
            with torch.no_grad():
                return network(noisy)

        return Prepared(call, lambda: {"output": call()})
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=0.02)
    start = copy.deepcopy(network.state_dict())

    def step():
        optimizer.zero_grad()
        charbonnier_loss(network(noisy), clean).backward()
        optimizer.step()

    def results():
        network.load_state_dict(start)
        network.zero_grad()
        output = network(noisy)
        charbonnier_loss(output, clean).backward()
        gradients = {f"gradient {name}": p.grad.clone() for name, p in network.named_parameters()}
        return {"output": output.detach()} | gradients

    return Prepared(step, results, lambda: charbonnier_loss(network(noisy), clean))


SUITE = Suite(
    operator="uformer_tiny",
    sizes={f"{PIXELS}_b{BATCH}": (BATCH, PIXELS)},
    small=(1, 128),
    directions=["forward", "training_step"],
    make_inputs=make_inputs,
    reference=model(LeWinBlock),
    prepare=prepare,
    implementations=[
        Implementation("tersor", model(LeWinBlock), ours=True, note="the default backend"),
        Implementation("eager", model(EagerLeWinBlock), note="the published way"),
    ],
    operators=["window_attention_forward", "window_attention_backward"],
)

bench_uformer = benchmark(SUITE)
