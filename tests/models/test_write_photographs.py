"""Patches of photographs as a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from PIL import Image

from tersor.command_line.images import list_images
from tersor.models import _textures, write_photographs


def test_the_folder_is_a_task_and_always_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        assert write_photographs.main([str(folder), "--train", "3", "--test", "2", "--size", "20"]) == 0
    assert "wrote 50 images of 10 photographs" in capsys.readouterr().out
    found, again = map(list_images, folders)
    assert found.classes == _textures.NAMES
    assert (len(found.train), len(found.test)) == (30, 20)
    for (path, _), (other, _) in zip(found.train + found.test, again.train + again.test, strict=True):
        assert path.read_bytes() == other.read_bytes()
    values = np.array(Image.open(found.train[0][0]))
    assert values.shape == (20, 20)
    assert values.std() > 10
    assert write_photographs.main([str(folders[0]), "--train", "2", "--test", "1", "--size", "20"]) == 0
    assert len(list_images(folders[0]).train) == 20  # none of the older ones is left
