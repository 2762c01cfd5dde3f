"""Uformer (arXiv 2106.03106): a U-Net of LeWin blocks, window attention and a feed-forward that looks at neighbours.

The state dicts have the published model's keys, so that its checkpoints load with
:func:`tersor.models.load_checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor import window_attention_kvpacked
from tersor._checks import as_int, check_floating, check_pair
from tersor.attention.layers import DropPath, WindowBias
from tersor.attention.leff import LeFF
from tersor.models.layers import init_linear

_LEVELS = 4  # above the bottleneck
VARIANTS: dict[str, dict[str, Any]] = {
    "uformer_tiny": {"embed_dim": 16, "depths": (2,) * 9},
    "uformer_small": {"embed_dim": 32, "depths": (2,) * 9},
    "uformer_small_noshift": {"embed_dim": 32, "depths": (2,) * 9, "shift": False},
    "uformer_base": {"embed_dim": 32, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1)},
    # Ours, for demos on a CPU: images of multiples of 64.
    "uformer_nano": {
        "img_size": 64,
        "embed_dim": 8,
        "depths": (1, 2, 2, 2, 2, 2, 2, 2, 1),
        "num_heads": (1, 1, 2, 4, 8, 8, 4, 2, 1),
        "drop_path": 0.0,
    },
}


class Projections(nn.Module):
    """Query, and key and value in one, under the published names."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=bias)


class LeWinAttention(WindowBias):
    """Window attention between projections: ``(B, H, W, dim)`` to ``(B, H, W, dim)``, whole windows.

    Args:
        dim, num_heads, window_size, shift_size: as for :class:`tersor.WindowAttention`.
        qkv_bias: whether the projections of query, key and value have a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, window_size, shift_size)
        self.qkv = Projections(dim, qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` is that of :func:`tersor.window_attention`."""
        query = self.qkv.to_q(input).unflatten(3, (self.num_heads, -1))
        kv = self.qkv.to_kv(input).unflatten(3, (2, self.num_heads, -1))
        table = self.relative_position_bias_table
        return self.proj(
            window_attention_kvpacked(query, kv, self.window_size, self.shift_size, table, mask).flatten(3)
        )


class LeWinBlock(nn.Module):
    """x = input + attention(norm1(input) + modulator), output = x + leff(norm2(x)).

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: heads.
        input_resolution: H and W (one int for both) that the block is built for, whatever it runs at: where the smaller
            one is at most ``win_size``, it becomes the window's size and nothing is shifted.
        win_size: rows and columns of a window.
        shift_size: less than the window's size; Swin's.
        mlp_ratio: hidden channels of the feed-forward as a multiple of ``dim``.
        qkv_bias: whether the projections of query, key and value have a bias.
        drop_path: stochastic-depth rate of both branches.
        modulator: a learned vector for each position in a window, added to the attention's input.

    Shape:
        input and output ``(B, H, W, dim)``, tokens ``(B, H * W, dim)`` being a view of it; H and W whole windows.
        ``mask``, ``(1 or B, 1, any, any)``, is not 0 outside of the picture; it is resized to the map (nearest), and
        laid over the windows of the *shifted* map without being shifted, as published. A pair of tokens is masked if
        **both** are outside: tokens in the picture see those outside of it, so the mask saves nobody the choice of a
        padding that looks like the picture.

    Raises:
        TypeError, ValueError: the options do not fit each other, or the input is not as stated.

    Source: Wang et al., "Uformer: A General U-Shaped Transformer for Image Restoration", arXiv 2106.03106.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_resolution: int | Sequence[int],
        win_size: int = 8,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        modulator: bool = False,
    ) -> None:
        super().__init__()
        smaller = min(check_pair("LeWinBlock", "input_resolution", input_resolution, 1))
        window, shift = as_int("LeWinBlock", win_size=win_size), as_int("LeWinBlock", shift_size=shift_size)
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"LeWinBlock: shift_size ({shift}) must be from 0 to less than win_size ({window})")
        if smaller <= window:
            if modulator and smaller < window:
                raise ValueError(
                    f"LeWinBlock: modulator must be False where the window ({window}) shrinks to input_resolution "
                    f"({smaller}), as its vectors are those of a whole window"
                )
            window, shift = smaller, 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LeWinAttention(dim, num_heads, window, shift, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = LeFF(dim, int(dim * mlp_ratio))
        self.modulator = nn.Embedding(window * window, dim) if modulator else None
        self.drop_path = DropPath(drop_path)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, H, W, dim)`` to ``(B, H, W, dim)``."""
        self.check_inputs(input, mask)
        x = self.norm1(input)
        if self.modulator is not None:
            x = self.modulated(x, self.modulator.weight)
        if mask is not None:
            # The operator rolls its mask with the map; published masks stay where they are.
            mask = resized_mask(mask, *input.shape[1:3]).roll(self.attn.shift_size, (1, 2))
        x = input + self.drop_path(self.attn(x, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def modulated(self, input: Tensor, vectors: Tensor) -> Tensor:
        """The vectors belong to positions in the windows of the shifted map: rolled back, they tile the map itself."""
        rows, columns = self.attn.window_size
        tile = vectors.view(rows, columns, -1).roll(self.attn.shift_size, (0, 1))
        tiles = input.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)) + tile[:, None]
        return tiles.flatten(3, 4).flatten(1, 2)

    def check_inputs(self, input: Tensor, mask: Tensor | None) -> None:
        self.attn.check_map(input)
        for axis, size, window in zip("HW", input.shape[1:3], self.attn.window_size, strict=True):
            if size < 1 or size % window:
                raise ValueError(f"LeWinBlock: {axis} ({size}) must be a multiple of the window's size ({window})")
        if mask is not None:
            check_mask("LeWinBlock", mask, input)


