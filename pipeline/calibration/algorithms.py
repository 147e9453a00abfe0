"""How amax is chosen from a histogram of |value|.

Every algorithm is a function ``(histogram, bins) -> amax``: the histogram is seen as ``bins`` equal bins over
[0, largest |value|], and amax is in the tensor's unit, at most that value, 0.0 for a tensor of zeros.
``choose_amax`` calls the one that the config names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.calibration.histogram import Histogram
from pipeline.config import Algorithm, CalibrateConfig

LEVELS = 128
LARGEST_CLIPPED = 0.001
PERCENT = 99.99
# Divergences this close differ by rounding alone.
TIE = 1e-12


def minmax(histogram: Histogram, bins: int = 2048) -> float:
    """The largest |value|, whatever ``bins``: nothing is clipped."""
    return histogram.amax


def entropy(histogram: Histogram, bins: int = 2048) -> float:
    """The range whose 128 levels keep the distribution best: the least Kullback-Leibler divergence.

    Source: Szymon Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310), "Entropy Calibration - pseudocode". For
    every i from 128 to ``bins``: P is the first i bins with all later ones (outliers) added to its last; Q is the first
    i bins without the outliers, quantized to 128 levels and expanded again, each level's count spread evenly over those
    of its bins that are not empty; both are normalised. The i with the least KL(P‖Q) gives (i + 0.5) bin widths.

    Where the slides are silent:

    1. Level of bin j: ``floor(j * 128 / i)``, so that levels differ by at most one bin, for any i.
    2. The first bin takes the count of the second, as in NVIDIA's pytorch-quantization (``calib/histogram.py``): zero
       is exact at any scale, and after a ReLU its count would outweigh all else and always favour the narrowest range.
    3. Where bin i - 1 is empty, the outliers go to the last bin before it that is not. Otherwise Q is 0 where P is not,
       the divergence infinite, and a single far outlier would forbid any range between it and the rest.
    4. An i that clips more than 0.1 % of the values (zeros aside, see 2) is no candidate: it would give up more than
       outliers. Where many values share one number, as on flat background, the published method clips whatever is
       larger, since P and Q both have their spike in the last bin. (At 8 bits, the least squared error clips 0.01 % of
       a normal distribution, and less than 0.1 % of far heavier tails.)
    5. Of equal divergences the widest range wins.
    6. ``i = bins`` is a candidate, and no amax exceeds the largest |value|.
    """
    if histogram.amax == 0:
        return 0.0
    counts = histogram.resampled(bins)
    counts[0] = counts[1]
    kept_share = np.cumsum(counts)[LEVELS - 1 :] / counts.sum()
    divergences = np.where(kept_share >= 1 - LARGEST_CLIPPED, kl_divergences(counts), np.inf)
    least = divergences.min()
    kept = LEVELS + int(np.flatnonzero(divergences <= least + TIE)[-1])
    return min((kept + 0.5) * histogram.amax / bins, histogram.amax)


def percentile(histogram: Histogram, bins: int = 2048, percent: float = PERCENT) -> float:
    """The value that ``percent`` % of all |value|, zeros included, do not exceed, whatever ``bins``.

    Source: H. Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
    arXiv:2004.09602, which compares 99.9 % to 99.9999 %.
    """
    return histogram.quantile(percent / 100)


def mse(histogram: Histogram, bins: int = 2048) -> float:
    """The range with the least squared error between the values and what INT8 makes of them.

    Source: the search of NVIDIA's pytorch-quantization (``calib/histogram.py``, method "mse").

    Every value counts as its bin's centre. For every i from 128 to ``bins``, amax = i bin widths, and a value becomes
    the nearest multiple of amax / 127 from 0 to amax. Of equal errors the widest range wins.
    """
    if histogram.amax == 0:
        return 0.0
    errors = squared_errors(histogram.resampled(bins))
    least = errors.min()
    kept = LEVELS + int(np.flatnonzero(errors <= least * (1 + TIE))[-1])
    return kept * histogram.amax / bins


ALGORITHMS: dict[Algorithm, Callable[[Histogram, int], float]] = {
    "entropy": entropy,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}


def choose_amax(histogram: Histogram, algorithm: Algorithm, config: CalibrateConfig) -> float:
    """amax of one tensor by an algorithm, with the config's bins and percentile; 0.0 for a tensor of zeros."""
    if algorithm == "percentile":
        return percentile(histogram, config.bins, config.percentile)
    return ALGORITHMS[algorithm](histogram, config.bins)


