"""A training step of DilateFormer-T: forward, loss, backward and an AdamW step, with each attention layer.

Stochastic depth is off, so that every step does the same work and can be compared.
"""

import copy

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target

from tersor import DilatedAttention
from tersor.models import dilateformer_tiny
from tersor.models.eager import EagerDilatedAttention

CUDA = settings.device() == "cuda"
BATCH = 64 if CUDA else 2 if settings.QUICK else 4
PIXELS = 112 if settings.QUICK else 224
CLASSES = 1000


def make_inputs(size, dtype, device, generator):
    batch, pixels = size
    images = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device, dtype)
    return images, torch.randint(CLASSES, (batch,), generator=generator).to(device)


def model(attention):
    return lambda size: lambda: dilateformer_tiny(num_classes=CLASSES, drop_path=0.0, attention=attention)


def compiled_model(size):
    return lambda: torch.compile(model(EagerDilatedAttention)(size)(), dynamic=False)


def prepare(build, inputs, dtype, direction):
    images, labels = inputs
    torch.manual_seed(settings.SEED)
    network = build().to(images).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    start = copy.deepcopy(network.state_dict())

    def loss():
        return F.cross_entropy(network(images), labels)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def results():
        network.load_state_dict(start)
        network.zero_grad()
        output = network(images)
        F.cross_entropy(output, labels).backward()
        names = (name.removeprefix("_orig_mod.") for name, _ in network.named_parameters())
        gradients = {f"gradient {n}": p.grad.clone() for n, p in zip(names, network.parameters(), strict=True)}
        return {"output": output.detach()} | gradients

    return Prepared(step, results, loss)


IMPLEMENTATIONS = [
    Implementation("tersor", model(DilatedAttention), ours=True, note="the default backend"),
    Implementation("eager", model(EagerDilatedAttention), note="the published attention: unfold, two batched products"),
]
if settings.FULL:
    IMPLEMENTATIONS.append(Implementation("compiled", compiled_model, note="torch.compile of the whole eager model"))

SUITE = Suite(
    operator="dilateformer_tiny",
    sizes={f"{PIXELS}_b{BATCH}": (BATCH, PIXELS)},
    small=(2, 64),  # at 32 pixels the last batch norm divides by the spread of 2 values
    directions=["training_step"],
    make_inputs=make_inputs,
    reference=model(DilatedAttention),
    prepare=prepare,
    implementations=IMPLEMENTATIONS,
    operators=["dilated_attention_forward", "dilated_attention_backward"],
    targets=[Target("dilateformer_tiny/*/float32/training_step", "eager", 2)],
)

bench_dilateformer = benchmark(SUITE)
