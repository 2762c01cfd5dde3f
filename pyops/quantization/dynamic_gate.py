"""The low-bit gate that scales an activation's bounds per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor._checks import check_floating
from tersor.quantization._quantizer import check_bits
from tersor.quantization.fake_quantize_bounds import check_bounds
from tersor.quantization.weight_fake_quantize import weight_fake_quantize


def dynamic_gate(
    input: Tensor,
    hidden_weight: Tensor,
    norm: nn.BatchNorm2d,
    output_weight: Tensor,
    bits: int = 2,
    *,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Two factors per sample, for the upper and the lower bound, from the means of the channels.

    t = mean of ``input`` over H and W; h = relu(norm(Q(t) W1^T)); logits = Q(h) W2^T; scale = 2 sigmoid(logits), with
    both weights quantised by :func:`weight_fake_quantize` ("symmetric") and Q the affine quantiser between the least
    and the greatest value of the whole batch: an image's result depends on its batch mates, in eval mode too.

    Q passes no gradient, as published: ``input``, ``hidden_weight`` and the parameters of ``norm`` get none, ever.
    Only ``output_weight`` learns. In training mode the running statistics of ``norm`` are updated.

    Args:
        input: ``(N, C, H, W)``.
        hidden_weight: ``(hidden, C, 1, 1)``.
        norm: over the hidden channels; its mode says whether this is training.
        output_weight: ``(2, hidden, 1, 1)``.
        bits: of the gate's own weights and activations, 2 to 8.
        per_sample: let Q take each sample's own least and greatest value instead, so that in eval mode no image
            depends on another. Not as published.

    Returns:
        scale ``(N, 2)``: column 0 for the upper bound, 1 for the lower; and the logits ``(N, 2)``. In float32
        (float64 for float64 weights).

    Raises:
        TypeError: an argument is not of the stated type.
        ValueError: shapes do not fit; or, on the CPU, all values that Q is to quantise are equal.

    Source: Zhong et al., arXiv 2203.03844.
    """
    name = "dynamic_gate"
    check_floating(name, input=input, hidden_weight=hidden_weight, output_weight=output_weight)
    if input.dim() != 4:
        raise ValueError(f"{name}: input must be (N, C, H, W), got shape {tuple(input.shape)}")
    for argument, weight, shape in (
        ("hidden_weight", hidden_weight, (norm.num_features, input.shape[1], 1, 1)),
        ("output_weight", output_weight, (2, norm.num_features, 1, 1)),
    ):
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: {argument} must be {shape}, got shape {tuple(weight.shape)}")
    if not input.numel():
        raise ValueError(f"{name}: input must have at least one element, got shape {tuple(input.shape)}")
    if check_bits(name, bits) == 32:
        raise ValueError(f"{name}: bits must be 2 to 8, got 32")
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        means = input.detach().mean((2, 3), dtype=hidden_weight.dtype)
        hidden = F.linear(
            _quantize(means, bits, per_sample, "the channels' means"),
            weight_fake_quantize(hidden_weight.flatten(1), bits),
        )
        hidden = torch.relu(norm(hidden[:, :, None, None])).flatten(1)
        hidden = _quantize(hidden, bits, per_sample, "the hidden activations")
    with torch.autocast(input.device.type, enabled=False):
        logits = F.linear(hidden, weight_fake_quantize(output_weight.flatten(1), bits))
    return 2 * torch.sigmoid(logits), logits


def _quantize(x: Tensor, bits: int, per_sample: bool, what: str) -> Tensor:
    """Between the extremes, hence without clipping; the scale comes first, as published."""
    least, greatest = x.aminmax(dim=1, keepdim=True) if per_sample else x.aminmax()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(least, greatest, f"dynamic_gate: {what} are to span a range")
    scale = torch.full_like(greatest, 2**bits - 1) / (greatest - least)
    zero = torch.round(scale * least) + 2 ** (bits - 1)
    return (torch.round(scale * x - zero) + zero) / scale
