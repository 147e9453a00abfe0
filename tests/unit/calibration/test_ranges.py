"""What the report says of a tensor's values."""

from __future__ import annotations

import numpy as np

from pipeline.calibration.histogram import Histogram
from pipeline.calibration.ranges import SHOWN_BINS, choose_ranges
from pipeline.calibration.report import TensorRange
from pipeline.config import CalibrateConfig


def test_histogram_of_a_tensor(rng: np.random.Generator) -> None:
    values = rng.standard_normal(10_000).astype(np.float32)
    histogram = Histogram("x")
    histogram.add(values)
    (entry,) = choose_ranges([histogram], "minmax", CalibrateConfig(), 1)
    assert entry.largest == entry.amax == float(np.abs(values).max())
    expected, _ = np.histogram(np.abs(values), SHOWN_BINS, (0, entry.largest))
    assert len(entry.histogram) == SHOWN_BINS
    assert np.abs(np.array(entry.histogram) - expected).max() <= 3  # fine bins across a border are split
    assert abs(sum(entry.histogram) - values.size) <= SHOWN_BINS / 2


def test_tensors_of_zeros_and_of_tensorrts_calibrator() -> None:
    histogram = Histogram("zero")
    histogram.add(np.zeros(7, np.float32))
    (entry,) = choose_ranges([histogram], "entropy", CalibrateConfig(), 1)
    assert entry.largest == 0
    assert sum(entry.histogram) == 7
    assert TensorRange("x", 1.0, 1).largest is None
