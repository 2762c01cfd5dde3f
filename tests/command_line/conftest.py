"""Small folders of images, and one compressed model that several tests look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tersor.command_line import main

SIDE = 16
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
RECIPE = """
[[rule]]
FakeQuantize = { bits = 4, method = "lts" }
NMSparse = { n = 2, m = 4 }
Freeze = { every = 2, tile = [8, 8] }
"""
# The smallest ResNet-20 of which 4 divides all channels, on steps of six images.
SMALL = ["--model", "resnet20", "--option", "width=8", "--size", str(SIDE), "--batch-size", "6", "--threads", "1"]


def write_images(folder: Path, count: int, classes: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> Path:
    """Noisy images of one colour in a folder for each class."""
    np, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = random.normal(0, 40, (SIDE + 4, SIDE, 3))
            values = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            image.fromarray(values).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The commands set their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, with train and test."""
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", 8)
    write_images(root / "test", 4, seed=1)
    return root


@pytest.fixture(scope="session")
def arguments(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Those of a small ``tersor compress`` into a folder."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    recipe.write_text(RECIPE)

    def build(output: Path, *more: str) -> list[str]:
        common = ["--data", str(data), "--recipe", str(recipe), "--epochs", "3", "--output", str(output)]
        return ["compress", *SMALL, *common, *more]

    return build


@pytest.fixture(scope="session")
def small(arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one run."""
    output = tmp_path_factory.mktemp("small")
    assert main(arguments(output)) == 0
    return output
