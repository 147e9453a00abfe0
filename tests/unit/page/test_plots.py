"""Histograms and bars as paths, and the figures behind them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.metrics.latency import estimate, summarise
from pipeline.page.plots import along, columns, lengths, rates, steps
from pipeline.reports import Throughput, Timing


def test_steps() -> None:
    assert steps((0, 2, 1)) == "M0 100V100h1V0h1V50h1V100Z"
    assert (
        steps((0, 99, 9), logarithmic=True) == f"M0 100V100h1V0h1V{100 * (1 - math.log(10) / math.log(100)):g}h1V100Z"
    )
    assert steps((0, 0)) == steps(()) == ""


@pytest.mark.parametrize(("value", "place"), [(1, 0), (2, 25), (5, 100), (9, 100), (-3, 0)])
def test_along(value: float, place: float) -> None:
    assert along(value, 1, 5) == place
    assert along(value, 3, 3) == 0


def test_columns() -> None:
    assert columns((5, 10), 10) == "M0.1 100V50h0.8V100ZM1.1 100V0h0.8V100Z"


def timing(name: str, *, gpu: float | None, host: float) -> Timing:
    rounds = estimate([gpu, 1.25 * gpu, 1.5 * gpu] * 4) if gpu else None
    summary = summarise(np.linspace(host, 2 * host, 101))
    return Timing(name, 1, None, summary if gpu else None, summary, rounds)


def test_lengths_are_sorted_and_know_the_longest() -> None:
    timings = (timing("slow", gpu=2, host=3), timing("quick", gpu=1, host=2), timing("CPU", gpu=None, host=40))
    alone, whole = lengths(timings)
    assert [(row.name, row.ms, row.low, row.high) for row in alone.rows] == [
        ("quick", 1.25, 1.0, 1.5),
        ("slow", 2.5, 2.0, 3.0),
    ]
    assert alone.longest == 3
    assert [(row.name, row.ms, row.low) for row in whole.rows] == [("quick", 3, 3), ("slow", 4.5, 4.5), ("CPU", 60, 60)]
    assert whole.longest == whole.rows[-1].high == pytest.approx(79.6)
    (only,) = lengths(timings[2:])
    assert only.title.startswith("From host array")


def test_rates_vary_over_streams_or_batches() -> None:
    found = rates(
        [
            Throughput("int8", 8, 1, 900, "GPU"),
            Throughput("int8", 1, 1, 1000, "GPU"),
            Throughput("int8", 4, 1, 300, "host"),
            Throughput("int8", 4, 2, 500, "host"),
            Throughput("CPU", 1, 1, 30, "host"),
            Throughput("CPU", 2, 1, 31, "host"),
        ]
    )
    assert [(one.name, one.clock, one.over, one.labels, one.best.images_per_second) for one in found] == [
        ("int8", "GPU", "batch", (1, 8), 1000),
        ("int8", "host", "streams", (1, 2), 500),
        ("CPU", "host", "batch", (1, 2), 31),
    ]
