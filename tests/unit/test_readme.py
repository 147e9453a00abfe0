"""What README says was measured is what benchmarks/results hold."""

import re
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.results import RESULTS, content, numbers, shown, table_rows

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MEASURED = README.partition("## Measured")[2].partition("\n## ")[0]
# Shares are shown as percentages, bytes as MB.
SCALES = (1, 100, 1e-6)
# Figures with at least two decimals: rounder ones are bounds, sizes and versions, or agree with anything.
PRECISE = re.compile(r"(?<![\w.])(\d+\.\d{2,})(?![\w.]) ?(ms|%|s|times|→)")


def source() -> dict[str, Any]:
    """The JSON that the table names."""
    (name,) = re.findall(r"\[JSON\]\(benchmarks/results/([\w.-]+)\)", MEASURED)
    found: dict[str, Any] = content(name)
    return found


@pytest.mark.parametrize("row", table_rows(MEASURED), ids=lambda row: f"{row['network']} {row['engine']}")
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
    assert len(table_rows(MEASURED)) == sum(len(config["rows"]) for config in source()["configs"].values())
    assert source()["device"]["name"] in MEASURED
    assert source()["tensorrt"] in MEASURED


@pytest.mark.parametrize("figure", sorted({text for text, _ in PRECISE.findall(README)}))
def test_every_precise_figure_is_in_the_results(figure: str) -> None:
    stored = [number for path in RESULTS.glob("*.json") for number in numbers(content(path.name))]
    assert any(shown(number * scale, figure) == figure for number in stored for scale in SCALES)


def test_every_result_that_is_named_exists() -> None:
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for name in re.findall(r"benchmarks/results/([\w.-]+\.json)", page.read_text(encoding="utf-8")):
            assert (RESULTS / name).is_file(), f"{page.name}: {name}"
