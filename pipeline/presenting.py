"""Verdicts and figures as rows of text, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.metrics.latency import Estimate
from pipeline.reports import Check, Interval, OwnFigure, Throughput, Timing, ValidationReport

ABSENT = "–"
CHECK_HEADINGS = ("check", "value", "bound", "result", "worst")
TIMING_HEADINGS = (
    "candidate",
    "batch",
    "GPU median, ms",
    "times the fastest",
    "GPU p90, p99, ms",
    "to GPU, back, ms",
    "end to end p50, p90, p99, ms",
)
COST_HEADINGS = (
    "candidate",
    "ran on",
    "built in, s",
    "file, MB",
    "GPU, MB",
    "W",
    "J an image",
    "clock, MHz",
    "same class as FP32",
    "mIoU",
)
THROUGHPUT_HEADINGS = ("candidate", "batch", "streams", "images/s", "measured")
OWN_HEADINGS = ("program", "engine", "ms", "what it times")


def verdict_table(reports: Sequence[ValidationReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows, a row a precision; brackets hold 95 % intervals."""
    rows = [
        (
            report.candidate.precision,
            *headline(report).values(),
            report.candidate.ran + (", emulated" if report.candidate.emulated else ""),
            "passed" if report.passed else "FAILED",
        )
        for report in reports
    ]
    return ("precision", *headline(reports[0]), "ran on", "verdict"), rows


def headline(report: ValidationReport) -> dict[str, str]:
    """The figures that say most of a precision: of masks, or of the worst output where there are none."""
    if report.output == "tensors":
        return {
            "signal to error": report.least_signal,
            "cosine": report.least_cosine,
            "largest error": report.largest_error,
        }
    scores, drop = report.scores, report.drops.get("mean_iou")
    return {
        "mIoU": bracketed(scores.mean_iou, scores.intervals.get("mean_iou")) if scores else "no labels",
        "against FP32": bracketed(0 - drop.value, negated(drop.interval), "+.4f") if drop else ABSENT,
        "same class as FP32": ABSENT if report.agreement is None else f"{100 * report.agreement:.3f} %",
    }


def figure_table(reports: Sequence[ValidationReport]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of further figures, a column a precision: IoU by class and category, then the rest."""
    precisions = tuple(f"{report.candidate.precision}:" for report in reports)
    if reports[0].output == "tensors":
        return ("", *precisions), _output_rows(reports)
    headings = ("", "FP32 on ONNX Runtime", *precisions)
    sides = [reports[0].reference, *(report.scores for report in reports)]
    names = {"class_iou": "IoU {}", "category_iou": "IoU of category {}"}
    rows = [
        (title.format(name), *(number(getattr(side, key)[name] if side else None) for side in sides))
        for key, title in names.items()
        for name in (getattr(reports[0].scores, key) if reports[0].scores else ())
    ]
    if reports[0].scores:
        if reports[0].scores.category_iou:
            means = (number(side.mean_category_iou if side else None) for side in sides)
            rows.append(("mean IoU of categories", *means))
        rows.append(("mean Dice", *(number(side.mean_dice if side else None) for side in sides)))
        rows.append(("boundary F-score", *(number(side.mean_boundary_f if side else None) for side in sides)))
    rows.append(("boundary F-score against FP32", "", *(number(report.boundary_f) for report in reports)))
    rows.append(("flipped pixels, near-ties among them", "", *(_flips(report) for report in reports)))
    cosines = (", ".join(number(o.cosine, ".6f") for o in r.outputs.values()) for r in reports)
    decibels = (", ".join(number(o.signal_to_error_db, ".1f") for o in r.outputs.values()) for r in reports)
    rows += [
        ("cosine of the outputs", "", *cosines),
        ("signal to error of the outputs, dB", "", *decibels),
        ("largest error", "", *(report.largest_error for report in reports)),
    ]
    return headings, rows


def _output_rows(reports: Sequence[ValidationReport]) -> list[tuple[str, ...]]:
    rows = []
    for name in reports[0].outputs:
        found = [report.outputs[name] for report in reports]
        rows += [
            (f"signal to error of {name}", *(output.signal for output in found)),
            (f"cosine of {name}", *(number(output.cosine, ".6f") for output in found)),
            (f"largest error of {name}", *(number(output.max_abs, ".3g") for output in found)),
        ]
    return rows


def check_row(check: Check) -> tuple[str, ...]:
    """One bound under CHECK_HEADINGS, with its worst offender."""
    worst = str(check.offenders[0]) if check.offenders else check.worst_image or ""
    return (check.name, check.shown, check.limit, "passed" if check.passed else "failed", worst)


def timing_row(timing: Timing) -> tuple[str, ...]:
    """One candidate's latency under TIMING_HEADINGS, in ms."""
    gpu, host, copies = timing.device, timing.end_to_end, (timing.to_gpu, timing.from_gpu)
    return (
        timing.name,
        str(timing.batch),
        between(timing.median_ms),
        between(timing.ratio, ".2f"),
        f"{gpu.p90_ms:.3f}, {gpu.p99_ms:.3f}" if gpu else ABSENT,
        ", ".join(f"{copy.p50_ms:.3f}" for copy in copies if copy) or ABSENT,
        f"{host.p50_ms:.3f}, {host.p90_ms:.3f}, {host.p99_ms:.3f}",
    )


def cost_row(timing: Timing) -> tuple[str, ...]:
    """What one candidate takes, and what it gives for it, under COST_HEADINGS."""
    known, clock = timing.accuracy, timing.sm_mhz
    return (
        timing.name,
        timing.ran or ABSENT,
        number(timing.build_seconds, ".1f"),
        ABSENT if timing.bytes is None else f"{timing.bytes / 1e6:.1f}",
        ABSENT if timing.gpu_bytes is None else f"{timing.gpu_bytes / 1e6:.0f}",
        number(timing.watts, ".0f"),
        number(timing.joules, ".4f"),
        ABSENT if clock is None else f"{clock[0]} to {clock[1]}",
        ABSENT if timing.agreement is None else f"{100 * timing.agreement:.2f} %",
        number(known.mean_iou if known else None),
    )


def throughput_row(row: Throughput) -> tuple[str, ...]:
    """Under THROUGHPUT_HEADINGS."""
    measured = "on the GPU alone" if row.clock == "GPU" else "with copies"
    return (row.name, str(row.batch), str(row.streams), f"{row.images_per_second:.1f}", measured)


def own_row(figure: OwnFigure) -> tuple[str, ...]:
    """Under OWN_HEADINGS."""
    return (figure.tool, figure.name, f"{figure.median_ms:.3f}", f"{figure.what} ({figure.count} times)")


def between(value: Estimate | None, form: str = ".3f") -> str:
    """A median and its interval."""
    return ABSENT if value is None else f"{value.median:{form}} ({value.low:{form}} to {value.high:{form}})"


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
