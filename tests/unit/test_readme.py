"""What README says was measured is what benchmarks/results hold."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
RESULTS = REPOSITORY / "benchmarks" / "results"
MEASURED = README.partition("## Measured")[2].partition("\n## ")[0]
# Shares are shown as percentages, bytes as MB.
SCALES = (1, 100, 1e-6)
# Figures with at least two decimals: rounder ones are bounds, sizes and versions, or agree with anything.
PRECISE = re.compile(r"(?<![\w.])(\d+\.\d{2,})(?![\w.]) ?(ms|%|s|times|→)")


def table() -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in MEASURED.splitlines() if line.startswith("|")]
    headings, _, *rows = [[cell.strip() for cell in cells] for cells in lines]
    return [dict(zip(headings, row, strict=True)) for row in rows]


def source() -> dict[str, Any]:
    """The JSON that the table names."""
    (name,) = re.findall(r"\[JSON\]\(benchmarks/results/([\w.-]+)\)", MEASURED)
    stored: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return stored


def shown(value: float, like: str) -> str:
    """A value with as many decimals as a text has."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


@pytest.mark.parametrize("row", table(), ids=lambda row: f"{row['network']} {row['engine']}")
def test_every_figure_of_the_table(row: dict[str, str]) -> None:
    config = row["network"].partition(",")[0]
    precision, _, route = row["engine"].lower().partition(", ")
    rows = source()["configs"][config]["rows"]
    (stored,) = [each for each in rows if each["precision"] == precision and route in ("", each["route"])]
    change = stored["mean_iou"] - stored["fp32_onnxruntime_mean_iou"]
    figures = {
        "mIoU": stored["mean_iou"],
        "same class": 100 * stored["agreement"],
        "GPU, ms": stored["gpu_ms_p50"],
        "MB": stored["engine_bytes"] / 1e6,
        "built in, s": stored["build_seconds"],
    }
    for heading, value in figures.items():
        text = row[heading].removesuffix(" %")
        assert shown(value, text) == text, heading
    assert float(row["change"]) == pytest.approx(change, abs=0.00005000001)
    assert row["verdict"].strip("*") == ("passed" if stored["passed"] else "failed")


def test_the_table_leaves_nothing_out() -> None:
    assert len(table()) == sum(len(config["rows"]) for config in source()["configs"].values())
    assert source()["device"]["name"] in MEASURED
    assert source()["tensorrt"] in MEASURED


@pytest.mark.parametrize("figure", sorted({text for text, _ in PRECISE.findall(README)}))
def test_every_precise_figure_is_in_the_results(figure: str) -> None:
    stored = [number for path in RESULTS.glob("*.json") for number in numbers(json.loads(path.read_text()))]
    assert any(shown(number * scale, figure) == figure for number in stored for scale in SCALES)


def test_every_result_that_is_named_exists() -> None:
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for name in re.findall(r"benchmarks/results/([\w.-]+\.json)", page.read_text(encoding="utf-8")):
            assert (RESULTS / name).is_file(), f"{page.name}: {name}"
