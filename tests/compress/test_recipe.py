"""Recipes: what they take, what they refuse and say, and that their text means the same."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from compressed import COMPOSITIONS, KINDS, PAIRS, refused_pairs
from torch import nn

from tersor.compress import Binarize, FakeQuantize, Freeze, NMSparse, Recipe, Rule, WindowAttentionByIndex, recipe
from tersor.compress.recipe import as_recipe

TEXT = """
skip_last = false

[[rule]]
FakeQuantize = { bits = 3, method = "lts" }
NMSparse = { n = 2, m = 4 }
Freeze = { tile = [8, 16] }

[[rule]]
layers = ["*.proj", "head"]
exclude = "*.3.*"
FakeQuantize = { bits = 8, input_bits = 32 }
"""
MEANING = Recipe(
    Rule(FakeQuantize(3, method="lts"), NMSparse(2, 4), Freeze(tile=(8, 16))),
    Rule(FakeQuantize(8, 32), layers=["*.proj", "head"], exclude="*.3.*"),
    skip_last=False,
)


def test_toml_as_text_as_path_and_as_a_path_in_a_string(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    assert Recipe.from_toml(TEXT) == Recipe.from_toml(path) == Recipe.from_toml(str(path)) == MEANING
    path = path.rename(tmp_path / "recipe.txt")
    assert Recipe.from_toml(path) == MEANING


@pytest.mark.parametrize("transforms", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_every_composition_comes_back_from_its_dictionary(transforms: tuple[Any, ...]) -> None:
    made = Recipe(Rule(*transforms, layers=["a", "b.*"], exclude="b.c"), Rule(WindowAttentionByIndex()))
    assert Recipe.from_dict(made.to_dict()) == made
    assert made.rules[0].transforms == transforms


def test_a_recipe_is_also_a_transform_a_rule_or_several() -> None:
    quantize, sparse = FakeQuantize(4), NMSparse(2, 4)
    rule = Rule(quantize, sparse)
    assert as_recipe("here", quantize) == Recipe(quantize)
    assert as_recipe("here", [quantize, sparse]) == as_recipe("here", rule) == Recipe(quantize, sparse) == Recipe(rule)
    assert as_recipe("here", MEANING) is MEANING
    with pytest.raises(TypeError, match="here: recipe must be a Recipe, rules or transforms, got str"):
        as_recipe("here", "lsq")
    with pytest.raises(TypeError, match="recipe must be a Recipe, rules or transforms, got int"):
        as_recipe("here", 4)


def test_predicates_have_no_text() -> None:
    for options in ({"layers": lambda name, _: True}, {"exclude": lambda name, _: True}):
        with pytest.raises(TypeError, match="rules must go by names, got a predicate"):
            Recipe(Rule(FakeQuantize(4), **options)).to_dict()


def test_patterns_predicates_and_names_that_look_like_patterns() -> None:
    layer = nn.Linear(2, 2)
    rule = Rule(FakeQuantize(4), layers=["*.proj", "blocks.?.fc", "heads[a]"], exclude=["first.*"])
    for name in ("x.proj", "x.y.proj", "blocks.1.fc", "heads[a]", "headsa"):
        assert rule.matches(name, layer)
    for name in ("proj", "first.proj", "blocks.12.fc", "X.PROJ", "headsb"):
        assert not rule.matches(name, layer)
    assert rule.exact_names == ()
    assert Rule(FakeQuantize(4), layers=["a.b", "c*"]).exact_names == ("a.b",)
    assert Rule(FakeQuantize(4), layers=lambda name, module: module is layer).matches("any", layer)
    assert not Rule(FakeQuantize(4), exclude=lambda name, _: name == "a").matches("a", layer)


def test_the_table_of_pairs_is_complete() -> None:
    named = {pair for names in COMPOSITIONS for pair in PAIRS if set(pair) <= set(names.replace(",", "+").split("+"))}
    assert named == PAIRS
    assert len(PAIRS) + len(refused_pairs()) == len(KINDS) * (len(KINDS) + 1) // 2


@pytest.mark.parametrize("pair", sorted(PAIRS), ids="+".join)
def test_pairs_that_go_together_do_so_in_either_order(pair: tuple[str, str]) -> None:
    first, second = (KINDS[name] for name in pair)
    assert Rule(first, second).transforms == (first, second)
    assert Rule(second, first).transforms == (second, first)


@pytest.mark.parametrize(("first", "second", "reason"), refused_pairs())
def test_all_other_pairs_are_refused_with_the_reason(first: str, second: str, reason: str) -> None:
    for pair in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=f"Rule: .*{reason}"):
            Rule(*(KINDS[name] for name in pair))


@pytest.mark.parametrize("others", [(), ("lsq",), ("lbc",), ("lsq", "lbc"), ("ddtb", "srste")])
def test_freezing_needs_levels_that_it_can_tell(others: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Freeze must come with FakeQuantize\\(method='lts'\\), got"):
        Rule(KINDS["freeze"], *(KINDS[name] for name in others))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FakeQuantize(1), ValueError, "bits must be 2 to 8 for method 'lsq', got 1"),
        (lambda: FakeQuantize(9), ValueError, "bits must be 2 to 8"),
        (lambda: FakeQuantize(8, method="lts"), ValueError, "bits must be 2 to 7 for method 'lts', got 8"),
        (lambda: FakeQuantize(4.0), TypeError, "bits must be an int, got float"),
        (lambda: FakeQuantize(True), TypeError, "bits must be an int, got bool"),
        (lambda: FakeQuantize(4, 16), ValueError, "input_bits must be 2 to 8, 32 or None, got 16"),
        (lambda: FakeQuantize(4, method="pact"), ValueError, "method must be one of lsq, ddtb, lts, got 'pact'"),
        (lambda: FakeQuantize(4, percentile=50), ValueError, "percentile must be above 50"),
        (lambda: FakeQuantize(4, percentile=float("nan")), ValueError, "percentile must be above 50"),
        (lambda: FakeQuantize(4, percentile="99"), TypeError, "percentile must be a number, got str"),
        (lambda: NMSparse(4, 4), ValueError, "1 <= n < m <= 16, got 4:4"),
        (lambda: NMSparse(8, 16), ValueError, "8:16 has 12870 combinations"),
        (lambda: NMSparse(2, 4, end=0), ValueError, "end must be above 0"),
        (lambda: NMSparse(2, 4, power=0), ValueError, "power must be at least 1, got 0"),
        (lambda: NMSparse(2, 4, decay=-1.0), ValueError, "decay must be finite and at least 0"),
        (lambda: NMSparse(2, 4, decay=float("inf")), ValueError, "decay must be finite and at least 0"),
        (lambda: NMSparse(2, 4, method="magnitude"), ValueError, "method must be one of lbc, srste"),
        (lambda: Freeze(warmup=1.0), ValueError, "warmup must be below 1 for growth 'linear', got 1.0"),
        (lambda: Freeze(growth="cosine"), ValueError, "growth must be one of fixing, linear, sine"),
        (lambda: Freeze(granularity="row"), ValueError, "granularity must be one of element, tile, channel, layer"),
        (lambda: Freeze(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: Freeze(tile=64), TypeError, "tile must be two ints, got int"),
        (lambda: Freeze(tile=(0, 4)), ValueError, "tile must be two sizes of at least 1"),
        (lambda: Freeze(momentum=1), ValueError, "momentum must be from 0 to below 1"),
        (lambda: Freeze(rate="fast"), TypeError, "rate must be a number, got str"),
        (lambda: Binarize("dorefa"), ValueError, "method must be one of recu, reste, ste, approx, got 'dorefa'"),
        (lambda: Rule(), ValueError, "Rule: transforms must not be empty"),
        (lambda: Rule("lsq"), TypeError, "transforms must be of FakeQuantize, .*, got str"),
        (lambda: Rule(FakeQuantize), TypeError, "transforms must be of FakeQuantize, .*, got type"),
        (lambda: Rule(FakeQuantize(4), layers=()), ValueError, "layers must not be empty"),
        (lambda: Rule(FakeQuantize(4), layers=3), TypeError, "layers must be names, a predicate, or none, got 3"),
        (lambda: Rule(FakeQuantize(4), exclude=[1]), TypeError, "exclude must be names, a predicate, or none"),
        (lambda: Recipe(), ValueError, "rules must not be empty"),
        (lambda: Recipe(Rule(FakeQuantize(4)), NMSparse()), TypeError, "Rule objects, or transforms only, got both"),
        (lambda: Recipe(FakeQuantize(4), skip_first=1), TypeError, "skip_first must be a bool, got int"),
    ],
)
def test_wrong_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("rule = [", ValueError, "recipe: not TOML"),
        ("", ValueError, "recipe: Recipe: rules must not be empty"),
        ("skip = true", ValueError, "keys must be of skip_first, skip_last, rule, got skip"),
        ("rule = 3", TypeError, "rule must be a list of tables"),
        ("[rule]\nFakeQuantize = {}", TypeError, r"rule must be a list of tables \(\[\[rule\]\] in TOML\)"),
        (
            "[[rule]]\nQuantize = {}",
            ValueError,
            "rule 1: keys must be of layers, exclude, FakeQuantize, .*got Quantize",
        ),
        ("[[rule]]\nFakeQuantize = 4", TypeError, "rule 1: FakeQuantize must be a table of options, got 4"),
        ("[[rule]]\nFakeQuantize = {bit = 4}", ValueError, "rule 1: FakeQuantize: keys must be of bits, .*got bit"),
        ("[[rule]]\nFakeQuantize = {bits = 4.5}", TypeError, "rule 1: FakeQuantize: .*bits must be an int, got float"),
        ("[[rule]]\nFakeQuantize = {}\n[[rule]]\nlayers = 'a'", ValueError, "rule 2: Rule: transforms must not be"),
        ("[[rule]]\nFakeQuantize = {}\nlayers = 4", TypeError, "rule 1: Rule: layers must be names"),
        ("[[rule]]\nFreeze = {}", ValueError, "rule 1: Rule: Freeze must come with"),
        ("skip_first = 'no'\n[[rule]]\nFakeQuantize = {}", TypeError, "skip_first must be a bool, got str"),
    ],
)
def test_wrong_text_is_told_by_rule_and_key(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Recipe.from_toml(text)


def test_files_that_are_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recipe.from_toml("nowhere.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b"# \xe9\n")
    with pytest.raises(ValueError, match=r"latin\.toml: not TOML"):
        Recipe.from_toml(path)
    path.write_text("[[rule]]\nFakeQuantize = {bits = 1}")
    with pytest.raises(ValueError, match=r"latin\.toml: rule 1: FakeQuantize: .*bits must be 2 to 8"):
        Recipe.from_toml(path)
    for wrong in (None, 3, b"x"):
        with pytest.raises(TypeError, match="source must be a path or text"):
            Recipe.from_toml(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="recipe must be a table, got list"):
        Recipe.from_dict([])  # type: ignore[arg-type]


def test_python_3_10_reads_toml_by_tomli(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has the same interface: here the one that is there stands in for it, in a copy of the module."""
    imported, own = [], builtins.__import__

    def watch(name: str, *args: Any, **options: Any) -> Any:
        imported.append(name)
        return own(name, *args, **options)

    spec = importlib.util.spec_from_file_location("recipe_of_3_10", recipe.__file__)
    assert spec is not None
    assert spec.loader is not None
    old = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recipe_of_3_10", old)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tomli", recipe.tomllib)
        patch.setattr(sys, "version_info", (3, 10, 0))
        patch.setattr(builtins, "__import__", watch)
        spec.loader.exec_module(old)
    assert "tomli" in imported
    assert "tomllib" not in imported
    assert old.Recipe.from_toml(TEXT).to_dict() == MEANING.to_dict()
