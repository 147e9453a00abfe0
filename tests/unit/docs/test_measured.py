"""Tables of docs that say what was measured hold what benchmarks/results do."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.conftest import REPOSITORY
from tests.results import content, numbers, shown, table_rows

DOCS = REPOSITORY / "docs"
NAMED = re.compile(r"benchmarks/results/([\w.-]+\.json)")
# Three decimals at least: rounder ones agree with anything. Differences, with a sign or "less", are computed.
PRECISE = re.compile(r"(?<![\w.+-])(\d+\.\d{3,})(?![\w.])(?! ms less)")
# Shares are shown as percentages, and some times of a batch of 8 for one image.
SCALES = (1, 100, 1 / 8)
UNET = "2026-11-21-h200-performance-2.json"
CAMVID = "2026-11-21-h200-shared.json"
CAMVID_FP32 = "2026-11-21-h200-tensorrt-8.6.0.json"


def figures() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Page, figure of a table, and the results that its section names, or else the page."""
    for name in ("benchmark.md", "performance.md"):
        page = (DOCS / name).read_text(encoding="utf-8")
        for section in re.split(r"\n(?=## )", page):
            table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
            sources = tuple(NAMED.findall(section) or NAMED.findall(page))
            yield from ((name, figure, sources) for figure in sorted(set(PRECISE.findall(table))))


@pytest.mark.parametrize(("page", "figure", "sources"), figures(), ids=lambda value: str(value) if value else "")
def test_every_precise_figure_of_a_table_is_in_the_results_that_it_names(
    page: str, figure: str, sources: tuple[str, ...]
) -> None:
    found = (number for source in sources for number in numbers(content(source)))
    assert any(shown(number * scale, figure) == figure for number in found for scale in SCALES)


def tables() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    page = (DOCS / "benchmark.md").read_text(encoding="utf-8")
    unet, camvid = page.partition("**PyTorch, FP32, FP16 and INT8")[2].split("**Latency and mIoU")
    return table_rows(unet), table_rows(camvid)


def test_torch_beside_the_engines() -> None:
    network = content(UNET)["networks"]["unet"]
    torch, tries = network["torch"]["median_ms"], network["tries"]
    measured = {
        "PyTorch eager, FP32": torch["torch eager, FP32"],
        "PyTorch eager, TF32": torch["torch eager, TF32"],
        "PyTorch eager, FP16, channels-last": torch["torch eager, FP16 channels-last"],
        "torch.compile, max-autotune, FP16, channels-last": torch["torch.compile max-autotune, FP16 channels-last"],
        "FP16 engine": tries["fp16"]["median_ms"],
        "INT8 engine": tries["int8, shared"]["median_ms"],
    }
    table = {row.pop(""): tuple(row.values()) for row in tables()[0]}
    assert "fp32" not in tries
    assert table.pop("FP32 engine") == ("not measured", "")
    slowest = measured["PyTorch eager, FP32"]
    assert table == {name: (f"{ms:.3f}", f"{slowest / ms:.1f}") for name, ms in measured.items()}


def test_latency_and_miou() -> None:
    stored_rows = {row["precision"]: row for row in content(CAMVID)["configs"]["camvid"]["rows"]}
    assert "gpu_ms" not in stored_rows["fp32"]
    earlier = {row["precision"]: row["gpu_ms_p50"] for row in content(CAMVID_FP32)["configs"]["camvid"]["rows"]}
    for row in tables()[1]:
        found = stored_rows[row["engine"].lower()]
        ms = found["gpu_ms"]["median"] if "gpu_ms" in found else earlier[row["engine"].lower()]
        change = found["mean_iou"] - found["fp32_onnxruntime_mean_iou"]
        assert (row["milliseconds"], row["mIoU"]) == (f"{ms:.3f}", f"{found['mean_iou']:.4f}")
        assert float(row["change"]) == pytest.approx(change, abs=0.00005)
        assert row["same class"] == f"{100 * found['agreement']:.2f} %"
    assert f"FP16 took {earlier['fp16']:.3f} ms" in (DOCS / "benchmark.md").read_text(encoding="utf-8")
    assert [row["engine"].lower() for row in tables()[1]] == list(stored_rows)
