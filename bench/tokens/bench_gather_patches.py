"""The chosen patches of some of the images, as CF-ViT's fine pass embeds them: 100 of 196 patches of 16 x 16 pixels.

`all` takes them of all 64 images, `some` of the 19 that an early exit has left, named by an index.
"""

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Suite, Target
from token_calls import prepare_tokens

import tersor

CUDA = settings.device() == "cuda"
# (batch, channels, pixels, patch, chosen images, chosen patches)
SIZES = {"some_b64": (64, 3, 224, 16, 19, 100), "all_b64": (64, 3, 224, 16, 64, 100), "all_b1": (1, 3, 224, 16, 1, 100)}
SIZES = dict(list(SIZES.items())[: 1 if settings.QUICK else None])
LARGEST = next(iter(SIZES))


def make_inputs(size, dtype, device, generator):
    batch, channels, pixels, patch, images, chosen = size
    index = torch.rand(images, (pixels // patch) ** 2, generator=generator).argsort(1)[:, :chosen].contiguous()
    rows = torch.rand(batch, generator=generator).argsort()[:images].sort().values
    values = torch.randn(batch, channels, pixels, pixels, generator=generator)
    return index.to(device), rows.to(device), values.to(device, dtype)


def traffic(size, element_bytes, direction):
    """Chosen patches read and written; backward the incoming gradient read and all images' written. Nothing is
    computed: one operation per element stands for the copy."""
    batch, channels, pixels, patch, images, chosen = size
    elements, index = images * chosen * channels * patch**2, images * (chosen + 1) * 8
    forward = 2 * elements * element_bytes + index
    if direction == "forward":
        return forward, elements
    return forward + (elements + batch * channels * pixels**2) * element_bytes + index, 2 * elements


def ours(size):
    return lambda index, rows, images: tersor.gather_patches(images, index, size[3], rows)


def eager(size):
    def function(index, rows, images):
        every = F.unfold(images[rows], size[3], stride=size[3]).transpose(1, 2)
        return torch.gather(every, 1, index[..., None].expand(-1, -1, every.shape[2]))

    return function


def advanced(size):
    def function(index, rows, images):
        patch = size[3]
        side = images.shape[3] // patch
        tiles = images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        return tiles[rows[:, None], index // side, index % side].flatten(2)

    return function


def compiled(size):
    return torch.compile(advanced(size), dynamic=False, fullgraph=True)


IMPLEMENTATIONS = [
    Implementation("tersor", ours, ours=True, note="the default backend"),
    Implementation("eager", eager, note="the chosen images copied, all their patches laid out, torch.gather"),
    Implementation("advanced", advanced, note="one index into a view of the images as tiles"),
    Implementation("compiled", compiled, sizes=[LARGEST], note="torch.compile of that, default mode"),
]
if CUDA:
    IMPLEMENTATIONS.append(Implementation("triton", ours, ours=True, backend="triton", note="Triton"))

SUITE = Suite(
    operator="gather_patches",
    sizes=SIZES,
    small=(3, 2, 32, 8, 2, 5),
    dtypes=[torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32],
    make_inputs=make_inputs,
    traffic=traffic,
    reference=ours,
    prepare=prepare_tokens(fixed=2),
    implementations=IMPLEMENTATIONS,
    operators=["gather_patches_forward", "gather_patches_backward"],
    targets=[Target("gather_patches/*/*/*", "eager", 1), Target("gather_patches/*/*/*", "advanced", 1)],
)

bench_gather_patches = benchmark(SUITE)
