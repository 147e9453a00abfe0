"""From histograms to the ranges of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.calibration.algorithms import choose_amax
from pipeline.calibration.histogram import Histogram
from pipeline.calibration.report import TensorRange
from pipeline.config import Algorithm, CalibrateConfig

# For tensors of zeros, which any scale represents: 2^-14 is the smallest normal FP16 number.
ZERO_AMAX = 127 * 2.0**-14
SHOWN_BINS = 64


def choose_ranges(
    histograms: Sequence[Histogram], algorithm: Algorithm, config: CalibrateConfig, images: int
) -> list[TensorRange]:
    """The range of every tensor, float32; ``ZERO_AMAX`` for a tensor whose scale would not be a normal float32.

    Args:
        images: how many the histograms hold.
    """
    return [_choose(histogram, algorithm, config, images) for histogram in histograms]


def _choose(histogram: Histogram, algorithm: Algorithm, config: CalibrateConfig, images: int) -> TensorRange:
    amax = float(np.float32(choose_amax(histogram, algorithm, config)))
    if amax < 127 * np.finfo(np.float32).tiny:
        amax = ZERO_AMAX
    return TensorRange(
        tensor=histogram.tensor,
        amax=amax,
        images=images,
        minimum=histogram.minimum,
        maximum=histogram.maximum,
        clipped=histogram.share_above(amax),
        histogram=tuple(np.rint(histogram.resampled(SHOWN_BINS)).astype(int).tolist()),
    )
