"""The pages of the API reference, made from each package's ``__all__``, so that nobody keeps a second list."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"pyops": "tersor", "models": "tersor.models"}  # as pyproject.toml maps them


def modules() -> Iterator[ModuleType]:
    """``tersor`` and every package below it that says what is public."""
    for folder, name in FOLDERS.items():
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not any(part.startswith("_") for part in parts):
                module = importlib.import_module(".".join([name, *parts]))
                if hasattr(module, "__all__"):
                    yield module


def homes() -> dict[str, str]:
    """The full public names, and under which of them each is described: that of the innermost package."""
    described: dict[int, str] = {}
    for module in sorted(modules(), key=lambda m: -m.__name__.count(".")):
        for name in module.__all__:
            described.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")
    return {f"{m.__name__}.{n}": described[id(getattr(m, n))] for m in modules() for n in m.__all__}


def page(module: ModuleType, described: dict[str, str]) -> str:
    """The page of one package, in reStructuredText."""
    title = module.__name__
    lines = [title, "=" * len(title), "", f".. automodule:: {title}", "", f".. currentmodule:: {title}", ""]
    own = [name for name in module.__all__ if described[f"{title}.{name}"] == f"{title}.{name}"]
    others = [name for name in module.__all__ if name not in own]
    functions = [name for name in own if inspect.isroutine(getattr(module, name))]
    classes = [name for name in own if inspect.isclass(getattr(module, name))]
    rest = [name for name in own if name not in functions and name not in classes]
    kinds = (("Functions", functions), ("Classes", classes), ("Data", rest))
    for heading, names in kinds:
        lines += _table(module, heading, names, described)
    lines += _table(module, "From the families", others, described)
    for heading, names in kinds:
        if names:
            lines += [heading, "-" * len(heading), ""]
        for name in names:
            lines += [f".. {_directive(getattr(module, name))}:: {name}", *_options(getattr(module, name)), ""]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """Writes the pages; one that says the same as before stays untouched, so that it need not be read again."""
    folder.mkdir(exist_ok=True)
    described = homes()
    texts = {folder / f"{module.__name__}.rst": page(module, described) for module in modules()}
    for path in set(folder.glob("*.rst")) - set(texts):
        path.unlink()
    for path, text in texts.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _table(module: ModuleType, heading: str, names: list[str], described: dict[str, str]) -> list[str]:
    if not names:
        return []
    lines = [f".. list-table:: {heading}", "   :widths: 30 70", ""]
    for name in names:
        full = f"{module.__name__}.{name}"
        lines += [f"   * - :py:obj:`{name} <{described[full]}>`", f"     - {summary(getattr(module, name))}"]
    return [*lines, ""]


def summary(subject: object) -> str:
    """The first sentence of a docstring, on one line."""
    first = " ".join((inspect.getdoc(subject) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`\d])[.:] (?=[A-Z])", first)[0].rstrip(".:")


def _directive(subject: object) -> str:
    if inspect.isroutine(subject):
        return "autofunction"
    return "autoclass" if inspect.isclass(subject) else "autodata"


def _options(subject: object) -> list[str]:
    if not inspect.isclass(subject):
        return []
    if issubclass(subject, tuple):  # a named tuple's fields are in its docstring, not in "alias for field number 0"
        return ["   :members:", f"   :exclude-members: {', '.join(getattr(subject, '_fields', ()))}"]
    return ["   :members:"]