def check_mask(name: str, mask: Tensor, input: Tensor) -> None:
    """One channel and at least one pixel, for one image or each of the batch, on the input's device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a torch.Tensor, got {type(mask).__name__}")
    batch = input.shape[0]
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or min(mask.shape[2:]) < 1:
        raise ValueError(f"{name}: mask must be (1 or {batch}, 1, H, W), got shape {tuple(mask.shape)}")
    if mask.device != input.device:
        raise ValueError(f"{name}: mask must be on the device of input {input.device}, got {mask.device}")


def resized_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """``(N, 1, H, W)`` to bool ``(N, height, width)``, nearest: row i is row ``floor(i * H / height)``."""
    rows, columns = (
        torch.arange(size, device=mask.device) * given // size
        for size, given in zip((height, width), mask.shape[2:], strict=True)
    )
    return mask[:, 0][:, rows[:, None], columns] != 0


class Level(nn.Module):
    """Blocks on one grid: ``(B, H, W, dim)`` to ``(B, H, W, dim)``."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        x = input
        for block in self.blocks:
            x = block(x, mask)
        return x


class Sampling(nn.Module):
    """Layers of a convolution on ``(B, H, W, C)`` maps, under the published name ``conv``, ``deconv`` or ``proj``."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, input: Tensor) -> Tensor:
        return self.get_submodule(self.name)(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Uformer(nn.Module):
    """Encoder levels with halving between them, bottleneck, decoder levels that take the skips; adds the image.

    Args:
        img_size: H and W (one int for both, multiples of 16) that the model is **built** for, which decides about
            windows and shifts for good, see :class:`LeWinBlock`: level l is built for ``img_size / 2 ** l``. It runs at
            other sizes too. Published weights are used at more than one: those for GoPro were trained with 256, where
            the second bottleneck block is shifted, and tested with 128, where it is not.
        embed_dim: channels C of the first level; every level down doubles them.
        depths, num_heads: of the four encoder levels, the bottleneck and the four decoder levels.
        win_size: rows and columns of a window.
        mlp_ratio: hidden channels of the feed-forwards as a multiple of their level's channels.
        qkv_bias: whether the projections of query, key and value have a bias.
        drop_path: stochastic-depth rate of the bottleneck, to which the encoder's rise from 0; the decoder's fall.
        modulator: whether decoder blocks have one, see :class:`LeWinBlock`.
        shift: whether every second block of a level is shifted, by half a window.
        dd_in: channels of the input; the image is added to the output if there are 3.
        block: called like :class:`LeWinBlock`.

    Shape:
        ``(B, dd_in, H, W)`` to ``(B, 3, H, W)``; H and W multiples of ``multiple`` (128 for the published models built
        for 128 and more), for other sizes see :func:`pad_and_run`. ``mask`` as for :class:`LeWinBlock`.

    Raises:
        TypeError, ValueError: options that do not fit each other, or an input that is not as stated.

    Source: Wang et al., "Uformer: A General U-Shaped Transformer for Image Restoration", arXiv 2106.03106.
    """

    def __init__(
        self,
        img_size: int | Sequence[int],
        embed_dim: int = 32,
        depths: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8, 16, 16, 8, 4, 2),
        win_size: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.1,
        modulator: bool = True,
        shift: bool = True,
        dd_in: int = 3,
        block: Callable[..., nn.Module] = LeWinBlock,
    ) -> None:
        super().__init__()
        grid = check_pair("Uformer", "img_size", img_size, 1)
        if grid[0] % 2**_LEVELS or grid[1] % 2**_LEVELS:
            raise ValueError(f"Uformer: img_size must be a multiple of {2**_LEVELS}, got {img_size}")
        for name, values in (("depths", depths), ("num_heads", num_heads)):
            if len(values) != 2 * _LEVELS + 1 or any(as_int("Uformer", **{name: value}) < 1 for value in values):
                raise ValueError(f"Uformer: {name} must be {2 * _LEVELS + 1} positive numbers, got {values}")
        self.dd_in = as_int("Uformer", dd_in=dd_in)
        if self.dd_in < 1 or as_int("Uformer", embed_dim=embed_dim) < 1:
            raise ValueError(f"Uformer: dd_in and embed_dim must be at least 1, got {dd_in} and {embed_dim}")
        encoder, decoder = sum(depths[:_LEVELS]), sum(depths[_LEVELS + 1 :])
        if decoder > encoder:
            raise ValueError(
                f"Uformer: depths must give the decoder no more blocks than the encoder, got {decoder} and {encoder}"
            )
        rates = [drop_path * index / max(encoder - 1, 1) for index in range(encoder)]
        all_rates = iter([*rates, *[drop_path] * depths[_LEVELS], *rates[::-1]])

        def level(index: int, dim: int, below: int, **options: Any) -> Level:
            size = [side // 2**below for side in grid]
            common = {"win_size": win_size, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
            shifts = [win_size // 2 if shift and number % 2 else 0 for number in range(depths[index])]
            return Level(
                [
                    block(dim, num_heads[index], size, shift_size=s, drop_path=next(all_rates), **common, **options)
                    for s in shifts
                ]
            )

        activation = nn.LeakyReLU(0.01, inplace=True)
        self.input_proj = Sampling("proj", nn.Conv2d(dd_in, embed_dim, 3, 1, 1), activation)
        for i in range(_LEVELS):
            dim = embed_dim * 2**i
            self.add_module(f"encoderlayer_{i}", level(i, dim, i))
            self.add_module(f"dowsample_{i}", Sampling("conv", nn.Conv2d(dim, 2 * dim, 4, 2, 1)))  # so spelled
        self.conv = level(_LEVELS, embed_dim * 2**_LEVELS, _LEVELS)
        dim = embed_dim * 2**_LEVELS
        for i in range(_LEVELS):
            below = _LEVELS - 1 - i
            half = embed_dim * 2**below  # the skip's channels, and as many from below
            self.add_module(f"upsample_{i}", Sampling("deconv", nn.ConvTranspose2d(dim, half, 2, 2)))
            dim = 2 * half
            self.add_module(f"decoderlayer_{i}", level(_LEVELS + 1 + i, dim, below, modulator=modulator))
        self.output_proj = Sampling("proj", nn.Conv2d(dim, 3, 3, 1, 1))
        self.multiple = 1
        for below in range(_LEVELS + 1):
            side = min(win_size, *(side // 2**below for side in grid))
            self.multiple = math.lcm(self.multiple, side * 2**below)
        self.apply(init_linear)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        check_floating("Uformer", input=input)
        if input.dim() != 4 or input.shape[1] != self.dd_in:
            raise ValueError(f"Uformer: input must be (B, {self.dd_in}, H, W), got shape {tuple(input.shape)}")
        for axis, size in zip("HW", input.shape[2:], strict=True):
            if size < 1 or size % self.multiple:
                raise ValueError(
                    f"Uformer: {axis} ({size}) must be a multiple of {self.multiple}, so that all levels are whole "
                    f"windows; tersor.models.pad_and_run takes any size"
                )
        if mask is not None:
            check_mask("Uformer", mask, input)
        x = self.input_proj(input.permute(0, 2, 3, 1))
        skips = []
        for i in range(_LEVELS):
            skips.append(self.get_submodule(f"encoderlayer_{i}")(x, mask))
            x = self.get_submodule(f"dowsample_{i}")(skips[-1])
        x = self.conv(x, mask)
        for i in range(_LEVELS):
            x = torch.cat([self.get_submodule(f"upsample_{i}")(x), skips.pop()], 3)
            x = self.get_submodule(f"decoderlayer_{i}")(x, mask)
        output = self.output_proj(x).permute(0, 3, 1, 2)
        return input + output if self.dd_in == 3 else output


def pad_and_run(
    model: Uformer, input: Tensor, padding: str = "reflect", tile: int | None = None, overlap: int = 32
) -> Tensor:
    """A model's output for an image of any size, in one piece or in tiles, without a mask.

    Args:
        model: a :class:`Uformer`, or any module with an attribute ``multiple`` that takes and gives maps whose sides
            are multiples of it.
        input: ``(B, C, H, W)``.
        padding: ``"reflect"`` continues the image on the right and at the bottom by its mirror image, as often as
            needed, to whole multiples; or ``"square"``, the published tests' rule: the image in the middle of a square
            of zeros, whose side is a multiple of 128, and the result clamped to [0, 1].
        tile: side of the tiles, a multiple of ``model.multiple``; None for one piece. Only with ``"reflect"``.
        overlap: of neighbouring tiles, in pixels, over which they are faded into each other.

    Returns:
        ``(B, channels, H, W)``.

    Raises:
        TypeError, ValueError: an argument is not as stated.
    """
    name, multiple = "pad_and_run", model.multiple
    check_floating(name, input=input)
    if input.dim() != 4 or min(input.shape[2:]) < 1:
        raise ValueError(f"{name}: input must be (B, C, H, W) of at least one pixel, got shape {tuple(input.shape)}")
    if padding not in ("reflect", "square"):
        raise ValueError(f"{name}: padding must be 'reflect' or 'square', got {padding!r}")
    height, width = input.shape[2:]
    if padding == "square":
        if tile is not None:
            raise ValueError(f"{name}: tile must be None with padding 'square', got {tile}")
        step = math.lcm(multiple, 128)
        side = -(-max(height, width) // step) * step
        top, left = (side - height) // 2, (side - width) // 2
        padded = input.new_zeros((*input.shape[:2], side, side))
        padded[:, :, top : top + height, left : left + width] = input
        return model(padded)[:, :, top : top + height, left : left + width].clamp(0, 1)
    rows, columns = (_mirrored(size, -(-size // multiple) * multiple, input.device) for size in (height, width))
    padded = input[:, :, rows[:, None], columns]
    if tile is None:
        return model(padded)[:, :, :height, :width]
    if as_int(name, tile=tile) < 1 or tile % multiple:
        raise ValueError(f"{name}: tile must be a multiple of {multiple}, got {tile}")
    if not 0 <= as_int(name, overlap=overlap) < tile:
        raise ValueError(f"{name}: overlap must be from 0 to less than tile ({tile}), got {overlap}")
    return _tiled(model, padded, tile, overlap)[:, :, :height, :width]


def _mirrored(size: int, target: int, device: torch.device) -> Tensor:
    """Indices 0 to size - 1, and on to ``target`` of them back and forth, the border once."""
    period = max(2 * (size - 1), 1)
    places = torch.arange(target, device=device) % period
    return torch.minimum(places, period - places) if size > 1 else torch.zeros_like(places)


def _tiled(model: nn.Module, input: Tensor, tile: int, overlap: int) -> Tensor:
    """Weighted means of overlapping tiles; the weights rise linearly from a tile's border."""
    height, width = input.shape[2:]
    place = torch.arange(1, tile + 1, device=input.device, dtype=input.dtype)
    ramp = torch.minimum(place, place.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
    total: Tensor | None = None
    weights = input.new_zeros(height, width)
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            part = model(input[:, :, top : top + tile, left : left + tile])
            weight = ramp[: part.shape[2], None] * ramp[: part.shape[3]]
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[:, :, top : top + tile, left : left + tile] += part * weight
            weights[top : top + tile, left : left + tile] += weight
    assert total is not None
    return total / weights


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    last = max(size - tile, 0)
    return [*range(0, last, tile - overlap), last]


def charbonnier_loss(input: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """The mean of ``sqrt((input - target) ** 2 + eps ** 2)``, a smooth absolute difference.

    Raises:
        TypeError, ValueError: the tensors are not floating-point tensors of one shape and dtype.
    """
    check_floating("charbonnier_loss", input=input, target=target)
    if input.shape != target.shape:
        raise ValueError(
            f"charbonnier_loss: target must have the shape of input {tuple(input.shape)}, got {tuple(target.shape)}"
        )
    return ((input - target).square() + eps**2).sqrt().mean()


def uformer_tiny(img_size: int | Sequence[int], **options: Any) -> Uformer:
    """Uformer_T: 5.29 M parameters, 11.3 G multiply-adds at 256 x 256; options as :class:`Uformer`."""
    return Uformer(img_size, **VARIANTS["uformer_tiny"] | options)


def uformer_small(img_size: int | Sequence[int], **options: Any) -> Uformer:
    """Uformer_S: 20.75 M parameters, 41.0 G multiply-adds at 256 x 256; options as :class:`Uformer`."""
    return Uformer(img_size, **VARIANTS["uformer_small"] | options)


def uformer_small_noshift(img_size: int | Sequence[int], **options: Any) -> Uformer:
    """Uformer_S without shifts; options as :class:`Uformer`."""
    return Uformer(img_size, **VARIANTS["uformer_small_noshift"] | options)


def uformer_base(img_size: int | Sequence[int], **options: Any) -> Uformer:
    """Uformer_B: 50.88 M parameters, 86.6 G multiply-adds at 256 x 256; options as :class:`Uformer`."""
    return Uformer(img_size, **VARIANTS["uformer_base"] | options)


def uformer_nano(**options: Any) -> Uformer:
    """8 channels, built for 64 x 64, for demos on a CPU; options as :class:`Uformer`."""
    return Uformer(**VARIANTS["uformer_nano"] | options)
