"""Confidence intervals by bootstrap over images: the pixels of one image depend on each other, images hardly do.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: percentile intervals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.segmentation import Figures

LEVEL = 0.95
# Weights in memory at a time: 32 MB.
BLOCK = 1 << 22


def resampled_sums(statistics: NDArray[np.number], resamples: int, seed: int) -> Figures:
    """Sums over images drawn with replacement, float64 (resamples, k).

    Args:
        statistics: what adds up, per image: (images, k).
        seed: equal seeds draw equal images, whatever k is: figures of both sides can be compared resample by resample.
    """
    images = len(statistics)
    rng = np.random.default_rng(seed)
    values = np.asarray(statistics, np.float64)
    even = np.full(images, 1 / images)
    rows = max(1, BLOCK // images)
    counts = (min(rows, resamples - start) for start in range(0, resamples, rows))
    return np.concatenate([rng.multinomial(images, even, count) @ values for count in counts])


def interval(figures: Figures) -> Figures:
    """The bounds between which LEVEL of the resampled figures lie: (2, …) from (resamples, …).

    Resamples that leave a figure undefined (NaN) do not count; where all do, the bounds are NaN.
    """
    known = ~np.isnan(figures)
    ordered = np.sort(figures, axis=0)  # NaN goes to the end
    last = known.sum(0) - 1
    bounds = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    places = [np.maximum(np.rint(share * last).astype(np.intp), 0) for share in bounds]
    return np.stack([np.take_along_axis(ordered, place[np.newaxis], 0)[0] for place in places])
