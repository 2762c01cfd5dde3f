"""Linear layer in whole numbers, against float32 and torch's own dynamically quantised layer, all with 8 bits.

The input is quantised between given bounds on the fly and the output is float. `float` is the plain layer of the float
input; `torch_dynamic` looks for the input's range first, and gives float output too.
"""

import integer_peers
import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.quantization.quantized_conv2d import prepare_weight
from tersor.quantization.quantized_linear import multiply

BITS = 8
LOWER, UPPER = -2.0, 2.5
SCALE = 2e-4
SIZES = {
    "384x1536_b1": (1, 384, 1536),
    "384x1536_b197": (197, 384, 1536),
    "1536x384_b197": (197, 1536, 384),
    "384x1152_b3152": (16 * 197, 384, 1152),
    "1024x1024_b1": (1, 1024, 1024),
    "1024x1024_b64": (64, 1024, 1024),
    "4096x4096_b1": (1, 4096, 4096),
}


def make_inputs(size, dtype, device, generator):
    rows, inputs, _ = size
    return (torch.randn(rows, inputs, generator=generator).to(device, dtype),)


def codes(size):
    generator = torch.Generator().manual_seed(settings.SEED)
    return torch.randint(-127, 128, (size[2], size[1]), generator=generator).to(torch.int8)


def packed(size):
    device = settings.device()
    weight = codes(size)[:, :, None, None].to(device)
    prepared = prepare_weight(weight, torch.full((1,), SCALE, device=device), None, None)
    lower, upper = (torch.tensor([b], device=device) for b in (LOWER, UPPER))
    return lambda x: multiply("bench", x, prepared, lower, upper, BITS)


def real_weight(size, dtype=torch.float32):
    return (codes(size) * torch.tensor(SCALE)).to(settings.device(), dtype)


def fake_quantized(size):
    def layer(x):
        lower, upper = (torch.tensor([b], device=x.device) for b in (LOWER, UPPER))
        quantized = tersor.fake_quantize_bounds(x.float(), lower, upper, BITS).to(x.dtype)
        return F.linear(quantized, real_weight(size, x.dtype))

    return layer


def plain(size):
    weight = real_weight(size)
    return lambda x: F.linear(x, weight)


IMPLEMENTATIONS = [
    Implementation("tersor", packed, ours=True),
    Implementation("float", plain, compared=False, note="torch's float32 layer of the input as it is"),
    Implementation(
        "torch_dynamic",
        lambda size: integer_peers.linear(codes(size), torch.tensor(SCALE)),
        compared=False,
        note="torch.ops.quantized.linear_dynamic, weights packed beforehand",
        unavailable=integer_peers.unavailable,
    ),
]

SUITE = Suite(
    operator="quantized_linear",
    sizes=dict(list(SIZES.items())[: 1 if settings.QUICK else None]),
    small=(5, 24, 12),
    directions=["forward"],
    make_inputs=make_inputs,
    reference=fake_quantized,
    implementations=IMPLEMENTATIONS,
    operators=["quantized_linear"],
    targets=[Target(f"quantized_linear/{size}/float32/forward", "float", 1) for size in SIZES],
)

bench_quantized_linear = benchmark(SUITE)
