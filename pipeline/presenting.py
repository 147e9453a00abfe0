"""Verdicts as rows of text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.reports import Check, Interval, ValidationReport

ABSENT = "–"
VERDICT_HEADINGS = ("precision", "mIoU", "against FP32", "same class as FP32", "ran on", "verdict")
CHECK_HEADINGS = ("check", "value", "bound", "result", "worst")


def verdict_row(report: ValidationReport) -> tuple[str, ...]:
    """One precision under VERDICT_HEADINGS; brackets hold 95 % intervals."""
    scores, drop = report.scores, report.drops.get("mean_iou")
    return (
        report.candidate.precision,
        bracketed(scores.mean_iou, scores.intervals.get("mean_iou")) if scores else "no labels",
        bracketed(0 - drop.value, negated(drop.interval), "+.4f") if drop else ABSENT,
        f"{100 * report.agreement:.3f} %",
        report.candidate.ran + (", emulated" if report.candidate.emulated else ""),
        "passed" if report.passed else "FAILED",
    )


def figure_table(reports: Sequence[ValidationReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of further figures, a column a precision: IoU by class and category, then the rest."""
    headings = ("", "FP32 on ONNX Runtime", *(f"{report.candidate.precision}:" for report in reports))
    sides = [reports[0].reference, *(report.scores for report in reports)]
    names = {"class_iou": "IoU {}", "category_iou": "IoU of category {}"}
    rows = [
        (title.format(name), *(number(getattr(side, key)[name] if side else None) for side in sides))
        for key, title in names.items()
        for name in (getattr(reports[0].scores, key) if reports[0].scores else ())
    ]
    if reports[0].scores:
        rows.append(("mean Dice", *(number(side.mean_dice if side else None) for side in sides)))
        rows.append(("boundary F-score", *(number(side.mean_boundary_f if side else None) for side in sides)))
    rows += [
        ("boundary F-score against FP32", "", *(number(report.boundary_f) for report in reports)),
        ("flipped pixels, near-ties among them", "", *(_flips(report) for report in reports)),
        (
            "cosine of the outputs",
            "",
            *(", ".join(number(o.cosine, ".6f") for o in r.outputs.values()) for r in reports),
        ),
        ("largest error", "", *(report.largest_error for report in reports)),
    ]
    return headings, rows


def check_row(check: Check) -> tuple[str, ...]:
    """One bound under CHECK_HEADINGS, with its worst offender."""
    worst = str(check.offenders[0]) if check.offenders else check.worst_image or ""
    return (check.name, check.shown, f"{check.bound:g}", "passed" if check.passed else "failed", worst)


def _flips(report: ValidationReport) -> str:
    return ABSENT if report.flips is None else f"{report.flips.flipped}, {report.flips.near_ties}"


def number(value: float | None, form: str = ".4f") -> str:
    """A figure; absent ones as a dash."""
    return ABSENT if value is None else format(value, form)


def percent(share: float, digits: int = 0) -> str:
    """A share in percent; one that rounds to nothing as less than the last digit."""
    least = 10.0**-digits
    return f"<{least:.{digits}f} %" if 0 < 100 * share < least / 2 else f"{100 * share:.{digits}f} %"


def bracketed(value: float | None, interval: Interval | None, form: str = ".4f") -> str:
    """A figure with its interval, where it has one."""
    bounds = "" if interval is None else f" [{interval.low:{form}}, {interval.high:{form}}]"
    return number(value, form) + bounds


def negated(interval: Interval | None) -> Interval | None:
    """The interval of minus the figure."""
    return None if interval is None else Interval(0 - interval.high, 0 - interval.low)
