"""What a recipe can do to a layer, and what goes together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from tersor._checks import as_int, check_share
from tersor.binary.estimators import check_estimator
from tersor.freezing.freeze_schedule import GRANULARITIES, GROWTHS
from tersor.sparsity.nm_pattern import check_pattern

QUANTIZERS = ("lsq", "ddtb", "lts")
SPARSIFIERS = ("lbc", "srste")
BINARIZERS = ("recu", "reste", "ste", "approx")


@dataclasses.dataclass(frozen=True)
class FakeQuantize:
    """Weights and inputs of few bits, in training as rounded floats and once converted as whole numbers.

    The input is rounded between two learned bounds, see :func:`tersor.fake_quantize_bounds`, in every method; the
    weight as the method says:

    - ``"lsq"``: steps that are learned, one for each output channel, see :func:`tersor.fake_quantize_lsq`.
    - ``"ddtb"``: between two percentiles of the weight, see :func:`tersor.weight_fake_quantize`.
    - ``"lts"``: between two learned bounds, in levels that :class:`Freeze` can tell settled weights by, see
      :func:`tersor.lts_quantize`; multiplied back by half the bounds' distance, which the published method does not.

    Args:
        bits: of the weight, 2 to 8; 2 to 7 for ``"lts"``.
        input_bits: 2 to 8; None for ``bits``, 32 leaves the input as it is (the product is then computed in float).
        method: of the weight.
        percentile: the input's first bounds are this percentile of a batch and its opposite, see
            :func:`tersor.compress.calibrate_`.
    """

    bits: int = 4
    input_bits: int | None = None
    method: str = "lsq"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        name = "FakeQuantize"
        _check_choice(name, QUANTIZERS, method=self.method)
        most = 7 if self.method == "lts" else 8
        if not 2 <= as_int(name, bits=self.bits) <= most:
            raise ValueError(f"{name}: bits must be 2 to {most} for method {self.method!r}, got {self.bits}")
        if self.input_bits is not None and as_int(name, input_bits=self.input_bits) not in (*range(2, 9), 32):
            raise ValueError(f"{name}: input_bits must be 2 to 8, 32 or None, got {self.input_bits}")
        _check_number(name, percentile=self.percentile)
        if not 50 < self.percentile <= 100:
            raise ValueError(f"{name}: percentile must be above 50 and at most 100, got {self.percentile}")

    @property
    def bits_of_input(self) -> int:
        return self.bits if self.input_bits is None else self.input_bits

    def __str__(self) -> str:
        inputs = "float" if self.bits_of_input == 32 else f"{self.bits_of_input}-bit"
        return f"{self.bits}-bit {self.method}, {inputs} input"


@dataclasses.dataclass(frozen=True)
class NMSparse:
    """n of every m consecutive weights along the input channels are kept.

    - ``"lbc"``: by a learned score for every way to keep n of m, of which more and more are removed until one is left,
      see :class:`tersor.sparsity.NMSchedule`.
    - ``"srste"``: the n largest of the weight, while the others decay, see :func:`tersor.sparsity.srste_sparsify`.

    Args:
        n, m: 1 <= n < m <= 16; m divides the input channels (of a group), so that the weight can be packed.
        method: how the kept ones are found.
        end: share of the training after which one combination is left. For ``"lbc"``.
        power: how fast combinations are removed, see :func:`tersor.sparsity.nm_schedule`. For ``"lbc"``.
        decay: of the weights that are not kept. For ``"srste"``.
    """

    n: int = 2
    m: int = 4
    method: str = "lbc"
    end: float = 0.5
    power: int = 3
    decay: float = 2e-4

    def __post_init__(self) -> None:
        name = "NMSparse"
        _check_choice(name, SPARSIFIERS, method=self.method)
        check_pattern(name, self.n, self.m, scored=self.method == "lbc")
        check_share(name, above_zero=True, end=self.end)
        _check_number(name, decay=self.decay)
        if as_int(name, power=self.power) < 1:
            raise ValueError(f"{name}: power must be at least 1, got {self.power}")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"{name}: decay must be finite and at least 0, got {self.decay}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m} {self.method}"


@dataclasses.dataclass(frozen=True)
class Freeze:
    """Weights that have settled on a level are frozen: the backward pass leaves them out. Needs ``"lts"`` levels.

    Args:
        warmup: share of the training before the first weight may freeze.
        growth, rate, momentum, granularity, tile, quantile: see :class:`tersor.FreezeSchedule`.
        every: steps between two looks at what can be left out of the backward pass.

    Source: Zhong et al., arXiv 2211.08544; blocks are an extension.
    """

    warmup: float = 0.2
    growth: str = "linear"
    rate: float = 0.1
    momentum: float = 0.99
    granularity: str = "tile"
    tile: tuple[int, int] = (64, 64)
    quantile: float = 0.9
    every: int = 50

    def __post_init__(self) -> None:
        name = "Freeze"
        _check_choice(name, GROWTHS, growth=self.growth)
        _check_choice(name, GRANULARITIES, granularity=self.granularity)
        check_share(name, warmup=self.warmup)
        for field in ("rate", "momentum", "quantile"):
            _check_number(name, **{field: getattr(self, field)})
        if self.growth != "fixing" and self.warmup == 1:
            raise ValueError(f"{name}: warmup must be below 1 for growth {self.growth!r}, got {self.warmup}")
        if as_int(name, every=self.every) < 1:
            raise ValueError(f"{name}: every must be at least 1, got {self.every}")
        if not isinstance(self.tile, (tuple, list)):
            raise TypeError(f"{name}: tile must be two ints, got {type(self.tile).__name__}")
        object.__setattr__(self, "tile", tuple(self.tile))  # TOML and JSON have lists
        self.schedule(2)  # which checks the others

    def schedule(self, steps: int) -> Any:
        """The :class:`tersor.FreezeSchedule` of a training of so many steps."""
        from tersor.freezing import FreezeSchedule

        warmup = min(round(self.warmup * steps), steps - (self.growth != "fixing"))
        options = {"growth": self.growth, "rate": self.rate, "momentum": self.momentum}
        blocks: dict[str, Any] = {"granularity": self.granularity, "tile": self.tile, "quantile": self.quantile}
        return FreezeSchedule(1, steps, warmup, **options, **blocks)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"freeze by {self.granularity}"


@dataclasses.dataclass(frozen=True)
class Binarize:
    """Weights and inputs of one bit, see :mod:`tersor.binary`.

    Args:
        method: ``"recu"`` (convolutions only) or an estimator of the sign's gradient.

    Source: arXiv 2103.12369 (ReCU), 2308.06689 (ReSTE).
    """

    method: str = "recu"

    def __post_init__(self) -> None:
        _check_choice("Binarize", BINARIZERS, method=self.method)
        if self.method != "recu":
            check_estimator("Binarize", self.method)

    def __str__(self) -> str:
        return f"1-bit {self.method}"


@dataclasses.dataclass(frozen=True)
class WindowAttentionByIndex:
    """Replaces torchvision's ``ShiftedWindowAttention`` by :class:`tersor.WindowAttention`, which computes the same
    without rolling and cutting the map, with the same parameters. Trained dropout is refused."""

    def __str__(self) -> str:
        return "window attention by index"


Transform = FakeQuantize | NMSparse | Freeze | Binarize | WindowAttentionByIndex
TRANSFORMS: tuple[type[Any], ...] = (FakeQuantize, NMSparse, Freeze, Binarize, WindowAttentionByIndex)


def check_composition(where: str, transforms: Iterable[Any]) -> tuple[Transform, ...]:
    """The transforms of one layer as a tuple; raises unless they go together."""
    found: dict[type[Any], Any] = {}
    for transform in transforms:
        if not isinstance(transform, TRANSFORMS):
            names = ", ".join(kind.__name__ for kind in TRANSFORMS)
            raise TypeError(f"{where}: transforms must be of {names}, got {type(transform).__name__}")
        if type(transform) in found:
            raise ValueError(f"{where}: {type(transform).__name__} must come once per layer, got it twice")
        found[type(transform)] = transform
    if not found:
        raise ValueError(f"{where}: transforms must not be empty")
    for alone, reason in (
        (Binarize, "one bit leaves nothing to round, drop or freeze"),
        (WindowAttentionByIndex, "it replaces attention, not a layer with a weight; give it a rule of its own"),
    ):
        if alone in found and len(found) > 1:
            others = ", ".join(kind.__name__ for kind in found if kind is not alone)
            raise ValueError(f"{where}: {alone.__name__} must stand alone, got {others} with it: {reason}")
    quantize, sparse = found.get(FakeQuantize), found.get(NMSparse)
    if Freeze in found and (quantize is None or quantize.method != "lts"):
        given = "no FakeQuantize" if quantize is None else f"method {quantize.method!r}"
        raise ValueError(
            f"{where}: Freeze must come with FakeQuantize(method='lts'), got {given}: a weight freezes by its distance "
            "to that method's levels"
        )
    if sparse is not None and sparse.method == "srste" and quantize is not None and quantize.method == "lts":
        raise ValueError(
            f"{where}: NMSparse must have method 'lbc' beside FakeQuantize(method='lts'), got 'srste': zero is none of "
            "its levels, so the weights that are dropped have to be told by scores"
        )
    return tuple(found.values())


def _check_choice(where: str, allowed: tuple[str, ...], **argument: Any) -> None:
    ((name, value),) = argument.items()
    if value not in allowed:
        raise ValueError(f"{where}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_number(where: str, **argument: Any) -> None:
    ((name, value),) = argument.items()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
