"""Converted models as files: safetensors with a description in JSON, a check sum over all of it, and no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.compress.convert import Fold, Folded, convert_with
from tersor.compress.layers import CompressedLayer
from tersor.compress.prepare import compression_of, prepare_, step
from tersor.compress.quantizers import InputBounds
from tersor.compress.recipe import Recipe, Rule
from tersor.compress.sources import ModelSource
from tersor.compress.transforms import TRANSFORMS, Transform, check_composition

FORMAT = 1
MOST_WEIGHTS = 64  # in a byte of a file: 1:16 in codes of 2 bits takes 6 bits for 16 weights, the least that there is


class ArtefactError(ValueError):
    """A file that cannot be used; the message says why."""


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    source: ModelSource | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a converted model to one file, replacing it in one step.

    Args:
        model: from :func:`convert_`.
        path: of the file, by custom ``*.safetensors``.
        source: what builds the model again; with it :func:`load` needs nothing but the file.
        metadata: whatever else is to be kept with it, of what JSON can hold, such as the names of classes.

    Raises:
        ImportError: safetensors is not installed.
        TypeError, ValueError: the model is not converted, or ``metadata`` is not of what JSON can hold.
        OSError: the file cannot be written.
    """
    safetensors = _safetensors("save")
    if source is not None and not isinstance(source, ModelSource):
        raise TypeError(f"save: source must be a ModelSource or None, got {type(source).__name__}")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"save: metadata must be a mapping, got {type(metadata).__name__}")
    compression = compression_of("save", model)
    if not compression.converted:
        raise ValueError("save: model must be converted by convert_, got one that trains, whose state_dict can be kept")
    description = {
        "format": FORMAT,
        "layers": {name: [_to_dict(each) for each in found] for name, found in compression.applied.items()},
        "folded": compression.folded,
        "skipped": compression.skipped,
        "source": None if source is None else source.to_dict(),
        "metadata": dict(metadata or {}),
    }
    try:
        text = json.dumps(description, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save: metadata must be of what JSON can hold: {error}") from None
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    header = {"tersor": text, "sha256": _digest(text, tensors)}
    content = _ordered(safetensors.torch.save(tensors, header))
    folder = os.path.dirname(os.path.abspath(path))
    handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".unfinished")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _ordered(content: bytes) -> bytes:
    """The same file for the same model: safetensors writes metadata in an order that changes from run to run."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What a file holds besides tensors.

    Attributes:
        layers: the transforms of each layer.
        folded: convolutions, and what went into them.
        skipped: layers that a rule matched and that stayed as they were, with the reason.
        source: what builds the model; None where the file does not say.
        metadata: as given to :func:`save`.
        tensors: the state dict.
    """

    layers: dict[str, tuple[Transform, ...]]
    folded: Folded
    skipped: dict[str, str]
    source: ModelSource | None
    metadata: dict[str, Any]
    tensors: dict[str, Tensor] = dataclasses.field(repr=False)


