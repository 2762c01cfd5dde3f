"""Convolution in whole numbers on 64-channel 3x3 layers, against float32: with 8-bit and 4-bit weights.

The integer convolution quantises its float input on the fly and gives float output. `float` is the plain convolution
of the float input; `fake_quantized` quantises the input and convolves in float, as the model does in training;
`torch_quantized` is torch's own integer convolution, whose output is rounded to 8 bits once more.
"""

import integer_peers
import settings
import torch
import torch.nn.functional as F
from harness import benchmark
from suite import Implementation, Suite, Target

import tersor
from tersor.quantization.quantized_conv2d import convolve, prepare_weight

BITS = 8
LOWER, UPPER = -0.81, 1.37
CHANNELS = 64
SIZES = {"c64_b16_48": (16, 48, 48), "c64_b1_96": (1, 96, 96)}


def make_inputs(size, dtype, device, generator):
    batch, height, width = size
    x = torch.randn(batch, CHANNELS, height, width, generator=generator) * 0.7
    return (x.to(device, dtype),)


def weight(device, asymmetric):
    generator = torch.Generator().manual_seed(settings.SEED)
    codes = torch.randint(-127, 128, (CHANNELS, CHANNELS, 3, 3), generator=generator).to(torch.int8)
    scale = torch.full((1,), 2e-4)
    zero = torch.full((1,), 3.0) if asymmetric else None
    return tuple(None if t is None else t.to(device) for t in (codes, scale, zero))


def bounds(device):
    return tuple(torch.tensor([b], device=device) for b in (LOWER, UPPER))


def packed(asymmetric):
    def make(size):
        device = settings.device()
        prepared = prepare_weight(*weight(device, asymmetric), None)
        lower, upper = bounds(device)
        window = [1, 1], [1, 1], [1, 1]
        return lambda x: convolve("bench", x, prepared, lower, upper, BITS, *window)

    return make


def real_weight(device, dtype):
    codes, scale, zero = weight(device, True)
    return ((codes + zero) * scale).to(dtype)


def fake_quantized(size):
    def convolution(x):
        lower, upper = bounds(x.device)
        quantized = tersor.fake_quantize_bounds(x.float(), lower, upper, BITS).to(x.dtype)
        return F.conv2d(quantized, real_weight(x.device, x.dtype), padding=1)

    return convolution


def plain(size):
    w = real_weight(settings.device(), torch.float32)
    return lambda x: F.conv2d(x, w, padding=1)


def torch_quantized(size):
    codes, scale, _ = weight(torch.device("cpu"), False)
    return integer_peers.conv2d(codes, scale, LOWER, UPPER, padding=1, output_range=4.0)


IMPLEMENTATIONS = [
    Implementation("tersor", packed(True), ours=True, note="asymmetric weights, as DDTB's"),
    Implementation(
        "symmetric", packed(False), ours=True, compared=False, note="symmetric weights: no sum of the codes"
    ),
    Implementation("fake_quantized", fake_quantized, note="tersor's quantiser, then torch's float convolution"),
    Implementation("float", plain, compared=False, note="torch's float32 convolution of the input as it is"),
    Implementation(
        "torch_quantized",
        torch_quantized,
        compared=False,
        note="quantize_per_tensor, torch.ops.quantized.conv2d with symmetric weights, dequantize",
        unavailable=integer_peers.unavailable,
    ),
]

SUITE = Suite(
    operator="quantized_conv2d",
    sizes=dict(list(SIZES.items())[: 1 if settings.QUICK else None]),
    small=(2, 9, 7),
    directions=["forward"],
    make_inputs=make_inputs,
    reference=fake_quantized,
    implementations=IMPLEMENTATIONS,
    operators=["quantized_conv2d"],
    targets=[Target("quantized_conv2d/*/float32/forward", "float", 1.5)],
)

bench_quantized_conv2d = benchmark(SUITE)
