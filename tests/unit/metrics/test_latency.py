"""How a series of latencies is told."""

from __future__ import annotations

import numpy as np

from pipeline.metrics.latency import LATENCY_BINS, summarise


def test_counts_reach_from_the_least_to_the_99th_percentile() -> None:
    told = summarise(np.arange(1.0, 1002.0))
    assert (told.min_ms, told.p50_ms, told.p99_ms, told.max_ms) == (1, 501, 991, 1001)
    assert len(told.counts) == LATENCY_BINS
    assert sum(told.counts) == 991
    assert max(told.counts) - min(told.counts) <= 1


def test_equal_latencies_have_no_spread() -> None:
    assert summarise(np.full(5, 2.0)).counts == ()
