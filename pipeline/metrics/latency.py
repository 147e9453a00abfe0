"""Figures of a series of latencies."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass


@dataclass(frozen=True)
class LatencySummary:
    """Of ``count`` latencies, all in milliseconds."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


def summarise(milliseconds: NDArray[np.floating]) -> LatencySummary:
    """Percentiles by linear interpolation.

    Args:
        milliseconds: float (n,), n of at least 1.
    """
    if not milliseconds.size:
        raise ValueError("no latencies to summarise")
    p50, p90, p99 = (float(v) for v in np.percentile(milliseconds, (50, 90, 99)))
    return LatencySummary(
        milliseconds.size,
        float(milliseconds.mean()),
        p50,
        p90,
        p99,
        float(milliseconds.min()),
        float(milliseconds.max()),
    )
