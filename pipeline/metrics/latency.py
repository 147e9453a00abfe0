"""Figures of a series of latencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

CONFIDENCE = 0.95
LATENCY_BINS = 32


@dataclass(frozen=True)
class Estimate:
    """A median with the interval that holds the true one with probability ``confidence`` at least."""

    median: float
    low: float
    high: float
    confidence: float

    @property
    def spread(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class LatencySummary:
    """Of ``count`` latencies, all in milliseconds.

    Attributes:
        counts: of latencies in 32 equal bins from ``min_ms`` to ``p99_ms``; what is slower is in none. Empty where the
            two are equal.
    """

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float
    counts: tuple[int, ...] = ()


def summarise(milliseconds: NDArray[np.floating]) -> LatencySummary:
    """Percentiles by linear interpolation.

    Args:
        milliseconds: float (n,), n of at least 1.
    """
    if not milliseconds.size:
        raise ValueError("no latencies to summarise")
    p50, p90, p99 = (float(v) for v in np.percentile(milliseconds, (50, 90, 99)))
    low = float(milliseconds.min())
    counts = np.histogram(milliseconds, LATENCY_BINS, (low, p99))[0] if low < p99 else np.zeros(0, np.int64)
    return LatencySummary(
        milliseconds.size,
        float(milliseconds.mean()),
        p50,
        p90,
        p99,
        low,
        float(milliseconds.max()),
        tuple(counts.tolist()),
    )


def estimate(values: Sequence[float] | NDArray[np.floating]) -> Estimate:
    """The median, and the order statistics that hold the true one with probability ``CONFIDENCE`` at least.

    Nothing is assumed of the distribution but that the values are independent. Below six values there is no such pair:
    then it is the whole range, with the smaller probability of that.

    Source: H. A. David, H. N. Nagaraja, Order Statistics (2003), section 7.1.

    Args:
        values: at least one.
    """
    ordered, count = sorted(float(value) for value in values), len(values)
    if not ordered:
        raise ValueError("no values to estimate a median from")
    # Of the pairs (r-th smallest, r-th largest), ``outside`` is the probability that one side misses the median.
    rank, outside = 1, 0.5**count
    while rank < count / 2 and 2 * (wider := outside + math.comb(count, rank) * 0.5**count) <= 1 - CONFIDENCE:
        rank, outside = rank + 1, wider
    return Estimate(float(np.median(ordered)), ordered[rank - 1], ordered[count - rank], 1 - 2 * outside)