def read(path: str | os.PathLike[str]) -> Artefact:
    """Reads a file that :func:`save` wrote, and checks that it is whole.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be opened.
        ArtefactError: it is damaged, cut off, not of this kind, or of a newer version of tersor.
    """
    safetensors = _safetensors("load")
    where = os.fspath(path)
    with open(where, "rb"):
        pass  # so that a missing file is an OSError like elsewhere
    try:
        with safetensors.safe_open(where, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = _digest(header.get("tersor", ""), tensors)
    except Exception as error:  # safetensors raises several kinds for damaged files
        raise ArtefactError(f"{where}: not a safetensors file, or damaged: {error}") from None
    if "tersor" not in header or "sha256" not in header:
        raise ArtefactError(f"{where}: a safetensors file, but not one that tersor.compress.save wrote")
    try:
        description = json.loads(header["tersor"])
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{where}: damaged: its description is not JSON ({error})") from None
    version = description.get("format") if isinstance(description, dict) else None
    if type(version) is int and version > FORMAT:
        raise ArtefactError(f"{where}: of format {version}, written by a newer tersor; this one reads up to {FORMAT}")
    if type(version) is not int or version != FORMAT:
        raise ArtefactError(f"{where}: damaged: its format must be {FORMAT}, got {version!r}")
    if digest != header["sha256"]:
        raise ArtefactError(f"{where}: damaged: its check sum does not fit what it holds")
    try:
        return _described(description, tensors)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise ArtefactError(f"{where}: its description cannot be used: {type(error).__name__}: {error}") from None


def _described(description: dict[str, Any], tensors: dict[str, Tensor]) -> Artefact:
    """From the parts of a file; raises any error where they are not as :func:`save` writes them."""
    keys = ("layers", "folded", "skipped", "metadata")
    layers, folded, skipped, metadata = (_dictionary(description[key], key) for key in keys)
    if not layers or not all(isinstance(found, list) and found for found in layers.values()):
        raise ValueError("layers must have transforms")
    if not all(isinstance(text, str) for text in skipped.values()):
        raise TypeError("skipped must be of text")
    transforms = {name: check_composition(name, map(_from_dict, found)) for name, found in layers.items()}
    source = None if description["source"] is None else ModelSource.from_dict(description["source"])
    folds = {name: _fold(each) for name, each in folded.items()}
    return Artefact(transforms, folds, skipped, source, metadata, tensors)


def _fold(contents: Any) -> Fold:
    fold = Fold(*contents)
    relu = fold.relu is None or isinstance(fold.relu, str)
    if not (isinstance(fold.norm, str) and relu and isinstance(fold.residual, bool)):
        raise TypeError(f"folded must be of norm, ReLU and whether there is a residual, got {contents!r}")
    return fold


def _dictionary(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a table, got {type(value).__name__}")
    return value


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The converted model that a file holds, ready to run.

    Args:
        path: a file that :func:`save` wrote.
        model: of the same architecture, not prepared; its layers are replaced in place, and all weights come from the
            file. None builds the one that the file names, which is looked up in the packages of :class:`ModelSource`
            and nowhere else; a given one is of no use after an error.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ImportError: safetensors, or the package that the model is from, is not installed.
        OSError: the file cannot be opened.
        ArtefactError: see :func:`read`; or the file names no model and none is given, or does not fit it.
    """
    found = read(path)
    where = os.fspath(path)
    if model is None:
        if found.source is None:
            raise ArtefactError(f"{where}: says not what model it is: give one")
        try:
            _check_size(found.source, os.path.getsize(where))
            model = found.source.build()
        except ValueError as error:
            raise ArtefactError(f"{where}: {error}") from None
    kind = type(model).__name__
    try:
        model = _converted(model, found)
        _check_dtypes(model, found.tensors)
        model.load_state_dict(found.tensors)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ArtefactError(f"{where}: does not fit {kind}: {error}") from None
    return model.eval()


def _check_size(source: ModelSource, size: int) -> None:
    """Raises ValueError where the model is far too large for a file of so many bytes, before it takes any memory."""
    try:
        with torch.device("meta"):
            model = source.build()
    except ValueError:
        return  # some models cannot be built without memory; if it is another error, building will say so
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_WEIGHTS * size:
        raise ValueError(f"model {source} has {count} weights, which are not in {size} bytes")


def _check_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where loading would round or cut off numbers; floating point may be of another precision."""
    for name, own in model.state_dict().items():
        given = tensors.get(name)
        if given is None or given.dtype == own.dtype or (given.is_floating_point() and own.is_floating_point()):
            continue
        raise ValueError(f"{name} must be {own.dtype}, got {given.dtype}")


def _converted(model: nn.Module, found: Artefact) -> nn.Module:
    """A model whose layers are those of the file, with any numbers in them."""
    model = model.cpu()
    root = type(model).__name__
    rules = [Rule(*each, layers=_Only(name)) for name, each in found.layers.items()]
    model = prepare_(model, Recipe(*rules, skip_first=False, skip_last=False))
    compression: Any = model.get_submodule("compression")
    if set(compression.applied) != set(found.layers):
        missing = sorted(set(found.layers) - set(compression.applied))
        raise ValueError(f"{root} has no layers {', '.join(missing)} that can be replaced")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CompressedLayer):  # no constant weight, which some quantisers refuse
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
            if isinstance(module, InputBounds):
                module.set_(torch.tensor([-1.0, 1.0]))
    step(model)
    model.eval()
    compression.skipped = found.skipped
    return convert_with(model, compression, found.folded)


class _Only(NamedTuple):
    """A predicate for one name, which may hold what a pattern takes for a wildcard."""

    name: str

    def __call__(self, given: str, module: nn.Module) -> bool:
        return given == self.name


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the description and all tensors: names, dtypes, shapes and bytes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()


def _to_dict(transform: Any) -> dict[str, Any]:
    return {"transform": type(transform).__name__, **dataclasses.asdict(transform)}


def _from_dict(contents: Mapping[str, Any]) -> Any:
    options = dict(contents)
    name = options.pop("transform")
    kind = next((each for each in TRANSFORMS if each.__name__ == name), None)
    if kind is None:
        raise ValueError(f"it has a transform {name!r}, which this tersor does not know")
    return kind(**options)


def _safetensors(what: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f'tersor.compress.{what} needs safetensors ({error}): pip install "tersor[compress]"'
        ) from error
    return safetensors
