"""Other people's ways to dilated attention, as their users would set them up. All take one fused qkv tensor.

A size is ``(batch, height, width, heads, head_dim)``; the kernel size and dilations are the published model's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

KERNEL_SIZE = 3
DILATION = (1, 2, 3)
Size = tuple[int, int, int, int, int]


def reach(dilation: int) -> int:
    return dilation * (KERNEL_SIZE - 1) // 2


def flex_padded(size: Size) -> Callable[[Tensor], Tensor]:
    """FlexAttention on zero-padded keys and values, with a mask of taps in padded coordinates: exact, forward only.

    For the CPU, whose FlexAttention returns no log-sum-exp.
    """
    _, height, width, heads, head_dim = size
    p = reach(max(DILATION))
    padded_width = width + 2 * p
    per_group = heads // len(DILATION)

    def tap(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return _is_tap(kv // padded_width - p - q // width, kv % padded_width - p - q % width, h // per_group + 1)

    keys = (height + 2 * p) * padded_width
    mask = create_block_mask(tap, None, heads, height * width, keys, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(3)
        key, value = (F.pad(x, (0, 0, 0, 0, p, p, p, p)) for x in (key, value))
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        output = compiled(query, key, value, block_mask=mask, scale=head_dim**-0.5)
        return output.transpose(1, 2).unflatten(1, (height, width))

    return attention


def flex_corrected(size: Size, device: str = "cuda") -> Callable[[Tensor], Tensor]:
    """FlexAttention over the taps inside the image; its log-sum-exp then puts the outside taps into the softmax.

    With c taps outside, whose scores are 0, the output shrinks by exp(lse) / (exp(lse) + c) = sigmoid(lse - log c).
    """
    _, height, width, heads, head_dim = size
    per_group = heads // len(DILATION)

    def tap(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return _is_tap(kv // width - q // width, kv % width - q % width, h // per_group + 1)

    mask = create_block_mask(tap, None, heads, height * width, height * width, device=device)
    outside = [_taps_outside(height, width, d) for d in DILATION for _ in range(per_group)]
    log_outside = torch.stack(outside).flatten(1).float().log().to(device)  # -inf where all taps are inside
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in qkv.unbind(3))
        lse_too = AuxRequest(lse=True)
        output, aux = compiled(query, key, value, block_mask=mask, scale=head_dim**-0.5, return_aux=lse_too)
        output = output * torch.sigmoid(aux.lse - log_outside).unsqueeze(-1).to(output.dtype)
        return output.transpose(1, 2).unflatten(1, (height, width))

    return attention


def natten_padded(size: Size) -> Callable[[Tensor], Tensor]:
    """NATTEN's na2d on zero-padded query, key and value, cropped: exact; one call per dilation, as it takes one."""
    from natten import na2d

    head_dim = size[-1]

    def attention(qkv: Tensor) -> Tensor:
        outputs = []
        for group, d in zip(qkv.chunk(len(DILATION), dim=4), DILATION, strict=True):
            p = reach(d)
            query, key, value = F.pad(group, (0, 0, 0, 0, 0, 0, p, p, p, p)).unbind(3)
            output = na2d(query, key, value, kernel_size=KERNEL_SIZE, dilation=d, scale=head_dim**-0.5)
            outputs.append(output[:, p:-p, p:-p])
        return torch.cat(outputs, dim=3)

    return attention


def natten_raw(size: Size) -> Callable[[Tensor], Tensor]:
    """NATTEN's na2d as it is: at the border the window moves inwards, which is a different function there."""
    from natten import na2d

    head_dim = size[-1]

    def attention(qkv: Tensor) -> Tensor:
        groups = zip(qkv.chunk(len(DILATION), dim=4), DILATION, strict=True)
        calls = [na2d(*g.unbind(3), kernel_size=KERNEL_SIZE, dilation=d, scale=head_dim**-0.5) for g, d in groups]
        return torch.cat(calls, dim=3)

    return attention


def interior(tensor: Tensor) -> Tensor:
    """Where neither a query nor any query that sees a key is near the border.

    A query nearer to the border than its reach d sees keys up to 3 d - 1 from it where the window moves inwards.
    """
    p = 3 * reach(max(DILATION))
    return tensor[:, p:-p, p:-p]


def no_natten() -> str | None:
    return None if importlib.util.find_spec("natten") else "natten is not installed"


def _is_tap(dy: Tensor, dx: Tensor, dilation: Tensor) -> Tensor:
    """DILATION is 1, 2, 3, so a group's dilation is its number plus one."""
    p = dilation * (KERNEL_SIZE - 1) // 2
    return (dy.abs() <= p) & (dx.abs() <= p) & (dy % dilation == 0) & (dx % dilation == 0)


def _taps_outside(height: int, width: int, dilation: int) -> Tensor:
    offsets = range(-reach(dilation), reach(dilation) + 1, dilation)
    rows, columns = (
        torch.tensor([sum(0 <= i + o < length for o in offsets) for i in range(length)]) for length in (height, width)
    )
    return KERNEL_SIZE**2 - rows[:, None] * columns
