"""Which images need a second look, from the logits of 1000 classes: a third of them are unsure.

The eager way waits for a GPU, as its result's size depends on the values; `tersor` gives all images in the order of
need, and the number of the unsure ones.
"""

import settings
import torch
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor

CUDA = settings.device() == "cuda"
THRESHOLD = 0.5
SIZES = {f"b{batch}": (batch, 1000) for batch in (1024, 64, 1)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])


def make_inputs(size, dtype, device, generator):
    """One logit stands out from the noise of the others; at about 7.4 its probability passes one half."""
    batch, classes = size
    logits = torch.randn(size, generator=generator)
    best = torch.randint(classes, (batch, 1), generator=generator)
    height = 6.4 + 3 * torch.rand(batch, 1, generator=generator)
    return (logits.scatter(1, best, height).to(device, dtype),)


def traffic(size, element_bytes, direction):
    """Logits read, int64 images and their number written; of a logit the maximum, the exponential and the sum."""
    batch, classes = size
    return batch * classes * element_bytes + (batch + 1) * 8, 3 * batch * classes


def ours(size):
    return lambda logits: tersor.compact_unsure(logits, THRESHOLD)


def eager(size):
    def function(logits):
        unsure = (logits.softmax(1).max(1).values < THRESHOLD).nonzero()[:, 0]
        return unsure, unsure.new_tensor([len(unsure)])

    return function


def compared(outputs):
    """The unsure images alone; there may be none, hence the zero in front."""
    index, count = outputs
    return torch.cat([count.new_zeros(1), index[: int(count)]]), count


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the published way: softmax, max, comparison, nonzero"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="compact_unsure",
    sizes=SIZES,
    small=(5, 10),
    directions=["forward"],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(names=["output index", "output count"], compared=compared),
    implementations=IMPLEMENTATIONS,
    operators=["compact_unsure"],
    targets=[Target("compact_unsure/*/*/*", "eager", 1)],
)

bench_compact_unsure = benchmark(SUITE)
