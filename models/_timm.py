"""Registration of the variants with timm, under ``tersor_`` and their own names."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from tersor.models import cf_vit, dilateformer, pslt, super_vit, uformer

__all__: list[str] = []  # timm's register_model appends to it: what is registered


def register_timm() -> list[str]:
    """Makes every variant known to ``timm.create_model``; calling it again changes nothing.

    Returns:
        The names, such as ``"tersor_dilateformer_tiny"``.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.models import register_model
    except ImportError as error:
        raise ImportError(f'register_timm needs timm ({error}): pip install "tersor[timm]"') from error
    for name, entry in _ENTRIES.items():
        if name not in __all__:  # timm warns of a second registration
            register_model(entry)
    return list(_ENTRIES)


def _entry(module: ModuleType, variant: str) -> Callable[..., nn.Module]:
    build = getattr(module, variant)

    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        drop_path_rate: float | None = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(f"tersor_{variant}: no pretrained weights are hosted; use tersor.models.load_checkpoint")
        if drop_path_rate is not None:
            options["drop_path"] = drop_path_rate
        return build(**options)

    entry.__name__ = entry.__qualname__ = f"tersor_{variant}"
    entry.__doc__ = f"tersor.models.{variant} with timm's argument names (drop_path_rate for drop_path)."
    return entry


_FAMILIES: tuple[Any, ...] = (cf_vit, dilateformer, pslt, super_vit, uformer)
_ENTRIES = {f"tersor_{variant}": _entry(family, variant) for family in _FAMILIES for variant in family.VARIANTS}
