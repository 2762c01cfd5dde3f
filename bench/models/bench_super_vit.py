"""SuperViT with DeiT-S at 224 pixels: inference with all tokens, and with 70 % and 50 % kept at each of three depths.

`keep_1` is the same model with all tokens: a rate's speed-up over it is to be within 10 % of what the multiply-adds
promise (4.60, 3.01 and 2.30 G per image).
"""

import functools

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target

from tersor.models import super_deit_small
from tersor.models.eager_tokens import super_vit

CUDA = settings.device() == "cuda"
BATCH = 256 if CUDA else 2 if settings.QUICK else 16
PIXELS, SHARE = 224, 0.9
GIGA_MACS = {"keep100": 4.60, "keep70": 3.01, "keep50": 2.30}
# (batch, rate)
SIZES = {f"224_{name}_b{BATCH}": (BATCH, int(name[4:]) / 100) for name in GIGA_MACS}
PRUNED = [name for name, size in SIZES.items() if size[1] < 1]


@functools.cache
def weights():
    torch.manual_seed(settings.SEED)
    return super_deit_small().state_dict()


def make_inputs(size, dtype, device, generator):
    return (torch.randn(size[0], 3, PIXELS, PIXELS, generator=generator).to(device, dtype),)


def ours(size):
    return lambda network, images: network(images, PIXELS, size[1])


def published(size):
    return lambda network, images: super_vit(network, images, PIXELS, size[1])


def all_tokens(size):
    return lambda network, images: network(images, PIXELS)


def prepare(function, inputs, dtype, direction):
    network = super_deit_small().to(inputs[0]).eval()
    network.load_state_dict(weights())

    def call():
        with torch.no_grad():
            return function(network, *inputs)

    return Prepared(call, lambda: {"output": call()})


def promised(name):
    return Target(
        f"super_deit_small/224_{name}_*/*/inference", "keep_1", SHARE * GIGA_MACS["keep100"] / GIGA_MACS[name]
    )


SUITE = Suite(
    operator="super_deit_small",
    sizes=SIZES,
    small=(2, 0.5),
    directions=["inference"],
    make_inputs=make_inputs,
    reference=ours,
    prepare=prepare,
    implementations=[
        Implementation("tersor", ours, ours=True, note="the default backend"),
        Implementation("eager", published, note="the published way"),
        Implementation(
            "keep_1", all_tokens, ours=True, compared=False, sizes=PRUNED, note="the same model with all tokens"
        ),
    ],
    operators=["class_scores", "prune_tokens_forward", *([] if CUDA else ["window_attention_forward"])],
    targets=[promised("keep50"), promised("keep70"), Target("super_deit_small/*/*/inference", "eager", 1)],
)

bench_super_vit = benchmark(SUITE)
