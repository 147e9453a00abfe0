"""What README says was measured is what benchmarks/results hold."""

import re
from collections.abc import Iterator
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


TABLE, REFINED, EARLIER = re.findall(r"\(benchmarks/results/([\w.-]+)\)", MEASURED)


def rows() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Network, engine and row; a network is named in its first row."""
    network = ""
    for row in table_rows(MEASURED):
        network = row["network"].partition(",")[0] or network
        yield network, row["engine"].lower(), row


def stored_row(network: str, engine: str, name: str = TABLE) -> dict[str, Any]:
    (found,) = (each for each in content(name)["configs"][network]["rows"] if each["precision"] == engine)
    return dict(found)


@pytest.mark.parametrize(
    ("network", "engine", "row"), rows(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_figure_of_the_table(network: str, engine: str, row: dict[str, str]) -> None:
    precision, _, refined = engine.partition(", ")
    stored = content(REFINED)["engines"][precision] if refined else stored_row(network, precision)
    times = {"gpu_ms": stored["median_ms"], "build_seconds": stored["build_seconds"]} if refined else stored
    if "gpu_ms" not in times:
        times = {**stored, "gpu_ms": {"median": stored_row(network, precision, EARLIER)["gpu_ms_p50"]}}
    fp32 = stored_row(network, "fp32")["fp32_onnxruntime_mean_iou"]
    figures = {
        "mIoU": stored["mean_iou"],
        "same class": 100 * stored["agreement"],
        "GPU, ms": times["gpu_ms"]["median"],
        "built in, s": times["build_seconds"],
    }
    for heading, value in figures.items():
        text = row[heading].removesuffix(" %")
        assert shown(value, text) == text, heading
    assert float(row["change"]) == pytest.approx(stored["mean_iou"] - fp32, abs=0.00005000001)
    assert row["verdict"] == ("passed" if stored["passed"] else "**failed**")


@pytest.mark.parametrize(("network", "engine", "row"), [each for each in rows() if each[2]["INT8 over FP16"]])
def test_speed_of_int8(network: str, engine: str, row: dict[str, str]) -> None:
    figure, _, worthwhile = row["INT8 over FP16"].partition(", ")
    if "refined" in engine:
        speedup = content(REFINED)["int8_over_fp16"]["median"]
    else:
        speedup = stored_row(network, "fp16")["gpu_ms"]["median"] / stored_row(network, "int8")["gpu_ms"]["median"]
    assert f"{speedup:.2f}" == figure
    assert worthwhile == ("" if speedup > 1 else "**not worthwhile**")


def test_the_table_leaves_nothing_out() -> None:
    told = [(network, engine) for network, engine, _ in rows() if "refined" not in engine]
    assert told == [(name, precision) for name in content(TABLE)["configs"] for precision in ("fp32", "fp16", "int8")]
    for name in (TABLE, REFINED, EARLIER):
        assert content(name)["device"]["name"] in MEASURED
        assert content(name)["tensorrt"] in MEASURED


@pytest.mark.parametrize("figure", sorted({text for text, _ in PRECISE.findall(README)}))
def test_every_precise_figure_is_in_the_results(figure: str) -> None:
    stored = [number for path in RESULTS.glob("*.json") for number in numbers(content(path.name))]
    assert any(shown(number * scale, figure) == figure for number in stored for scale in SCALES)


def test_every_result_that_is_named_exists() -> None:
    for page in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for name in re.findall(r"benchmarks/results/([\w.-]+\.json)", page.read_text(encoding="utf-8")):
            assert (RESULTS / name).is_file(), f"{page.name}: {name}"
