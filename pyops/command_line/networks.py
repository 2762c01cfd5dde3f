"""Models for a number of classes: building them by name, what they take, and weights from a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.command_line.shared import CommandError
from tersor.compress import ModelSource, first_tensor

CLASSES = {"transformers": "num_labels"}  # the option with the number of classes, where it is not num_classes
SIZE = 224  # of images, where the model does not say


def model_source(text: str) -> ModelSource:
    """For argparse."""
    try:
        return ModelSource.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model ")) from None


def model_option(text: str) -> tuple[str, Any]:
    """``key=value`` for argparse; the value as JSON, or as the text that it is."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"must be key=value, got {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_model_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """``--model`` and ``--option``."""
    parser.add_argument(
        "--model",
        type=model_source,
        metavar="PLACE:NAME",
        required=required,
        help="such as resnet20, torchvision:resnet18, timm:vit_small_patch16_224, or transformers:CLASS; without a "
        "place a model of tersor.models",
    )
    parser.add_argument(
        "--option", type=model_option, nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="of the model, such as width=32 or image_size=96",
    )  # fmt: skip


def build(source: ModelSource, options: Iterable[tuple[str, Any]], classes: int | None = None) -> tuple[Any, Any]:
    """The source with its options, and its model with initial weights.

    Args:
        source: place and name.
        options: keys and values; a key's last value holds.
        classes: how many the model shall tell; None for what it does by itself.

    Raises:
        CommandError: it cannot be built so.
    """
    chosen = dict(options)
    name = CLASSES.get(source.place, "num_classes")
    if classes is not None and chosen.setdefault(name, classes) != classes:
        raise CommandError(f"--option {name}={chosen[name]}: the data have {classes} classes")
    source = source._replace(options=chosen)
    try:
        return source, source.build()
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from None


def input_channels(model: nn.Module) -> int:
    """Of the first convolution; 3 where there is none."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def natural_size(model: Any, options: Mapping[str, Any]) -> int:
    """Pixels of a side that the model takes by its options or says it takes; else SIZE."""
    described = getattr(model, "default_cfg", None)  # timm's
    sizes = [options.get("image_size"), options.get("img_size")]
    sizes += [described["input_size"][-1] if isinstance(described, Mapping) and "input_size" in described else None]
    for holder in (model, getattr(model, "config", None)):  # torchvision's and transformers' vision transformers
        sizes.append(getattr(holder, "image_size", None))
    return next((size for size in sizes if isinstance(size, int)), SIZE)


@torch.no_grad()
def check_model(model: nn.Module, channels: int, size: int, classes: int | None = None) -> None:
    """Runs one image through; raises CommandError if that fails or the output has another number of classes."""
    training = model.training
    try:
        output = first_tensor(model.eval()(torch.zeros(1, channels, size, size)))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"the model does not take images of {size} x {size} pixels (--size): {reason}") from None
    finally:
        model.train(training)
    if classes is not None and tuple(output.shape) != (1, classes):
        raise CommandError(f"the model must give (images, {classes} classes), it gives {tuple(output.shape)}")


def file_digest(path: Path) -> str:
    """Tells a file from others; raises CommandError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from None


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Loads a checkpoint's weights; of a head with another number of classes the model's own stay.

    Args:
        model: receives the weights in place.
        path: a safetensors file, or one by ``torch.save`` that holds nothing but tensors; see
            :func:`tersor.models.load_checkpoint`.

    Returns:
        The names of the head's parameters, if they are not the checkpoint's.

    Raises:
        CommandError: the file cannot be read, or its weights are another model's.
    """
    from tersor.models.layers import read_state_dict

    try:
        state = dict(read_state_dict(path))
    except Exception as error:  # unpickling raises anything; it runs no code of the file's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path}: cannot be read as a checkpoint: {reason}") from None
    own = model.state_dict()
    for what, keys in (("lacks", own.keys() - state.keys()), ("has besides", state.keys() - own.keys())):
        keys = {key for key in keys if not key.endswith("num_batches_tracked")}  # older files have none
        if keys:
            raise CommandError(f"{path}: not a checkpoint of this model: it {what} {_some(sorted(keys))}")
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    head = _head(model, other, own, state)
    if len(other) > len(head):
        key = next(key for key in other if key not in head)
        shapes = f"{tuple(state[key].shape)}, in the model {tuple(own[key].shape)}"
        raise CommandError(f"{path}: not a checkpoint of this model: {key} is {shapes}")
    model.load_state_dict({key: value for key, value in state.items() if key not in head}, strict=False)
    return head


def _head(model: nn.Module, keys: Sequence[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Those of the keys that are weight and bias of a last layer with another number of classes."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    last = layers[-2:]  # distilled transformers have two heads
    found = [key for key in keys if key.rpartition(".")[0] in last]
    return [key for key in found if own[key].shape[1:] == state[key].shape[1:]]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
