"""How Sphinx builds this folder; ``make docs`` runs it. The pages stay plain Markdown, as GitHub shows them."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import pipeline

project = "unet-trt"
release = pipeline.__version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"unet-trt {release}"
html_show_copyright = False
# Anchors as GitHub makes them.
myst_heading_anchors = 4


def _read(app: Sphinx, page: str, source: list[str]) -> None:
    """Markdown outside this folder is offered as a file; index.md's lists become the navigation, by their headings."""
    source[0] = re.sub(r"\]\(((?:\.\./)+[A-Z]+\.md)\)", r"](path:\1)", source[0])
    if page != "index":
        return
    for section in re.findall(r"^## .*?(?=^## |\Z)", source[0], re.M | re.S):
        caption = section.partition("\n")[0].removeprefix("## ")
        pages = [f"{title} <{name}>" for title, name in re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", section, re.M)]
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```\n"])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
