"""What people read of a verdict: the page's and the terminal's tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import Tolerance
from pipeline.presenting import CHECK_HEADINGS, check_row, figure_table, percent, verdict_table
from pipeline.reports import Candidate, Check, OutputErrors, ValidationReport
from pipeline.stages.report import Inputs, write_report
from tests.unit.stages.test_validate import CARD, MASK, Constant, dataset, judge, logits_of


def tensors_report(outputs: dict[str, OutputErrors]) -> ValidationReport:
    what = Candidate("int8", True, "a stand-in", "0", None, None)
    return ValidationReport(
        what, True, (), (), None, 0.0, 0.0, 1.0, None, None, (), (), 0.0, output="tensors", outputs=outputs
    )


@pytest.fixture
def verdict(tmp_path: Path) -> ValidationReport:
    other = MASK.copy()
    other[0, 0] = 1
    return judge(Constant(logits_of(other)), dataset(MASK, other, MASK), tmp_path)


def test_terminal_tables(verdict: ValidationReport) -> None:
    headings, (shown,) = verdict_table([verdict])
    row = dict(zip(headings, shown, strict=True))
    assert row["mIoU"].startswith("0.9")
    assert " [" in row["mIoU"]
    assert row["verdict"] == "FAILED"
    headings, rows = figure_table([verdict])
    assert headings[-1] == "int8:"
    assert ("IoU rare", "–", "–") in rows
    assert ("flipped pixels, near-ties among them", "", "3, 0") in rows
    checks = [dict(zip(CHECK_HEADINGS, check_row(check), strict=True)) for check in verdict.checks]
    assert {c["worst"] for c in checks if c["result"] == "failed"} >= {"image 0 0.9375"}


def test_tables_without_labels(tmp_path: Path) -> None:
    free = Tolerance(atol=1, rtol=1, min_agreement=0, max_miou_drop=None)
    report = judge(Constant(logits_of(MASK)), dataset(None, None), tmp_path, free)
    assert verdict_table([report])[1][0][1:3] == ("no labels", "–")
    assert not any(row[0].startswith("IoU") for row in figure_table([report])[1])


def test_page_shows_intervals_and_absent_classes(verdict: ValidationReport, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    page = write_report(Inputs(CARD, {"int8": verdict}), folder).read_text()
    assert verdict.scores is not None
    bounds = verdict.scores.intervals["mean_iou"]
    assert f"{verdict.scores.mean_iou:.4f} [{bounds.low:.4f}, {bounds.high:.4f}]" in page
    absent = page[page.index("rare</th>") :].partition("</tr>")[0]
    assert absent.count("<td>–</td>") == 2
    assert "near-tie" in page
    # Nothing but the verdict was given.
    for sentence in ("No pictures were drawn", "Not measured.", "The network was not drawn", "Not calibrated"):
        assert sentence in page


def test_budgets(verdict: ValidationReport, tmp_path: Path) -> None:
    checks = {check.name: check for check in verdict.checks}
    agreement = checks["agreement with FP32's masks"]
    assert agreement.at_least
    assert agreement.used is None  # a bound of 1 leaves no budget
    assert replace(agreement, value=0.99, bound=0.96).used == pytest.approx(0.25)
    drop = replace(checks["mIoU drop"], value=0.002, bound=0.01)
    assert not drop.at_least
    assert drop.used == pytest.approx(0.2)
    assert replace(drop, value=-0.1).used == 0
    assert replace(drop, value=None).used is None
    signal = Check("signal to error of output a, dB", 60.0, 40.0, True, at_least=True, decibels=True)
    assert signal.used == pytest.approx(0.1)
    assert replace(signal, value=34.0).used == pytest.approx(2, abs=0.01)
    assert [check.limit for check in (signal, drop)] == ["at least 40", "at most 0.01"]


def test_signals_of_outputs() -> None:
    exact = OutputErrors(0.0, 0.0, {}, 1.0, None, {}, {}, None)
    noisy, quiet = (replace(exact, signal_to_error_db=decibels) for decibels in (30.04, 71.0))
    broken = replace(exact, max_abs=None, cosine=None, not_finite={"a": 7})
    assert [found.signal for found in (exact, noisy, quiet, broken)] == ["no error", "30.0 dB", "71.0 dB", "not finite"]
    for outputs, least, largest in (
        ((exact, exact), "no error", "0"),
        ((quiet, noisy, exact), "30.0 dB", "0"),
        ((noisy, broken, exact), "not finite", "not finite"),
    ):
        report = tensors_report(dict(zip("abc", outputs, strict=False)))
        assert (report.least_signal, report.largest_error) == (least, largest)
        assert verdict_table([report])[1][0][1] == least
        assert figure_table([report])[1][0] == ("signal to error of a", outputs[0].signal)
    assert [percent(share) for share in (0, 0.001, 0.034, 1.5)] == ["0 %", "<1 %", "3 %", "150 %"]


def test_report_without_labels(tmp_path: Path) -> None:
    free = Tolerance(atol=1, rtol=1, min_agreement=0, max_miou_drop=None)
    report = judge(Constant(logits_of(MASK)), dataset(None, None), tmp_path, free)
    folder = tmp_path / "page"
    folder.mkdir()
    page = write_report(Inputs(CARD, {"int8": report}), folder).read_text()
    assert "not measured, as the validation images have no label maps" in page
    assert "| no labels | – |" in (folder / "report.md").read_text()
