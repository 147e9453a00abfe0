"""Algorithms against a plain reading of the published pseudo-code, and on distributions whose answer is known."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibration.algorithms import (
    ALGORITHMS,
    choose_amax,
    entropy,
    kl_divergences,
    minmax,
    mse,
    percentile,
    squared_errors,
)
from pipeline.calibration.histogram import Histogram
from pipeline.config import CalibrateConfig

RNG = np.random.default_rng(7)
NORMAL = RNG.normal(size=1_000_000)


def counted(x: np.ndarray) -> Histogram:
    histogram = Histogram("t")
    histogram.add(np.asarray(x, np.float32))
    return histogram


def plain_divergence(counts: np.ndarray, i: int) -> float:
    """KL(P‖Q) for the first i bins, bin by bin."""
    kept = [float(count) for count in counts[:i]]
    if not any(kept):
        return math.inf
    p = list(kept)
    last = max(j for j in range(i) if kept[j] > 0)
    p[last] += float(sum(counts[i:]))
    members: dict[int, list[int]] = {}
    for j in range(i):
        if kept[j] > 0:
            members.setdefault(j * 128 // i, []).append(j)
    q = [0.0] * i
    for level in members.values():
        for j in level:
            q[j] = sum(kept[k] for k in level) / len(level)
    p_total, q_total = sum(p), sum(q)
    return sum(a / p_total * math.log((a / p_total) / (b / q_total)) for a, b in zip(p, q, strict=True) if a > 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 10**7)), min_size=140, max_size=400).filter(any)
)
def test_divergences_are_those_of_the_plain_loops(counts: list[int]) -> None:
    array = np.array(counts, np.float64)
    fast = kl_divergences(array)
    slow = [plain_divergence(array, i) for i in range(128, len(array) + 1)]
    np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-11)


def plain_squared_error(counts: np.ndarray, i: int) -> float:
    """Bin by bin: each value is its bin's centre, and becomes the nearest of 128 levels."""
    step, total = i / 127, 0.0
    for j, count in enumerate(counts):
        value = j + 0.5
        level = min(math.floor(value / step + 0.5), 127)
        total += count * (value - level * step) ** 2
    return total / float(counts.sum())


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(0, 10**5)), min_size=140, max_size=260).filter(any))
def test_squared_errors_are_those_of_the_plain_loops(counts: list[int]) -> None:
    array = np.array(counts, np.float64)
    slow = [plain_squared_error(array, i) for i in range(128, len(array) + 1)]
    np.testing.assert_allclose(squared_errors(array), slow, rtol=1e-7, atol=1e-7)


def quantized(x: np.ndarray, amax: float) -> np.ndarray:
    step = amax / 127
    return np.clip(np.round(x / step), -127, 127) * step


@pytest.mark.parametrize(
    "x", [NORMAL, np.maximum(NORMAL, 0), RNG.laplace(size=200_000)], ids=["normal", "relu", "laplace"]
)
def test_mse_is_the_least_error_on_the_values_themselves(x: np.ndarray) -> None:
    chosen = mse(counted(x))
    errors = {amax: float(np.mean((x - quantized(x, amax)) ** 2)) for amax in np.linspace(0.5, 1, 51) * np.abs(x).max()}
    assert float(np.mean((x - quantized(x, chosen)) ** 2)) < 1.01 * min(errors.values())


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.99])
def test_percentile_is_that_of_the_values(percent: float) -> None:
    histogram = counted(NORMAL)
    assert percentile(histogram, percent=percent) == pytest.approx(
        np.quantile(np.abs(NORMAL), percent / 100), abs=2 * histogram.width
    )
    config = CalibrateConfig(percentile=percent)
    assert choose_amax(histogram, "percentile", config) == percentile(histogram, percent=percent)


def test_all_of_it_is_minmax() -> None:
    assert percentile(counted(NORMAL), percent=100) == minmax(counted(NORMAL))


