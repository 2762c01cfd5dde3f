"""Finding, splitting and reading images of all kinds, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

import numpy as np
from PIL import Image

from tersor.command_line.images import GREY, IMAGENET, ImageSet, Reading, augment, list_images
from tersor.command_line.shared import CommandError

COLOUR, BRIGHTNESS = Reading(8, 3, *IMAGENET), Reading(8, 1, *GREY)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_train_and_val_are_taken_as_they_are(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/1.png", "train/a/sub/2.JPG", "val/a/3.webp", "val/b/4.tif", "train/a/.hidden.png")
    touch(tmp_path, "train/a/notes.txt", "train/.cache/x.png")
    found = list_images(tmp_path)
    assert found.classes == ("a", "b")
    assert [(path.name, label) for path, label in found.train] == [("2.JPG", 0), ("1.png", 1)]
    assert [(path.name, label) for path, label in found.test] == [("3.webp", 0), ("4.tif", 1)]
    assert "tested on" in found.split


def test_without_a_split_names_decide_and_stay_where_they_are(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{i}.png" for name in ("a", "b") for i in range(200)))
    before = list_images(tmp_path)
    assert 50 < len(before.test) < 110  # a fifth of 400
    assert not {path for path, _ in before.test} & {path for path, _ in before.train}
    assert "by a hash of its name" in before.split
    touch(tmp_path, *(f"a/more{i}.png" for i in range(50)))
    after = list_images(tmp_path)
    assert set(before.test) <= set(after.test)
    assert set(before.train) <= set(after.train)
    assert before.digest() != after.digest()


def test_small_classes_have_an_image_in_each_part(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{name}{i}.png" for name in "abcdefgh" for i in range(2)))
    found = list_images(tmp_path)
    for part in (found.train, found.test):
        assert [label for _, label in part] == list(range(8))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "must have a folder for each class, it has none"),
        (["1.png", "2.png"], "2 images lie in it directly"),
        (["a/1.png", "a/2.png"], "at least two classes, it has only a"),
        (["a/1.png", "a/2.png", "b/notes.txt"], "b: the class has no images"),
        (["a/1.png", "b/1.png", "b/2.png"], "needs at least two images to be split, it has 1"),
        (["train/a/1.png", "train/b/1.png"], "must have train and test (or val), or a folder for each class"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"], "they differ in b, c"),
        (["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.gif"], "the class has no images"),
    ],
)
def test_folders_that_are_no_task(names: list[str], message: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(CommandError) as error:
        list_images(tmp_path)
    assert message in str(error.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="there is no such folder"):
        list_images(tmp_path / "none")


def values(side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def test_colours_and_grey_are_kept(tmp_path: Path) -> None:
    Image.fromarray(values()).save(tmp_path / "a.png")
    assert torch.equal(COLOUR.read(tmp_path / "a.png").permute(1, 2, 0), torch.from_numpy(values()))
    Image.fromarray(values()[..., 0]).save(tmp_path / "grey.png")
    expected = torch.from_numpy(values()[..., 0])
    assert torch.equal(BRIGHTNESS.read(tmp_path / "grey.png")[0], expected)
    assert torch.equal(COLOUR.read(tmp_path / "grey.png"), expected.expand(3, -1, -1))
    assert BRIGHTNESS.read(tmp_path / "a.png").shape == (1, 8, 8)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    eight = values()[..., 0]
    for name in ("sixteen.png", "sixteen.tif"):
        Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / name)
        assert torch.equal(BRIGHTNESS.read(tmp_path / name)[0], torch.from_numpy(eight)), name


def test_palettes_become_colours(tmp_path: Path) -> None:
    image = Image.fromarray(values()).quantize(4)
    image.save(tmp_path / "palette.png")
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(COLOUR.read(tmp_path / "palette.png"), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    image.paste((90, 10, 20, 0), (0, 0, 4, 8))  # hidden colours
    image.convert(mode).save(tmp_path / "some.png", **({"transparency": 0} if mode == "P" else {}))
    found = COLOUR.read(tmp_path / "some.png")
    if mode == "P":  # one colour of the palette is transparent
        assert set(found.unique().tolist()) <= set(range(256))
        assert (found == 255).all(0).any()
        return
    assert (found[:, :, :4] == 255).all()
    assert (found[:, :, 4:] == 0).all()


def test_the_orientation_of_exif_holds(tmp_path: Path) -> None:
    image = Image.fromarray(np.kron(values(2), np.ones((4, 4, 1), dtype=np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a right angle
    image.save(tmp_path / "turned.png", exif=exif)
    upright = COLOUR.read(tmp_path / "turned.png")
    image.save(tmp_path / "plain.png")
    assert torch.equal(upright, COLOUR.read(tmp_path / "plain.png").rot90(-1, (1, 2)))


def test_the_middle_of_a_wide_image_is_taken(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = values()
    Image.fromarray(wide).save(tmp_path / "wide.bmp")
    assert torch.equal(COLOUR.read(tmp_path / "wide.bmp").permute(1, 2, 0), torch.from_numpy(values()))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values(64)).save(buffer, "png")
    files = {"empty.png": b"", "text.jpg": b"no image", "cut.png": buffer.getvalue()[:2000]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CommandError) as error:
            COLOUR.read(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: cannot be read as an image: ")
    with pytest.raises(CommandError, match=r"missing\.png: cannot be read as an image"):
        COLOUR.read(tmp_path / "missing.png")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(CommandError, match="floating point"):
        COLOUR.read(tmp_path / "float.tif")


@pytest.mark.parametrize("threads", [1, 2])
def test_images_are_the_same_in_memory_and_from_files(threads: int, tmp_path: Path) -> None:
    entries = []
    for number in range(5):
        Image.fromarray(values() // (number + 1)).save(tmp_path / f"{number}.png")
        entries.append((tmp_path / f"{number}.png", number % 2))
    seen: list[int] = []
    kept, read = ImageSet(entries, COLOUR, 5 * 3 * 64, threads, seen.append), ImageSet(entries, COLOUR, 959, threads)
    assert seen == [1, 2, 3, 4, 5]
    assert kept.images is not None
    assert read.images is None
    assert torch.equal(kept.take([4, 0, 4]), read.take([4, 0, 4]))
    assert kept.labels.tolist() == [0, 1, 0, 1, 0]


def test_normalisation() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = (torch.tensor([0.0, 0.2, 1.0]) - torch.tensor(IMAGENET[0])) / torch.tensor(IMAGENET[1])
    torch.testing.assert_close(COLOUR.normalized(images).flatten(), expected)


def test_augmentation_shifts_and_mirrors_each_image_on_its_own() -> None:
    image = torch.arange(16 * 16, dtype=torch.int32).view(1, 1, 16, 16)
    images = image.expand(200, 3, 16, 16)
    padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2), mode="reflect").int()
    shifts = {padded[0, 0, i : i + 16, j : j + 16].numpy().tobytes(): 0 for i in range(5) for j in range(5)}
    for found in augment(images, "shift", torch.Generator().manual_seed(0)):
        shifts[found[0].numpy().tobytes()] += 1  # a KeyError for anything else
        assert torch.equal(found[0], found[1])
    assert min(shifts.values()) > 0
    for found in augment(images, "both", torch.Generator().manual_seed(0)):
        bytes_of = {found[0].numpy().tobytes(), found[0].flip(1).numpy().tobytes()}
        assert bytes_of & shifts.keys()
    assert augment(images, "none", torch.Generator()) is images
