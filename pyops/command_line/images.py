"""Folders of images as a classification task: finding and splitting them, reading them, and batches. Needs Pillow."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tersor.command_line.shared import CommandError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TEST_NAMES = ("test", "val")
TEST_SHARE = 5  # without a split, about one image in five is for testing
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what published checkpoints were trained with
GREY = ((0.5,), (0.25,))

Entry = tuple[Path, int]  # an image, and the number of its class


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a folder holds: classes in the order of their names, and each part's images.

    Attributes:
        split: in words, where the two parts are from.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Entry, ...]
    test: tuple[Entry, ...]
    split: str

    def digest(self) -> str:
        """Of names, sizes and parts of all images, so that a run goes on with the same ones only."""
        found = hashlib.sha256()
        for part in (self.train, self.test):
            for path, label in part:
                found.update(f"{path.relative_to(self.root).as_posix()}\0{label}\0{path.stat().st_size}\0".encode())
            found.update(b"\n")
        return found.hexdigest()[:16]


def list_images(root: Path) -> Listing:
    """Finds classes and images.

    ``root`` has ``train`` and one of ``test`` and ``val``, with a folder for every class in each; or the folders of the
    classes themselves, whose images are then split by a hash of their names.

    Raises:
        CommandError: there are not at least two classes with images in each part.
    """
    if not root.is_dir():
        raise CommandError(f"{root}: there is no such folder")
    parts = [name for name in TEST_NAMES if (root / name).is_dir()]
    if (root / "train").is_dir() and parts:
        train, test = _classes(root / "train"), _classes(root / parts[0])
        if set(train) != set(test):
            differ = ", ".join(sorted(set(train) ^ set(test))[:5])
            raise CommandError(f"{root}: train and {parts[0]} must have the same classes, they differ in {differ}")
        ignored = f"; {parts[1]} is left aside" if len(parts) > 1 else ""
        split = f"trained on {root / 'train'}, tested on {root / parts[0]}{ignored}"
    else:
        for name in ("train", *TEST_NAMES):
            if (root / name).is_dir() and any(each.is_dir() for each in (root / name).iterdir()):
                wanted = "train and test (or val), or a folder for each class"
                raise CommandError(f"{root}: must have {wanted}; it has {name} only")
        found = _classes(root)
        halves = {name: _split(root / name, paths) for name, paths in found.items()}
        train, test = ({name: half[part] for name, half in halves.items()} for part in (0, 1))
        split = f"no train and test in {root}: one image in {TEST_SHARE}, chosen by a hash of its name, is for testing"
    classes = tuple(sorted(train))
    first, second = (
        tuple((path, i) for i, name in enumerate(classes) for path in part[name]) for part in (train, test)
    )
    return Listing(root, classes, first, second, split)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Names of classes and their images, in order."""
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    if not names:
        found = find_images(folder)
        lies = f"{len(found)} images lie in it directly" if found else "it has none"
        raise CommandError(f"{folder}: must have a folder for each class, {lies}")
    classes = {name: find_images(folder / name) for name in names}
    if empty := [name for name, paths in classes.items() if not paths]:
        kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
        raise CommandError(f"{folder / empty[0]}: the class has no images ({kinds})")
    if len(classes) < 2:
        raise CommandError(f"{folder}: must have at least two classes, it has only {names[0]}")
    return classes


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, in order; hidden files are none."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _split(folder: Path, paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """By the names alone: an image stays in its part whatever others come or go."""
    if len(paths) < 2:
        raise CommandError(f"{folder}: a class needs at least two images to be split, it has {len(paths)}")
    numbers = {path: _hash(path.relative_to(folder).as_posix()) for path in paths}
    test = [path for path in paths if numbers[path] % TEST_SHARE == 0]
    if not test:
        test = [min(paths, key=numbers.__getitem__)]
    if len(test) == len(paths):
        test.remove(max(paths, key=numbers.__getitem__))
    chosen = set(test)
    return [path for path in paths if path not in chosen], test


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How an image file becomes a network's input: scaled, cut to a square, and normalised.

    Attributes:
        size: pixels of a side.
        channels: 3, or 1 for grey.
        mean, std: of each channel, of values from 0 to 1.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise CommandError(f"the model must take 1 or 3 channels, it takes {self.channels}")
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != self.channels:
                raise CommandError(f"{name} must have {self.channels} numbers, one a channel, got {len(values)}")
        if not all(value > 0 for value in self.std):
            raise CommandError(f"std must be above 0, got {' '.join(map(str, self.std))}")

    def read(self, path: Path) -> Tensor:
        """uint8 ``(channels, size, size)``: the middle of the image.

        The orientation in the Exif data holds, palettes become colours, what is transparent shows white, 16 bits become
        8, of several frames it is the first.

        Raises:
            CommandError: the file is no image, or is damaged; the message names it.
        """
        try:
            with Image.open(path) as opened:
                image = _eight_bits(ImageOps.exif_transpose(opened))
                image = image.convert("L" if self.channels == 1 else "RGB")
                image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC)
        except Exception as error:  # Pillow raises many kinds for damaged files
            reason = str(error).replace(str(path), "the file") or type(error).__name__
            raise CommandError(f"{path}: cannot be read as an image: {reason}") from None
        values = np.array(image).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(values).permute(2, 0, 1).contiguous()

    def normalized(self, images: Tensor) -> Tensor:
        """float32 of uint8 ``(N, channels, size, size)``."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Reading:
        """From an artefact's metadata; raises KeyError, TypeError or ValueError for anything else."""
        return cls(int(metadata["size"]), int(metadata["channels"]), tuple(metadata["mean"]), tuple(metadata["std"]))


