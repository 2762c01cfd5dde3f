"""CF-ViT with DeiT-S on grids of 7 x 7 and 14 x 14: early exit, the coarse pass alone, and a training step.

Of random images and weights no pass is surer than another, so the threshold is set between two images' confidences,
for the share of the images that is to leave after the coarse pass; it is the same for all implementations. In groups
named `exit70` 70 % leave; in `exit73` as many as at the published threshold of one half (1.88 G multiply-adds per image
= 1.10 + 0.27 x 2.90), where the plain model with its 197 tokens has the same accuracy; `coarse` is one image, sure.
"""

import functools

import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Prepared, Suite, Target

from tersor.models import cf_deit_small, cf_vit_loss, deit_small
from tersor.models import eager_tokens as eager

CUDA = settings.device() == "cuda"
BATCH, PLAIN_BATCH, TRAINED_BATCH = (256, 256, 64) if CUDA else (4, 4, 1) if settings.QUICK else (64, 32, 8)
PIXELS = 224
# (batch, share of the images that leave)
PLAIN = f"7x7_exit73_b{PLAIN_BATCH}"
SIZES = {f"7x7_exit70_b{BATCH}": (BATCH, 0.7), PLAIN: (PLAIN_BATCH, 0.73), "7x7_coarse_b1": (1, 1.0)}
SPLIT = ["gather_patches", "resplit_tokens"] if CUDA else ["gather_patches", "resplit_tokens", "window_attention"]
OPERATORS = ["class_scores", "compact_unsure", "rank_tokens", *(f"{name}_forward" for name in SPLIT)]


@functools.cache
def weights():
    torch.manual_seed(settings.SEED)
    return cf_deit_small().state_dict()


def model():
    network = cf_deit_small()
    network.load_state_dict(weights())
    return network


@functools.lru_cache(maxsize=2)
def threshold(size, device):
    """Half way between the last image that leaves and the first that does not."""
    batch, share = size
    leaving = round(share * batch)
    if leaving == batch:
        return 0.0
    network = model().to(device).eval()
    confidence = network.infer(random_images(batch).to(device), 0.0).confidence.double()
    return float(confidence.sort(descending=True).values[leaving - 1 : leaving + 1].mean())


def random_images(batch):
    return torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(settings.SEED))


def make_inputs(size, dtype, device, generator):
    limit = torch.tensor(threshold(size, device), dtype=torch.float64)
    return random_images(size[0]).to(device, dtype), limit


def ours(size):
    return lambda network, images, limit: network.infer(images, limit).logits


def published(size):
    return eager.cf_vit_infer


def prepare_inference(function, inputs, dtype, direction):
    images, limit = inputs
    network = model().to(images).eval()

    def call():
        with torch.no_grad():
            return function(network, images, float(limit))

    return Prepared(call, lambda: {"output": call()})


def plain(block):
    """DeiT-S, which is only timed, with a function of a layer and its tokens; that its variants agree is looked at."""

    def run(network, images):
        tokens = network.patch_embed(images)
        x = torch.cat([network.cls_token.expand(len(tokens), -1, -1), tokens], 1) + network.pos_embed
        for layer in network.blocks:
            x = block(layer, x)
        return network.head(network.norm(x)[:, 0])

    def make(size):
        torch.manual_seed(settings.SEED)
        deit = deit_small().to(settings.device()).eval()
        with torch.no_grad():
            image = random_images(1).to(settings.device())
            torch.testing.assert_close(run(deit, image), deit(image), rtol=0, atol=1e-5)
        return lambda network, images, limit: run(deit, images)

    return make


def sdpa_block(layer, input):
    """In torch's own layers, as published."""
    packed = layer.attn.qkv(layer.norm1(input)).unflatten(2, (3, layer.attn.num_heads, -1))
    output = F.scaled_dot_product_attention(*packed.permute(2, 0, 3, 1, 4))
    x = input + layer.attn.proj(output.transpose(1, 2).flatten(2))
    return x + eager.mlp(layer.mlp, layer.norm2(x))


INFERENCE = Suite(
    operator="cf_deit_small",
    sizes=SIZES,
    small=(3, 0.67),
    directions=["inference"],
    make_inputs=make_inputs,
    reference=ours,
    prepare=prepare_inference,
    implementations=[
        Implementation("tersor", ours, ours=True, note="the default backend"),
        Implementation("eager", published, note="the published way"),
        Implementation(
            "deit",
            plain(lambda layer, input: layer(input)),
            ours=True,
            compared=False,
            sizes=[PLAIN],
            note="another model: the plain DeiT-S of tersor.models, all images with 197 tokens",
        ),
        Implementation(
            "deit_sdpa",
            plain(sdpa_block),
            compared=False,
            sizes=[PLAIN],
            note="another model: the plain DeiT-S with torch's scaled_dot_product_attention",
        ),
    ],
    operators=OPERATORS,
    targets=[
        Target("cf_deit_small/7x7_exit70*/*/inference", "eager", 1.25),
        Target("cf_deit_small/7x7_exit73*/*/inference", "deit*", 2),
    ],
)

bench_cf_vit = benchmark(INFERENCE)


def make_batch(size, dtype, device, generator):
    target = torch.randint(1000, (size,), generator=generator)
    return random_images(size).to(device, dtype), target.to(device)


def prepare_training(function, inputs, dtype, direction):
    """Forward, loss and all gradients."""
    images, target = inputs
    network = model().to(images).train()
    names, parameters = zip(*network.named_parameters(), strict=True)

    def forward():
        return cf_vit_loss(*function(network, images), target)

    def step():
        return torch.autograd.grad(forward(), parameters)

    def results():
        coarse, fine = function(network, images)
        gradients = torch.autograd.grad(cf_vit_loss(coarse, fine, target), parameters)
        named = {f"gradient {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        return {"output coarse": coarse.detach(), "output fine": fine.detach()} | named

    return Prepared(step, results, forward)


TRAINING = Suite(
    operator="cf_deit_small_training",
    sizes={f"7x7_b{TRAINED_BATCH}": TRAINED_BATCH},
    small=1,
    directions=["training_step"],
    make_inputs=make_batch,
    reference=lambda size: lambda network, images: network(images),
    prepare=prepare_training,
    implementations=[
        Implementation("tersor", lambda size: lambda network, images: network(images), ours=True),
        Implementation("eager", lambda size: eager.cf_vit, note="the published way"),
    ],
    operators=[*OPERATORS, *(f"{name}_backward" for name in SPLIT)],
)

bench_cf_vit_training = benchmark(TRAINING)
