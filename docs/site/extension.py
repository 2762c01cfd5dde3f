"""What the site needs besides Sphinx's own: generated pages, two directives, links from names, formulas offline."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.directives.other import TocTree
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.fileutil import copy_asset
from sphinx.util.nodes import make_refnode

import api_pages  # isort: skip  (next to this file; conf.py puts the folder on the path)

DOCS = api_pages.ROOT / "docs"
FIRST = ("concepts",)  # of the guides; the others follow by name
MATHJAX = "sphinx-mathjax-offline"  # a package whose name no import statement can say


class Pages(TocTree):
    """A table of contents of the pages of a kind that are there, see :func:`pages`."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        self.content = StringList(pages(self.arguments[0]), source="")
        return super().run()


def pages(kind: str) -> list[str]:
    """The pages of a kind: ``methods`` (of families: folders of csrc), ``migration``, ``guides`` or ``results``."""
    if kind == "results":  # by their folders, as the titles are those of machines
        folders = sorted(path.parent.name for path in (api_pages.ROOT / "bench" / "results").glob("*/table.md"))
        return [f"{name} </bench/results/{name}/table>" for name in folders]
    names = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in ("index", "benchmarks"))
    methods = [name for name in names if (api_pages.ROOT / "csrc" / name).is_dir()]
    migration = [name for name in names if name.startswith("migration")]
    guides = [name for name in names if name not in {*methods, *migration, *FIRST}]
    return {"methods": methods, "migration": migration, "guides": [*FIRST, *guides]}[kind]


class BenchResults(SphinxDirective):
    """The committed results of benchmarks: on which machine, when, of which commit."""

    def run(self) -> list[nodes.Node]:
        rows = [["measured on", "what", "torch", "of"], ["---"] * 4]
        for path in sorted((api_pages.ROOT / "bench" / "results").glob("*/results.json")):
            self.env.note_dependency(str(path))
            content = json.loads(path.read_text())
            machine = content["machine"]
            operators = sorted({group["operator"] for group in content["groups"].values()})
            table = f"/bench/results/{path.parent.name}/table.md"
            rows.append(
                [
                    f"[{machine.get('gpu') or machine['processor']}, {machine['threads']} threads]({table})",
                    ", ".join(f"`{name}`" for name in operators),
                    machine["torch"],
                    f"{machine['date'].split()[0]}, commit `{machine['commit']}`",
                ]
            )
        return self.parse_text_to_nodes("\n".join("| " + " | ".join(row) + " |" for row in rows))


class LinkNames(SphinxPostTransform):
    """Makes a link of every ```tersor.name``` in the text that the reference describes."""

    default_priority = 5

    def run(self, **options: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            match = re.fullmatch(r"(tersor(?:\.\w+)+)(?:\(.*\))?", literal.astext())
            if match and not isinstance(literal.parent, (nodes.reference, nodes.title)):
                link = _link(self.app, self.env.docname, match[1], literal.deepcopy())
                if link is not None:
                    literal.replace_self(link)


def _link(app: Sphinx, docname: str, name: str, text: nodes.Node) -> nodes.reference | None:
    entry = app.env.domains.python_domain.objects.get(app.env.tersor_homes.get(name, name))  # type: ignore[attr-defined]
    return make_refnode(app.builder, docname, entry.docname, entry.node_id, text) if entry else None


def find_reference(app: Sphinx, env: Any, node: Any, text: nodes.Node) -> nodes.reference | None:
    """Roles that name a thing as its users do (``tersor.leff``), or by its last name from another package."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    objects = env.domains.python_domain.objects
    found = [name for name, entry in objects.items() if name.endswith(f".{target}") and not entry.aliased]
    return _link(app, node["refdoc"], found[0] if len(found) == 1 else target, text)


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Only what a page loads, of 24 MB."""
    spec = importlib.util.find_spec(MATHJAX)
    if error is None and app.builder.format == "html" and spec is not None and spec.origin:
        source, target = Path(spec.origin).parent / "static" / "mathjax", app.outdir / "_static" / "mathjax"
        copy_asset(source / "tex-chtml.js", target)
        fonts = Path("output", "chtml", "fonts", "woff-v2")
        copy_asset(source / fonts, target / fonts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("pages", Pages)
    app.add_directive("bench-results", BenchResults)
    app.add_post_transform(LinkNames)
    app.connect("missing-reference", find_reference)
    app.connect("build-finished", copy_mathjax)
    api_pages.write(DOCS / "api")
    app.connect("env-before-read-docs", lambda app, env, names: setattr(env, "tersor_homes", api_pages.homes()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
