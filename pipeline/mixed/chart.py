"""Candidates as points, time against loss: inline SVG without a library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pipeline.mixed.report import Candidate, MixReport, comparable

WIDTH, HEIGHT, MARGIN = 640, 320, 56
RADIUS = 5


def chart(report: MixReport) -> str:
    """An ``<svg>`` element: milliseconds across, loss upwards; front joined, budget dashed, choice ringed.

    Candidates that were not timed are left out where others were.
    """
    points = comparable(report.candidates)
    left, right = _bounds([one.ms for one in points])
    budget = report.max_miou_drop if report.labelled else None
    if budget is None and report.min_agreement is not None:
        budget = 1 - report.min_agreement
    losses = [one.figures.loss for one in points]
    low, high = _bounds([*losses, *([budget] if budget is not None else [])])

    def at(one: Candidate) -> tuple[float, float]:
        return _across(one.ms, left, right), _up(one.figures.loss, low, high)

    front = sorted((one for one in points if one.best), key=lambda one: one.ms)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, front))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="time against loss" style="max-width: {WIDTH}px">',
        f'<path d="M{MARGIN} 10V{HEIGHT - MARGIN}H{WIDTH - 10}" fill="none" stroke="currentColor"/>',
        f'<polyline points="{path}" fill="none" stroke="#4c78a8"/>',
    ]
    if budget is not None:
        y = _up(budget, low, high)
        parts.append(
            f'<path d="M{MARGIN} {y:.1f}H{WIDTH - 10}" stroke="#e45756" stroke-dasharray="6 4"/>'
            f'<text x="{WIDTH - 10}" y="{y - 5:.1f}" text-anchor="end" fill="#e45756">budget</text>'
        )
    for one in points:
        x, y = at(one)
        says = escape(f"{one.move}: {one.ms:.4f} ms, loss {one.figures.loss:.5f}")
        ring = ' stroke="currentColor" stroke-width="3"' if one == report.choice else ""
        colour = "#54a24b" if one.kept else "#9d9d9d"
        dot = f'cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}" fill="{colour}"'
        parts.append(f"<circle {dot}{ring}><title>{says}</title></circle>")
    loss = "drop of mean IoU" if report.labelled else "share of flipped pixels"
    parts += [
        _text(MARGIN, HEIGHT - MARGIN + 18, f"{left:.4f}", "start"),
        _text(WIDTH - 10, HEIGHT - MARGIN + 18, f"{right:.4f} ms ({report.latency})", "end"),
        _text(MARGIN - 5, HEIGHT - MARGIN, f"{low:.4f}", "end"),
        _text(MARGIN - 5, 18, f"{high:.4f}", "end"),
        _text(MARGIN, HEIGHT - 12, f"across: milliseconds; upwards: {loss}", "start"),
        "</svg>",
    ]
    return "".join(parts)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1e-6
    return low - room, high + room


def _across(value: float, low: float, high: float) -> float:
    return MARGIN + (WIDTH - MARGIN - 10) * (value - low) / (high - low)


def _up(value: float, low: float, high: float) -> float:
    return HEIGHT - MARGIN - (HEIGHT - MARGIN - 10) * (value - low) / (high - low)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12" fill="currentColor">{escape(text)}</text>'
