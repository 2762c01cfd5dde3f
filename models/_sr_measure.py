"""How good a super-resolution network is on the test regions, and what its conversion to packed layers changes."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.models._digits import read_safetensors, write_safetensors
from tersor.models._photos import Quality, Region, photographs, psnr_and_ssim, to_uint8, upscale
from tersor.models._sr_train import SCALE
from tersor.quantization import QuantizedConv2d
from tersor.quantization.convert import convert_
from tersor.quantization.packed_layers import PackedConv2d


def quality(outputs: list[Tensor]) -> Quality:
    """Of the test regions' uint8 pictures; ``SCALE`` pixels are cut off each side, as usual."""
    pairs = zip(outputs, photographs(SCALE).test, strict=True)
    psnr, ssim = zip(*(psnr_and_ssim(output, region.high, SCALE) for output, region in pairs), strict=True)
    return Quality(psnr, ssim)


def enlarge(model: nn.Module) -> list[Tensor]:
    """The model's uint8 picture of every test region."""
    return [to_uint8(output) for output in outputs(model)]


def enlarge_bicubic() -> list[Tensor]:
    return [upscale(region.low, SCALE) for region in photographs(SCALE).test]


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    """What the model makes of every test region, float32 ``(3, H, W)``."""
    model.eval()  # and one picture at a time: a gate's result depends on the whole batch
    return [model(_batch(region))[0][0].contiguous() for region in photographs(SCALE).test]


def _batch(region: Region) -> Tensor:
    return region.low[None].float()


def convert(model: nn.Module, path: Path) -> dict[str, Any]:
    """Converts a copy of a trained student, writes its state, and compares the one loaded from there with the student.

    Returns:
        ``bytes`` of the file; ``weight bytes``, of the quantised layers' weights in it, and ``weight bytes in
        float32``; on the test regions the ``largest difference`` of an output value (of 0..255), and the ``share of
        values that differ`` after rounding to uint8; and the quality, as of :func:`quality`.
    """
    theirs = outputs(model)  # first: an activation keeps its last logits, and those of a training pass block a copy
    write_safetensors(path, unshared(convert_(copy.deepcopy(model)).state_dict()), {})
    converted = convert_(copy.deepcopy(model))  # once more: this one is to be loaded from the file
    converted.load_state_dict(read_safetensors(path)[0])
    ours = outputs(converted)
    pictures = [to_uint8(output) for output in ours]
    differ = [(to_uint8(a) != b).float().mean().item() for a, b in zip(theirs, pictures, strict=True)]
    return {
        "bytes": path.stat().st_size,
        "weight bytes": sum(m.packed.nbytes for m in converted.modules() if isinstance(m, PackedConv2d)),
        "weight bytes in float32": sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedConv2d)),
        "largest difference": max((a - b).abs().max().item() for a, b in zip(theirs, ours, strict=True)),
        "share of values that differ": statistics.fmean(differ),
        **quality(pictures).as_dict(),
    }


def unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies: EDSR registers an activation twice, and safetensors refuses tensors that share their memory."""
    return {name: value.clone() for name, value in state.items()}
