"""The documentation site: `scripts/docs` builds it."""

import os
import re
from importlib.metadata import version as version_of
from pathlib import Path

project = "convert-oss"
author = copyright = "The convert-oss authors"
release = version = version_of("convert-oss")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
default_role = "code"  # a name in backquotes in a docstring
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes of jaxtyping are strings that sphinx takes for names; the docstrings say them
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"convert-oss {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# --- README and CHANGELOG, which lie above: copies of them are pages, and links lead to these -------------------

DOCS = Path(__file__).parent
ABOVE = {"README.md": "readme.markdown", "CHANGELOG.md": "changelog.markdown"}
source_suffix = {".md": "markdown", ".markdown": "markdown"}


def from_above(match: re.Match) -> str:
    """Where a link of a file above leads, from here."""
    target = match[1]
    return f"]({ABOVE.get(target) or (target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}')})"


for file, page in ABOVE.items():
    text = (DOCS.parent / file).read_text(encoding="utf-8")
    (DOCS / page).write_text(re.sub(r"\]\((?!https?:|#)([^)]+)\)", from_above, text), encoding="utf-8")


def to_pages(app, docname: str, source: list[str]) -> None:
    for file, page in ABOVE.items():
        source[0] = source[0].replace(f"](../{file})", f"]({page})")


def setup(app) -> None:
    app.connect("source-read", to_pages)
