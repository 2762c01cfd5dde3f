"""PSLT's ladder block in training, and inference with the base model, against the published way.

Stochastic depth is off, so that every step does the same work and can be compared. In inference ours has its batch
norms folded where that is exact (:func:`tersor.fold_norms_`); `tersor_unfolded` has not.
"""

import copy
import functools
import itertools

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target
from torch import nn

import tersor
from tersor.models import pslt_base
from tersor.models.eager_ladder import EagerLadderBlock

CUDA = settings.device() == "cuda"
DIM, HEADS, GRID = 288, 4, 14  # the base model's third stage
BATCHES = [1] if settings.QUICK else [64] if CUDA else [1, 32]
OPERATORS = ["window_attention_forward", "window_attention_backward"]


def block(build):
    return lambda size: functools.partial(build, size[1], size[2], size[3], drop_path=0.0)


def compiled_block(size):
    return lambda: torch.compile(block(EagerLadderBlock)(size)(), dynamic=False)


def make_maps(size, dtype, device, generator):
    batch, dim, _, grid = size
    return (torch.randn(batch, grid, grid, dim, generator=generator).to(device, dtype),)


def prepare_training(build, inputs, dtype, direction):
    """Forward with the batch's statistics, and all gradients."""
    torch.manual_seed(settings.SEED)
    network = build().to(inputs[0]).train()
    x = inputs[0].detach().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(settings.SEED)).to(x)
    names = ["input", *(name.removeprefix("_orig_mod.") for name, _ in network.named_parameters())]
    # A norm takes a constant away again: what is left of these gradients is rounding.
    compared = [not name.endswith(("mlp.conv.5.bias", "mlp.conv.6.bias")) for name in names]
    leaves = [x, *network.parameters()]
    start = copy.deepcopy(network.state_dict())

    def step():
        return torch.autograd.grad(network(x), leaves, weights)

    def results():
        network.load_state_dict(start)
        output = network(x)
        gradients = torch.autograd.grad(output, leaves, weights)
        given = itertools.compress(zip(names, gradients, strict=True), compared)
        return {"output": output.detach()} | {f"gradient {name}": gradient for name, gradient in given}

    return Prepared(step, results, lambda: network(x))


BLOCK = Suite(
    operator="ladder_block",
    sizes={f"stage3_b{batch}": (batch, DIM, HEADS, GRID) for batch in BATCHES},
    small=(2, 24, 2, 14),
    directions=["training_step"],
    make_inputs=make_maps,
    reference=block(tersor.LadderBlock),
    prepare=prepare_training,
    implementations=[
        Implementation("tersor", block(tersor.LadderBlock), ours=True, note="the default backend"),
        Implementation("eager", block(EagerLadderBlock), note="the published way"),
        Implementation("compiled", compiled_block, note="torch.compile of that, default mode"),
    ],
    operators=OPERATORS,
    targets=[Target("ladder_block/*/float32/training_step", "eager", 2)],
    # Norms and their gradients divide by spreads: sums of 6272 tokens in float32 against float64.
    tolerance=lambda dtype, name: 1e-4,
)

bench_ladder_block = benchmark(BLOCK)


@functools.lru_cache(maxsize=2)
def trained_like(pixels, classes):
    """A network whose norms have seen data, so that folding changes their numbers."""
    torch.manual_seed(settings.SEED)
    network = pslt_base(num_classes=classes, img_size=pixels, drop_path=0.0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def published(size):
    network = pslt_base(num_classes=size[2], img_size=size[1], drop_path=0.0, block=EagerLadderBlock)
    network.load_state_dict(trained_like(*size[1:]).state_dict())
    return network.eval()


def folded(size):
    return tersor.fold_norms_(copy.deepcopy(trained_like(*size[1:])))


def make_images(size, dtype, device, generator):
    batch, pixels, _ = size
    return (torch.randn(batch, 3, pixels, pixels, generator=generator).to(device, dtype),)


def prepare_inference(build, inputs, dtype, direction):
    network = build().to(inputs[0])

    def call():
        with torch.no_grad():
            return network(*inputs)

    return Prepared(call, lambda: {"output": call()})


MODEL = Suite(
    operator="pslt_base",
    sizes={f"224_b{batch}": (batch, 224, 1000) for batch in BATCHES[:1]},
    small=(1, 224, 10),
    directions=["forward"],
    make_inputs=make_images,
    reference=lambda size: lambda: published(size),
    prepare=prepare_inference,
    implementations=[
        Implementation("tersor", lambda size: lambda: folded(size), ours=True, note="norms folded"),
        Implementation("tersor_unfolded", lambda size: lambda: copy.deepcopy(trained_like(*size[1:])), ours=True),
        Implementation("eager", lambda size: lambda: published(size), note="the published way"),
        Implementation(
            "compiled",
            lambda size: lambda: torch.compile(published(size), dynamic=False),
            note="torch.compile of that, default mode",
        ),
    ],
    operators=OPERATORS[:1],
    targets=[
        Target("pslt_base/224_b1/float32/forward", "eager", 1.8),
        Target("pslt_base/224_b1/float32/forward", "compiled", 1.3),
    ],
    tolerance=lambda dtype, name: 1e-4,
)

bench_pslt = benchmark(MODEL)
