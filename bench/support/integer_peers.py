"""Torch's own 8-bit layers, as peers of the integer kernels: float in, float out, the weight packed beforehand."""

import warnings

import settings
import torch


def unavailable():
    """Why they cannot run here, or None."""
    return "runs on the CPU only" if settings.device() != "cpu" else None


def _packed(weight, scale, prepack, *window):
    """Per output channel, signed; torch takes no asymmetric weights here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*quantized tensor creation functions")
        zeros = torch.zeros(weight.shape[0], dtype=torch.long)
        scales = scale.double().expand(weight.shape[0])
        quantized = torch.quantize_per_channel(weight.float() * scale, scales, zeros, 0, torch.qint8)
    return prepack(quantized, None, *window)


def linear(codes, scale):
    """Finds the input's range in every call."""
    packed = _packed(codes, scale, torch.ops.quantized.linear_prepack)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def conv2d(codes, scale, lower, upper, padding, output_range):
    """Between given bounds; the output is rounded to 8 bits over ``output_range``, as torch's layer does."""
    window = [1, 1], [padding, padding], [1, 1], 1
    packed = _packed(codes, scale, torch.ops.quantized.conv2d_prepack, *window)
    step, output_step = (upper - lower) / 255, 2 * output_range / 255
    zero = round(-lower / step)

    def convolution(x):
        x = torch.quantize_per_tensor(x.contiguous(memory_format=torch.channels_last), step, zero, torch.quint8)
        return torch.ops.quantized.conv2d(x, packed, output_step, 128).dequantize()

    return convolution
