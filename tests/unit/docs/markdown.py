"""The documentation as its parts: code blocks, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
SOURCE = re.compile(r'(?:src|href)="([^"]+)"')
PAGES = tuple(sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]))


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its fence, from 1."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


@cache
def tokens(page: Path) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")))


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of the languages; of all of them where none is named."""
    found = [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for page in PAGES
        for token in tokens(page)
        if token.type == "fence" and token.map
    ]
    return [block for block in found if not languages or block.language in languages]


def inline(page: Path, kind: str) -> Iterator[Token]:
    """Tokens inside paragraphs, headings and cells."""
    for token in tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    targets = [token.attrGet("href") for token in inline(page, "link_open")]
    targets += [token.attrGet("src") for token in inline(page, "image")]
    html = [token for token in tokens(page) if token.type == "html_block"]
    targets += [target for token in (*html, *inline(page, "html_inline")) for target in SOURCE.findall(token.content)]
    return [str(target) for target in targets]


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: set[str] = set()
    for before, token in zip(tokens(page), tokens(page)[1:], strict=False):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(slug if slug not in found else f"{slug}-1")
    return found
