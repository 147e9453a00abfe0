"""Histograms: exact counts, whatever the order of the values, in constant memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.calibration.histogram import BINS, CHUNK, Histogram
from pipeline.errors import CalibrationError

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = arrays.arrays(np.float32, st.integers(1, 60), elements=floats)


def counted(*parts: np.ndarray) -> Histogram:
    histogram = Histogram("t")
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


def expected_counts(x: np.ndarray) -> np.ndarray:
    """What numpy counts in bins of the smallest power of two width that reaches beyond the largest |value|."""
    magnitudes = np.abs(x.astype(np.float64))
    reach = 2.0**-100
    while reach <= magnitudes.max():
        reach *= 2
    return np.histogram(magnitudes, bins=np.arange(BINS + 1) * (reach / BINS))[0]


@given(values)
def test_counts_are_numpys(x: np.ndarray) -> None:
    histogram = counted(x)
    np.testing.assert_array_equal(histogram.counts, expected_counts(x))
    assert (histogram.minimum, histogram.maximum) == (x.min(), x.max())
    assert histogram.amax == np.abs(x).max()
    assert histogram.total == x.size


@given(st.lists(values, min_size=1, max_size=6), st.randoms())
def test_order_and_division_do_not_matter(parts: list[np.ndarray], random) -> None:
    shuffled = [np.array(random.sample(list(part), len(part)), np.float32) for part in parts]
    random.shuffle(shuffled)
    once, piecewise = counted(np.concatenate(parts)), counted(*shuffled)
    np.testing.assert_array_equal(once.counts, piecewise.counts)
    assert (once.width, once.minimum, once.maximum) == (piecewise.width, piecewise.minimum, piecewise.maximum)


@given(values, values)
def test_merge_equals_adding(x: np.ndarray, y: np.ndarray) -> None:
    merged = counted(x)
    merged.merge(counted(y))
    both = counted(x, y)
    np.testing.assert_array_equal(merged.counts, both.counts)
    assert (merged.width, merged.minimum, merged.maximum) == (both.width, both.minimum, both.maximum)


def test_merging_with_nothing_changes_nothing() -> None:
    histogram = counted(np.array([-3.0, 2.0]))
    histogram.merge(Histogram("empty"))
    np.testing.assert_array_equal(histogram.counts, counted(np.array([-3.0, 2.0])).counts)
    assert (histogram.minimum, histogram.maximum) == (-3, 2)


def test_arrays_larger_than_a_chunk() -> None:
    x = np.random.default_rng(0).normal(size=(3, CHUNK // 2 + 17)).astype(np.float32)
    histogram = Histogram("t")
    histogram.add(x)
    np.testing.assert_array_equal(histogram.counts, expected_counts(x.ravel()))


@pytest.mark.parametrize("amax", [1.0, 2.0**10, 2.0**-20, 1.9999999])
def test_largest_value_has_a_bin(amax: float) -> None:
    histogram = counted(np.array([amax, 0.0]))
    assert histogram.counts.sum() == 2
    assert histogram.counts[BINS // 2 :].sum() == 1


def test_extremes_of_float32() -> None:
    largest, least = np.finfo(np.float32).max, np.float32(1e-45)
    assert counted(np.array([largest, -largest, least, 0])).total == 4
    assert counted(np.array([least])).counts[0] == 1


def test_other_float_types_and_layouts() -> None:
    x = np.random.default_rng(1).normal(size=(40, 30))
    for kind in (np.float16, np.float32, np.float64):
        histogram = Histogram("t")
        histogram.add(x.astype(kind).T[::2])
        np.testing.assert_array_equal(
            histogram.counts, expected_counts(x.astype(kind).T[::2].ravel().astype(np.float32))
        )


def test_the_input_is_left_alone() -> None:
    x = np.array([-1.5, 0.5], np.float32)
    counted(x)
    np.testing.assert_array_equal(x, [-1.5, 0.5])


def test_empty_arrays_count_nothing() -> None:
    histogram = counted(np.array([]))
    assert (histogram.total, histogram.amax) == (0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_refused_with_its_names(bad: float) -> None:
    x = np.zeros(3 * CHUNK, np.float32)
    x[2 * CHUNK + 5] = bad
    with pytest.raises(CalibrationError, match=r"tensor conv_3 holds NaN.*image cat") as caught:
        Histogram("conv_3").add(x, "cat")
    assert caught.value.got == f"1 of {x.size} values are not finite"


def test_float64_beyond_float32_is_refused() -> None:
    with pytest.raises(CalibrationError):
        Histogram("t").add(np.array([1e300]))


@given(values, st.sampled_from([256, 1000, 2048]))
def test_resampling_keeps_the_total(x: np.ndarray, bins: int) -> None:
    resampled = counted(x).resampled(bins)
    assert resampled.shape == (bins,)
    assert (resampled >= 0).all()
    assert resampled.sum() == pytest.approx(x.size)
    if np.abs(x).max() > 0:
        assert resampled[-1] > 0


def test_resampling_is_close_to_numpys_histogram() -> None:
    x = np.random.default_rng(2).normal(size=2_000_000).astype(np.float32)
    histogram = counted(x)
    exact = np.histogram(np.abs(x), bins=2048, range=(0, histogram.amax))[0]
    moved = np.abs(np.cumsum(histogram.resampled(2048)) - np.cumsum(exact)).max()
    assert moved <= histogram.counts.max()


def test_resampling_has_no_beat() -> None:
    """Whole fine bins, 4 or 5 to a coarse one, would make a uniform distribution's bins differ by a fifth."""
    x = np.linspace(0, 9.1, 4_000_000, dtype=np.float32)
    resampled = counted(x).resampled(2048)
    assert resampled.max() / resampled.min() < 1.02


@settings(max_examples=50)
@given(values, st.floats(0.001, 1.2))
def test_share_above(x: np.ndarray, part: float) -> None:
    histogram = counted(x)
    amax = histogram.amax * part
    if histogram.amax == 0:
        return
    magnitudes = np.abs(x.astype(np.float64))
    low = np.mean(magnitudes > amax + histogram.width)
    high = np.mean(magnitudes > amax - histogram.width)
    assert low - 1e-9 <= histogram.share_above(amax) <= high + 1e-9


def test_share_above_the_largest_value_is_exactly_zero() -> None:
    assert counted(np.array([0.1, 3.3])).share_above(float(np.float32(3.3))) == 0


def test_share_above_of_a_uniform_distribution() -> None:
    histogram = counted(np.linspace(-1, 1, 1_000_001))
    assert histogram.share_above(0.75) == pytest.approx(0.25, abs=1e-5)
