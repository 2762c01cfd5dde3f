"""The pages' Python blocks run as they stand and compute what the page says; links and names lead somewhere."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from subject import in_ci

import tersor
from tersor.models.eager_attention import window_attention_partition

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@contextlib.contextmanager
def working_folder(path: Path) -> Iterator[None]:
    """Pages save files, and read them again."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(path: Path) -> dict[str, Any]:
    """Runs the page's Python blocks in one namespace, which it returns; errors have the page's line numbers."""
    text, names = path.read_text(), {"__name__": path.name}
    for block in BLOCK.finditer(text):
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block[1], str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_no_python_block_is_passed_over(path: Path) -> None:
    """An indented one would be, or one with another mark; what cannot run is marked as text."""
    text = path.read_text()
    assert len(re.findall(r"```\s*(?:py|\{code)", text)) == len(BLOCK.findall(text))


@pytest.mark.parametrize("path", [p for p in PAGES if BLOCK.search(p.read_text())], ids=page_name)
def test_a_page_runs_and_computes_what_it_says(path: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with working_folder(tmp_path):
        names = run_page(path)
        for check in CHECKS.get(path.name, ()):
            check(names)


def binary_packed_layers_compute_what_the_page_says(names: dict[str, Any]) -> None:
    torch.testing.assert_close(names["model"](names["images"]), names["expected"], rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.hardtanh(names["sums"] * 0.01 + names["x"].sign())
    assert torch.equal(names["scaled"], expected)
    assert names["maps"].eq(names["maps"].round()).all()
    saved = torch.load("packed.pt", weights_only=True)
    bits = sum(t.numel() for name, t in saved.items() if name.endswith(".packed"))
    assert bits * 8 == sum(
        p.numel() for n, p in names["resnet20_recu"]().named_parameters() if ".conv" in n and p.dim() == 4
    )


def ways_to_the_same_tokens_agree(names: dict[str, Any]) -> None:
    torch.testing.assert_close(names["same"], names["kept"])
    torch.testing.assert_close(names["normalized"], names["norm"](names["kept"]))
    every = names["embed"](names["images"]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(names["chosen"], tersor.gather_tokens(every, names["patches"]), rtol=1e-4, atol=1e-4)
    whole, _ = tersor.resplit_tokens(
        names["average"], names["coarse"], every, names["reuse"], names["position"], names["cls"]
    )
    torch.testing.assert_close(names["less"], whole, rtol=1e-4, atol=1e-4)
    assert names["tokens"].shape == names["less"].shape == (2, 125, 384)


def the_batch_gets_smaller(names: dict[str, Any]) -> None:
    confidence = names["logits"].softmax(1).amax(1)
    unsure = (confidence < 0.5).nonzero()[:, 0]
    assert 0 < len(unsure) == int(names["count"]) <= len(names["rows"]) < len(unsure) + 8
    assert torch.equal(names["rows"][: len(unsure)], unsure)
    assert names["step"].losses.shape == (4,)
    assert names["fast"].shape == names["result"].logits.shape == (8, 10)


def eager(layer: tersor.WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """The published way between the layer's own projections."""
    qkv = layer.qkv(x).unflatten(3, (3, layer.num_heads, -1)).unbind(3)
    bias = layer.relative_position_bias_table
    return layer.proj(window_attention_partition(*qkv, layer.window_size, layer.shift_size, bias).flatten(3))


def swin_blocks_compute_what_the_published_way_computes(names: dict[str, Any]) -> None:
    x = names["images"]
    for block in names["blocks"]:
        torch.nn.init.normal_(block.attn.relative_position_bias_table)  # starts so small that it would not show
    assert [block.attn.shift_size for block in names["blocks"]] == [[0, 0], [3, 3]]
    with torch.no_grad():
        output = names["blocks"](x)
        for block in names["blocks"]:
            x = x + eager(block.attn, block.norm1(x))
            x = x + block.mlp(block.norm2(x))
    assert output.shape == names["features"].shape
    torch.testing.assert_close(output, x, rtol=1e-5, atol=1e-5)


def a_mask_changes_pairs_outside_only(names: dict[str, Any]) -> None:
    """The page's mask: inside, nothing changes at all; outside, rows of mixed windows do."""
    query, key, value, outside = (names[name] for name in ("query", "key", "value", "outside"))
    changed = (names["masked"] - tersor.window_attention(query, key, value, 8, 4)).abs().amax((0, 3, 4)) > 1e-6
    assert not changed[~outside[0]].any()
    assert changed[outside[0]].any()


def every_padding_keeps_the_size(names: dict[str, Any]) -> None:
    for name in ("whole", "tiled", "published"):
        assert names[name].shape == names["photograph"].shape
    assert names["table"].grad is not None


CHECKS: dict[str, tuple[Callable[[dict[str, Any]], None], ...]] = {
    "attention.md": (
        swin_blocks_compute_what_the_published_way_computes,
        a_mask_changes_pairs_outside_only,
        every_padding_keeps_the_size,
    ),
    "binary.md": (binary_packed_layers_compute_what_the_page_says,),
    "tokens.md": (ways_to_the_same_tokens_agree, the_batch_gets_smaller),
}


def prose(text: str) -> str:
    """The text without code blocks."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(path: Path) -> frozenset[str]:
    """What can stand behind a # in a link: the headings, as GitHub and the site write them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)


@pytest.mark.parametrize("path", LINKED, ids=page_name)
def test_links_within_the_repository_lead_somewhere(path: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(path.read_text()))):
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        if re.match(r"[a-z]+:", target):
            continue
        if not file.exists() or not file.is_relative_to(ROOT) or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("path", LINKED, ids=page_name)
def test_the_modules_of_the_commands_exist(path: Path) -> None:
    commands = set(re.findall(r"-m (tersor[\w.]*\w)", path.read_text()))
    assert not [name for name in commands if importlib.util.find_spec(runnable(name)) is None]


def runnable(name: str) -> str:
    """What ``python -m`` runs: of a package its ``__main__``."""
    spec = importlib.util.find_spec(name)
    return f"{name}.__main__" if spec is not None and spec.submodule_search_locations else name


def resolve(name: str) -> Any:
    """The module, or the attribute of one, that a full name means."""
    module, *rest = name.split(".")
    found: Any = importlib.import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        if not hasattr(found, part):
            importlib.import_module(module)
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("path", [p for p in LINKED if p.name != "CHANGELOG.md"], ids=page_name)
def test_the_names_that_a_page_mentions_exist(path: Path) -> None:
    """Every ```tersor.name``` outside of code blocks; behind a call's parenthesis the name ends."""
    unknown = []
    for name in re.findall(r"`(tersor(?:\.\w+)+)(?:\(.*?\))?`", prose(path.read_text())):
        try:
            resolve(name)
        except (AttributeError, ImportError):
            unknown.append(name)
    assert not unknown


@functools.cache
def api_pages() -> ModuleType:
    """What writes the site's reference."""
    spec = importlib.util.spec_from_file_location("api_pages", DOCS / "site" / "api_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["api_pages"] = module
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_public_name() -> None:
    described = api_pages().homes()
    pages = {module.__name__: api_pages().page(module, described) for module in api_pages().modules()}
    assert {"tersor", "tersor.attention", "tersor.models"} <= set(pages)
    for full, home in described.items():
        package, _, name = home.rpartition(".")
        assert re.search(rf"^\.\. auto\w+:: {name}$", pages[package], re.MULTILINE), full
        assert f"`{full.rpartition('.')[2]} <{home}>`" in pages[full.rpartition(".")[0]]


def test_every_public_name_has_a_docstring() -> None:
    subjects = {full: resolve(full) for full in api_pages().homes()}
    without = [full for full, subject in subjects.items() if callable(subject) and not inspect.getdoc(subject)]
    assert not without


@pytest.mark.timeout(600)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if not in_ci() and importlib.util.find_spec("sphinx") is None:
        pytest.skip('needs sphinx: pip install "tersor[docs]"')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", DOCS, "-d", tmp_path / "doctrees"]
    made = subprocess.run([*command, ROOT, tmp_path / "site"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "tersor" in (tmp_path / "site" / "docs" / "index.html").read_text()
