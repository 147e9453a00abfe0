"""Figures in Markdown, and the files of benchmarks/results that they are held to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.conftest import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results"


def content(name: str) -> Any:
    """The content of a file of results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table_rows(text: str) -> list[dict[str, str]]:
    """The rows of the one table in a text, by its headings."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    headings, _, *cells = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(headings, row, strict=True)) for row in cells]


def shown(value: float, like: str) -> str:
    """A value with as many decimals as a text has."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def numbers(value: Any) -> Iterator[float]:
    """Every number in a file of results."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)
