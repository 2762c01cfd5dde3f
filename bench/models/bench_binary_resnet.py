"""ResNet-18 with binary convolutions: packed inference against float32, and training against the published way.

The binary networks' weights are random, their norms have random statistics. `tersor` is converted: norms, shortcuts and
activations are computed by the packed convolutions. `dense` is the float32 ResNet-18 of the same sizes, `unpacked` the
binary network before conversion. In training, `eager` is the same network with the published layers.
"""

import copy
import functools

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target
from torch import nn

from tersor.binary import convert_
from tersor.models.binary_resnet import resnet18_recu, resnet18_reste
from tersor.models.eager_binary import EagerReCUConv2d, EagerReSTEConv2d
from tersor.models.resnet import resnet18

CUDA = settings.device() == "cuda"
COMPARED = 2  # images of a batch that the float64 network computes; no image knows of the others
NETWORKS = {"recu": resnet18_recu, "reste": resnet18_reste}
PUBLISHED = {"recu": EagerReCUConv2d, "reste": EagerReSTEConv2d}


def with_statistics(network):
    """Norms as after some training: at first ReCU's hide all behind a weight of 1e-8."""
    for norm in [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return network


@functools.lru_cache(maxsize=4)
def networks(kind, width):
    """The binary network, its packed form, and the float32 one."""
    torch.manual_seed(settings.SEED)
    binary = with_statistics(NETWORKS[kind](width=width)).eval()
    return binary, convert_(copy.deepcopy(binary)), with_statistics(resnet18(width=width)).eval()


def make_inputs(size, dtype, device, generator):
    images = torch.randn(size[2], 3, 224, 224, generator=generator).to(device, dtype)
    return (images.contiguous(memory_format=torch.channels_last),)


def unpacked(size):
    return lambda: networks(*size[:2])[0]


def packed(size):
    return lambda: networks(*size[:2])[1]


def dense(size):
    return lambda: networks(*size[:2])[2]


def prepare_inference(build, inputs, dtype, direction):
    images, network = inputs[0], build()
    if images.dtype == torch.float64:  # compared in float32 all the same: the sign of a number next to 0 may differ
        network, images = copy.deepcopy(network), images[:COMPARED].float()
    network = network.to(images).to(memory_format=torch.channels_last)

    def call():
        with torch.no_grad():
            return network(images)

    return Prepared(call, lambda: {"output": call()[:COMPARED]})


SIZES = {f"{kind}_b{batch}": (kind, 64, batch) for kind in NETWORKS for batch in (1, 16)}
SMALL = ("recu", 16, 1)  # in channels-last torch itself damages memory in training with 8 channels
if settings.QUICK:
    SIZES = {"reste_narrow_b2": ("reste", 16, 2)}

INFERENCE = Suite(
    operator="resnet18_binary",
    sizes=SIZES,
    small=SMALL,
    directions=["inference"],
    make_inputs=make_inputs,
    reference=unpacked,
    prepare=prepare_inference,
    implementations=[
        Implementation("tersor", packed, ours=True, note="converted"),
        Implementation("unpacked", unpacked, ours=True, note="the binary network as it is trained"),
        Implementation("dense", dense, compared=False, note="float32 ResNet-18"),
    ],
    operators=["binary_packed_conv2d"],
    targets=[] if CUDA else [Target("resnet18_binary/*_b1/float32/inference", "dense", 3)],
)


def training(size):
    return lambda: NETWORKS[size[0]](width=size[1])


def published(size):
    return lambda: NETWORKS[size[0]](width=size[1], conv=PUBLISHED[size[0]])


def prepare_step(build, inputs, dtype, direction):
    """Forward and backward in training mode, without the optimiser, which is the same for all."""
    torch.manual_seed(settings.SEED)
    images, network = inputs[0], with_statistics(build()).train()
    for tau in [buffer for name, buffer in network.named_buffers() if name.endswith("tau")]:
        tau.fill_(0.9)
    network = network.to(images).to(memory_format=torch.channels_last)

    def forward():
        return network(images).square().mean()

    def step():
        network.zero_grad()
        loss = forward()
        loss.backward()
        return loss

    return Prepared(step, lambda: {"loss": step().detach().reshape(1)}, forward)


STEP = Suite(
    operator="resnet18_binary_step",
    sizes={f"{kind}_b8": (kind, 64, 8) for kind in NETWORKS}
    if not settings.QUICK
    else {"recu_narrow_b2": ("recu", 16, 2)},
    small=("recu", 16, 2),
    directions=["training"],
    make_inputs=make_inputs,
    reference=training,
    prepare=prepare_step,
    implementations=[
        Implementation("tersor", training, ours=True, note="the default backend"),
        Implementation("eager", published, note="the published layers in the same network"),
        Implementation("dense", lambda size: lambda: resnet18(width=size[1]), compared=False, note="float32 ResNet-18"),
    ],
    operators=["binary_conv2d_forward", "binary_conv2d_backward"],
    tolerance=lambda dtype, name: (
        0.1
    ),  # signs of numbers near 0 differ; bench_binary_conv2d compares the layers closely
    targets=[] if CUDA else [Target("resnet18_binary_step/*/float32/training", "eager", 1.25)],
)

bench_resnet18_binary = benchmark(INFERENCE)
bench_resnet18_binary_step = benchmark(STEP)
