"""Small plots: SVG paths, and the figures that they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.reports import Throughput, Timing

HEIGHT = 100
BAR = 0.8  # of the room that each has


@dataclass(frozen=True)
class Length:
    """One candidate's milliseconds, and the range beside them."""

    name: str
    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Lengths:
    """Candidates by one clock, fastest first; ``longest`` is what the plot has to hold."""

    title: str
    rows: tuple[Length, ...]

    @property
    def longest(self) -> float:
        return max(row.high for row in self.rows)


@dataclass(frozen=True)
class Rates:
    """One candidate's images a second, as far as one thing varies.

    Attributes:
        over: what that is.
        clock: as of ``Throughput``.
        rows: in the order of what varies.
    """

    name: str
    over: Literal["batch", "streams"]
    clock: Literal["GPU", "host"]
    rows: tuple[Throughput, ...]

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(row.batch if self.over == "batch" else row.streams for row in self.rows)

    @property
    def best(self) -> Throughput:
        return max(self.rows, key=lambda row: row.images_per_second)


def lengths(timings: Sequence[Timing]) -> tuple[Lengths, ...]:
    """Latencies: on the GPU alone with the interval of their median, and end to end with their 99th percentile."""
    alone = [
        Length(one.name, one.median_ms.median, one.median_ms.low, one.median_ms.high)
        for one in timings
        if one.median_ms is not None
    ]
    whole = [Length(one.name, one.end_to_end.p50_ms, one.end_to_end.p50_ms, one.end_to_end.p99_ms) for one in timings]
    titled = (
        ("On the GPU alone: median of the rounds, and its interval", alone),
        ("From host array to host array: median, and up to the 99th percentile", whole),
    )
    return tuple(Lengths(title, tuple(sorted(rows, key=lambda row: row.ms))) for title, rows in titled if rows)


def rates(throughput: Sequence[Throughput]) -> tuple[Rates, ...]:
    """Throughput by candidate and clock, over streams where they vary and else over batches."""
    found = []
    for name, clock in dict.fromkeys((row.name, row.clock) for row in throughput):
        rows = [row for row in throughput if (row.name, row.clock) == (name, clock)]
        over: Literal["batch", "streams"] = "streams" if len({row.streams for row in rows}) > 1 else "batch"
        ordered = sorted(rows, key=lambda row: (row.streams, row.batch))
        found.append(Rates(name, over, clock, tuple(ordered)))
    return tuple(found)


def columns(values: Sequence[float], highest: float) -> str:
    """Bars as one path, ``len(values)`` wide and 100 high, the origin in the upper left corner.

    Args:
        highest: the value of a full height, above 0.
    """
    gap = (1 - BAR) / 2
    tops = (round(HEIGHT * (1 - value / highest), 1) for value in values)
    return "".join(f"M{place + gap:g} {HEIGHT}V{top:g}h{BAR:g}V{HEIGHT}Z" for place, top in enumerate(tops))


def steps(counts: Sequence[int], *, logarithmic: bool = False) -> str:
    """A histogram as one closed path, ``len(counts)`` wide and 100 high, the origin in the upper left corner.

    Args:
        logarithmic: heights by log(1 + count).
    """
    heights = [math.log1p(count) if logarithmic else float(count) for count in counts]
    highest = max(heights, default=0.0)
    if not highest:
        return ""
    tops = (round(HEIGHT * (1 - height / highest), 1) for height in heights)
    return f"M0 {HEIGHT}" + "".join(f"V{top:g}h1" for top in tops) + f"V{HEIGHT}Z"


def along(value: float, low: float, high: float) -> float:
    """Where a value lies between low and high, in percent, at most 100 and at least 0."""
    return 0.0 if high <= low else min(max(100 * (value - low) / (high - low), 0.0), 100.0)