def _eight_bits(image: Any) -> Any:
    """An image of a kind that converts to RGB or grey without surprises."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits of grey; wider numbers have no known range
        values = np.array(image.convert("I"))
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its numbers do not fit 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("it has numbers in floating point, whose range is not known")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


class ImageSet:
    """Images of one part with their labels; decoded once if they fit into memory, else for every batch.

    Args:
        entries: files and labels.
        reading: how they are read.
        memory: bytes that the decoded images may take.
        threads: that decode.
        report: called with the number of decoded images, if they are kept.

    Raises:
        CommandError: an image is damaged; where they are kept, all are looked at here.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        reading: Reading,
        memory: int,
        threads: int,
        report: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.paths = [path for path, _ in entries]
        self.labels = torch.tensor([label for _, label in entries])
        self.reading, self.threads = reading, threads
        self.images: Tensor | None = None
        shape = (len(entries), reading.channels, reading.size, reading.size)
        if torch.Size(shape).numel() <= memory:
            self.images = torch.empty(shape, dtype=torch.uint8)
            for number, image in enumerate(self._decoded(self.paths)):
                self.images[number] = image
                report(number + 1)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Sequence[int]) -> Tensor:
        """uint8 ``(len(index), channels, size, size)``."""
        if self.images is not None:
            return self.images[torch.as_tensor(index, dtype=torch.int64)]
        return torch.stack(list(self._decoded([self.paths[i] for i in index])))

    def _decoded(self, paths: Sequence[Path]) -> Iterable[Tensor]:
        if self.threads == 1:
            yield from map(self.reading.read, paths)
            return
        with ThreadPoolExecutor(min(self.threads, os.cpu_count() or 1)) as pool:  # decoding lets other threads run
            try:
                yield from pool.map(self.reading.read, paths)
            finally:
                pool.shutdown(cancel_futures=True)


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to an eighth of its side either way, and mirrored or not; reflections fill the border.

    Args:
        images: ``(N, C, H, W)``.
        kind: ``"both"``, ``"shift"`` for what must not be mirrored, or ``"none"``.
        generator: on the CPU.
    """
    if kind == "none":
        return images
    count, channels, height, width = images.shape
    rows = _shifted(count, height, generator)
    columns = _shifted(count, width, generator)
    if kind == "both":
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    each, channel = torch.arange(count)[:, None, None, None], torch.arange(channels)[None, :, None, None]
    return images[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _shifted(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Places ``(count, side)``, reflected at the ends."""
    most = side // 8
    places = torch.arange(side) + torch.randint(-most, most + 1, (count, 1), generator=generator)
    return torch.where(places.abs() < side, places.abs(), 2 * (side - 1) - places.abs())
