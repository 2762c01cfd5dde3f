"""Sphinx's settings, for `make docs`. The source folder is the repository, so that pages link as they do in it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "site"))

import tersor

project = "tersor"
author = "the tersor developers"
version = release = tersor.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "extension",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/*_results/*.md",
    "docs/api/*.rst",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    "bench/results/*/table.md",
]
exclude_patterns = [".*", "build", "dist"]  # not even looked into

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub's way to write a formula
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # of torch.nn.Module, by every forward() without one
autodoc_preserve_defaults = True
napoleon_custom_sections = ["Shape"]
napoleon_use_rtype = False

mathjax_path = "mathjax/tex-chtml.js"  # see extension.py: from the site itself, not from the network

html_theme = "furo"
html_title = f"tersor {version}"
html_extra_path = ["site/index.html"]
html_copy_source = False
html_show_copyright = False
html_static_path = ["site/static"]
html_css_files = ["wide.css"]
