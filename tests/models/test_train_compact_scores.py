"""The command end to end in small, what it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from tersor.models import train_compact_scores

SMALL = ["--epochs=6", "--iterations=3", "--batch-size=4", "--width=16", "--test-patches=2", "--patterns", "2:4", "4:8"]


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_compact_scores.main([*SMALL, "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert "Compact scores" in capsys.readouterr().out
    contents = json.loads((tmp_path / "compact.json").read_text())
    for pattern, count, m in (("2:4", 6, 4), ("4:8", 70, 8)):
        full, half, every = (contents[f"{pattern} {kind}"][0] for kind in ("full", "share 0.5", "share 1"))
        assert full["stored"] == [count] * 6
        assert full["bytes"] == [12 * count / m] * 3 + [8 * count / m] * 3  # frozen, without gradients
        assert half["loss"] == every["loss"]
        assert half["accuracy"] == every["accuracy"]
        assert half["bytes"][0] == full["bytes"][0]
        assert every["stored"][-1] == half["stored"][-1] == 1
        assert half["bytes"][-1] == 9 / m  # a score, its momentum, its number
        assert all(a <= b for a, b in zip(every["bytes"], half["bytes"], strict=True))
        assert len(full["returned"]) == 6
        assert half["returned"] == []
    page = (tmp_path / "compact.md").read_text()
    assert contents["about"]["commit"] in page
    assert page.count("\n| ") == 2 + 6
    assert (tmp_path / "compact.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares", "1.5"], "--shares must be from 0 to 1, got 1.5"),
        (["--patterns", "4:4"], "must be like 2:4"),
        (["--width", "24"], "--width must be a multiple of m for --patterns 1:16"),
    ],
)
def test_bad_options(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_compact_scores.main([*arguments, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err