def squared_errors(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared error in bin widths for amax = 128 … bins widths, float64 (bins - 127,).

    Inside a level the error is a polynomial of its values, so sums of counts, values and squares per level suffice:
    three prefix sums replace the loops over bins.
    """
    bins = counts.size
    centres = np.arange(bins) + 0.5
    steps = np.arange(LEVELS, bins + 1)[:, None] / (LEVELS - 1)
    levels = np.arange(LEVELS)
    # Where level k begins: half a step below its value. The last one holds all that is clipped.
    edges = np.clip(np.ceil((levels - 0.5) * steps - 0.5), 0, bins).astype(np.intp)
    edges = np.concatenate([edges, np.full((edges.shape[0], 1), bins)], axis=1)
    number, first, second = (np.diff(_prefix(counts * centres**power)[edges], axis=1) for power in range(3))
    values = levels * steps
    errors: NDArray[np.float64] = (second - 2 * values * first + values**2 * number).sum(1) / counts.sum()
    return errors


def kl_divergences(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(P‖Q) in nats for i = 128 … bins, float64 (bins - 127,), infinite where the first i bins are all empty.

    Within a level Q is constant, so ``sum(P * log Q)`` needs P's sum per level only: two prefix sums of the counts
    replace the loops over bins.
    """
    bins, edges = counts.size, _level_edges(counts.size)
    filled = counts > 0
    below = _prefix(counts)
    below_filled = _prefix(filled)
    below_log = _prefix(_times_log(counts, counts))

    kept = below[LEVELS:]
    outliers = below[-1] - kept
    level_sums = np.diff(below[edges], axis=1)
    level_filled = np.diff(below_filled[edges], axis=1)
    level_means = np.divide(level_sums, level_filled, out=np.zeros_like(level_sums), where=level_filled > 0)

    ends = np.arange(LEVELS, bins + 1)
    last_filled = np.maximum.accumulate(np.where(filled, np.arange(bins), -1))[ends - 1]
    last_level = last_filled * LEVELS // ends
    at_last = counts[last_filled]
    mean_at_last = np.take_along_axis(level_means, np.maximum(last_level, 0)[:, None], axis=1)[:, 0]

    # All in counts: P = p / total and Q = q / kept, so KL = (sum p log p - sum p log q) / total - log(total / kept).
    p_log_p = below_log[LEVELS:] - _times_log(at_last, at_last) + _times_log(at_last + outliers, at_last + outliers)
    p_log_q = _times_log(level_sums, level_means).sum(1) + _times_log(outliers, mean_at_last)
    with np.errstate(divide="ignore"):
        divergences = (p_log_p - p_log_q) / below[-1] - np.log(below[-1] / kept)
    return np.where(last_filled >= 0, divergences, np.inf)


@lru_cache(maxsize=2)
def _level_edges(bins: int) -> NDArray[np.intp]:
    """First bin of each level, and the end of the last, for i = 128 … bins: (bins - 127, 129)."""
    ends = np.arange(LEVELS, bins + 1)[:, None]
    return -(-np.arange(LEVELS + 1) * ends // LEVELS)


def _prefix(values: NDArray[np.floating | np.bool_]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, … all values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _times_log(values: NDArray[np.float64], arguments: NDArray[np.float64]) -> NDArray[np.float64]:
    """values * log(arguments), 0 where the argument is 0."""
    logs: NDArray[np.float64] = np.log(arguments, out=np.zeros_like(arguments), where=arguments > 0)
    return values * logs