@pytest.mark.parametrize(
    "x",
    [NORMAL, np.maximum(NORMAL, 0), RNG.laplace(size=200_000), np.append(NORMAL, [30.0])],
    ids=["normal", "relu", "laplace", "outlier"],
)
def test_divergences_at_2048_bins(x: np.ndarray) -> None:
    counts = counted(x).resampled(2048)
    fast = kl_divergences(counts)
    for i in (128, 129, 200, 256, 777, 1024, 2000, 2047, 2048):
        assert fast[i - 128] == pytest.approx(plain_divergence(counts, i), rel=1e-9, abs=1e-12)


def test_minmax_is_the_largest_magnitude() -> None:
    assert minmax(counted(np.array([-3.5, 2.0]))) == 3.5


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_zeros_give_zero(algorithm) -> None:
    assert algorithm(counted(np.zeros(10)), 2048) == 0.0


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_constants_keep_their_value(algorithm) -> None:
    assert algorithm(counted(np.full(1000, -0.7)), 2048) == pytest.approx(0.7)


def test_uniform_is_not_clipped() -> None:
    assert entropy(counted(RNG.uniform(-3, 3, 1_000_000))) == pytest.approx(3.0, rel=1e-3)


def test_normal_loses_its_thinnest_tail_alone() -> None:
    histogram = counted(NORMAL)
    amax = entropy(histogram)
    assert 3.5 < amax <= histogram.amax
    assert histogram.share_above(amax) < 1e-4


@pytest.mark.parametrize("far", [50.0, 1000.0])
def test_a_few_outliers_are_clipped(far: float) -> None:
    histogram = counted(np.concatenate([NORMAL, np.full(5, far), np.full(5, -far * 0.9)]))
    assert 3.5 < entropy(histogram) < 0.2 * far


def test_outliers_that_are_many_stay() -> None:
    histogram = counted(np.concatenate([NORMAL, RNG.uniform(20, 21, 50_000)]))
    assert entropy(histogram) > 20


def test_where_clipping_gains_nothing_nothing_is_clipped() -> None:
    assert entropy(counted(np.append(np.full(10_000, 0.5), 1.0))) == 1.0


def test_zeros_after_relu_do_not_narrow_the_range() -> None:
    """With the zeros counted, half of all values would sit in one bin and the narrowest range would win."""
    positive = np.abs(NORMAL)
    with_zeros = np.concatenate([positive, np.zeros(20 * positive.size)])
    assert entropy(counted(with_zeros)) == pytest.approx(entropy(counted(positive)), rel=0.02)


def test_values_far_from_zero_are_not_clipped_away() -> None:
    """Published to the letter, the first bin that is not empty alone has divergence 0, and all else is clipped."""
    histogram = counted(RNG.uniform(0.3, 0.35, 100_000))
    assert kl_divergences(histogram.resampled(2048))[:-1].min() < 1e-9
    assert entropy(histogram) == pytest.approx(0.35, rel=1e-3)


def test_a_spike_does_not_clip_what_is_larger() -> None:
    histogram = counted(np.concatenate([np.full(1_500_000, 0.25), np.abs(NORMAL)]))
    assert histogram.share_above(entropy(histogram)) < 0.0011


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 4.0, 1e12])
def test_scaling_the_values_scales_amax(factor: float) -> None:
    assert entropy(counted(NORMAL * factor)) == pytest.approx(factor * entropy(counted(NORMAL)), rel=0.01)


def test_repeating_the_values_changes_nothing() -> None:
    histogram = counted(RNG.laplace(size=50_000))
    once = entropy(histogram)
    histogram.counts = histogram.counts * 16
    assert entropy(histogram) == once


@pytest.mark.parametrize("bins", [256, 1000, 2048, 4096])
def test_any_number_of_bins(bins: int) -> None:
    assert 3.5 < entropy(counted(NORMAL), bins) <= np.abs(NORMAL).max() * 1.001


def test_fifty_tensors_take_less_than_five_seconds() -> None:
    histograms = [counted(RNG.normal(size=20_000)) for _ in range(50)]
    started = time.process_time()
    for histogram in histograms:
        entropy(histogram)
    assert time.process_time() - started < 5
