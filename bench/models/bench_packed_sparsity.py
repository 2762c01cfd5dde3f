"""Inference with ResNet-50 and DeiT-small, packed at 2:4 and 1:4, against the dense networks with the same weights.

The sparse networks have random scores, of which one a group is left, and are converted as after a training run.
ResNet-50 is channels-last. The packed one has its batch norms folded into the convolutions, which also compute the
ReLU; `dense_folded` is the dense one with torch's own folding, `tersor_unfolded` the packed one without.
"""

import copy
import functools

import settings
import torch
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tersor.models.deit import DeiT, deit_small, deit_small_nm
from tersor.models.resnet import Bottleneck, ResNet, resnet50, resnet50_nm
from tersor.sparsity import NMConv2d, NMLinear, NMSchedule, convert_

PATTERNS = {"2of4": (2, 4), "1of4": (1, 4)}
BARS = {} if settings.device() == "cuda" else {"2of4": 1.4, "1of4": 2}
COMPARED = 2  # images of a batch that the float64 network computes; no image knows of the others


def tiny_resnet(**layers):
    return ResNet(Bottleneck, (1, 1, 1, 1), 16, num_classes=10, **layers)


def tiny_resnet_nm(n, m):
    return tiny_resnet(conv=functools.partial(NMConv2d, n=n, m=m), first=nn.Conv2d)


def tiny_deit(**layers):
    return DeiT(image_size=224, patch_size=32, dim=64, depth=2, num_heads=2, num_classes=10, **layers)


def tiny_deit_nm(n, m):
    return tiny_deit(linear=functools.partial(NMLinear, n=n, m=m))


NETWORKS = {
    "resnet50": (resnet50_nm, resnet50),
    "tiny_resnet": (tiny_resnet_nm, tiny_resnet),
    "deit_small": (deit_small_nm, deit_small),
    "tiny_deit": (tiny_deit_nm, tiny_deit),
}


@functools.lru_cache(maxsize=2)  # the small size's, and the one that is timed with both batches
def networks(name, n, m):
    """The dense network, and the packed one without and with folded norms, with the same weights."""
    make_sparse, make_dense = NETWORKS[name]
    torch.manual_seed(settings.SEED)
    sparse, dense = make_sparse(n, m), make_dense()
    classifier = sparse.fc if "resnet" in name else sparse.head
    nn.init.normal_(classifier.weight)  # for outputs above 1, below which an error counts as it is
    layers = {path: layer for path, layer in sparse.named_modules() if isinstance(layer, (NMConv2d, NMLinear))}
    with torch.no_grad():
        for layer in layers.values():
            layer.alpha.uniform_(0.5, 1.5)  # as they are made all scores tie, and all groups would keep the same places
        NMSchedule(sparse, 1).finish()
        state = sparse.state_dict() | {f"{path}.weight": layer.sparse_weight() for path, layer in layers.items()}
    dense.load_state_dict({key: state[key] for key in dense.state_dict()})
    folded = convert_(copy.deepcopy(sparse), fold_norms=True).eval() if "resnet" in name else None
    return dense.eval(), convert_(sparse).eval(), folded


def make_inputs(size, dtype, device, generator):
    images = torch.randn(size[3], 3, 224, 224, generator=generator).to(device, dtype)
    return (images.contiguous(memory_format=torch.channels_last) if "resnet" in size[0] else images,)


def dense(size):
    return lambda: networks(*size[:3])[0]


def packed(size):
    return lambda: networks(*size[:3])[2] or networks(*size[:3])[1]


def unfolded(size):
    return lambda: networks(*size[:3])[1]


def dense_folded(size):
    """As torch's fusion of a convolution and its norm in eval mode."""

    def build():
        network = copy.deepcopy(networks(*size[:3])[0])
        fold = [(network, "conv1", "bn1")]
        for block in [m for m in network.modules() if hasattr(m, "norm_pairs")]:
            fold += [(block, convolution, norm) for convolution, norm, _ in block.norm_pairs()]
        fold += [(m, "0", "1") for m in network.modules() if type(m) is nn.Sequential and isinstance(m[0], nn.Conv2d)]
        for parent, convolution, norm in fold:
            fused = fuse_conv_bn_eval(parent.get_submodule(convolution), parent.get_submodule(norm))
            setattr(parent, convolution, fused)
            setattr(parent, norm, nn.Identity())
        return network

    return build


def compiled(size):
    return lambda: torch.compile(dense(size)(), dynamic=False)


def prepare(build, inputs, dtype, direction):
    images = inputs[0]
    network = build()
    if images.dtype == torch.float64:
        network, images = copy.deepcopy(network), images[:COMPARED]
    network = network.to(images)
    if images.is_contiguous(memory_format=torch.channels_last):
        network = network.to(memory_format=torch.channels_last)

    def call():
        with torch.no_grad():
            return network(images)

    return Prepared(call, lambda: {"output": call()[:COMPARED]})


IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True, note="packed layers, norms folded, the default backend"),
    Implementation("dense", dense, note="torch's layers"),
]
FOLDED = [
    Implementation("tersor_unfolded", unfolded, ours=True, note="packed layers, norms as they are"),
    Implementation("dense_folded", dense_folded, note="torch's layers, norms folded"),
]
if settings.FULL:
    IMPLEMENTATIONS.append(Implementation("compiled", compiled, note="torch.compile of the dense network"))


def suite(name, small, operator):
    group = f"{name}_packed"
    if settings.QUICK:
        sizes = {"tiny_b2_2of4": (small, 2, 4, 2)}
    else:  # by patterns, so that each network is made once
        sizes = {f"b{batch}_{p}": (name, *pattern, batch) for p, pattern in PATTERNS.items() for batch in (1, 32)}
    return Suite(
        operator=group,
        sizes=sizes,
        small=(small, 2, 4, 1),
        directions=["inference"],
        make_inputs=make_inputs,
        reference=dense,
        prepare=prepare,
        implementations=IMPLEMENTATIONS + (FOLDED if "resnet" in name else []),
        operators=[operator],
        targets=[Target(f"{group}/b*_{p}/float32/inference", "dense", bar) for p, bar in BARS.items()],
    )


bench_resnet50_packed = benchmark(suite("resnet50", "tiny_resnet", "nm_packed_conv2d"))
bench_deit_small_packed = benchmark(suite("deit_small", "tiny_deit", "nm_matmul"))
